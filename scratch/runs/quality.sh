# runs on the GPU machine, in the repository root; models lie in ~/m
set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=$HOME/tc
L=$HOME/logs; mkdir -p $L; R=$HOME/rows; mkdir -p $R
C="--commit $(cat .gpu/run/commit)"; X=examples/bench/caching.py
END=$(( $(date +%s) + ${1:-430} ))
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; shift; timeout $(left) python3 "$@" > $L/$name.log 2>&1; echo "$name rc $? at $(date +%T)" >> $L/done.txt; }
after() { while [ ! -s $1 ] && [ $(left) -gt 5 ]; do sleep 1; done; sleep 1; shift; go "$@"; }
(go smol-cache $X --rows 1984 1024 --each 5 --profile $R/smol.json --out $R/a.csv $C) &
(go qwen-cache $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --profile $R/qwen.json --out $R/b.csv $C) &
(go explore .gpu/run/explore.py --out $R/explore.txt --limit $(( $(left) - 45 ))) &
(after $R/smol.json smol-selected $X --part selected --rows 1024 --piece 4 --new 128 --profile $R/smol.json --out $R/c.csv $C) &
(after $R/smol.json smol-long $X --part long --length 6144 --new 4096 --rows 1024 --piece 32 --profile $R/smol.json --out $R/d.csv $C) &
(after $R/qwen.json qwen-selected $X --model qwen --length 16384 --part selected --rows 1024 --piece 4 --new 128 --profile $R/qwen.json --out $R/e.csv $C
 go qwen-long $X --model qwen --part long --length 12288 --new 4096 --rows 1024 --piece 32 --profile $R/qwen.json --windows 2 --out $R/f.csv $C) &
nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader -l 20 > $L/smi.txt 2>/dev/null &
SMI=$!
wait %1 %2 %3 %4 %5 %6 2>/dev/null; kill $SMI
cat $L/done.txt; cp $R/*.json $R/explore.txt $OUT/ 2>/dev/null
head -qn1 $R/a.csv > $OUT/caching.csv; for f in $R/[a-f].csv; do tail -n +2 $f >> $OUT/caching.csv; done
for f in $L/*.log; do echo "== $f"; tr '\r' '\n' < $f; done > $OUT/logs.txt; cat $L/smi.txt >> $OUT/logs.txt
tail -12 $L/explore.log | cut -c1-250; for f in smol-cache qwen-cache smol-selected smol-long qwen-selected qwen-long; do echo "== $f"; tail -4 $L/$f.log | cut -c1-200; done
