set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); X=examples/bench/caching.py; R=$HOME/rows; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
after() { while [ ! -s $1 ] && [ $(left) -gt 12 ]; do sleep 1; done; sleep 1; shift; go "$@"; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go qcache python3 $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --profile $R/qwen.json --out $R/qcache.csv $C
 go qselected python3 $X --model qwen --length 16384 --part selected --rows 1024 --piece 4 --new 128 --profile $R/qwen.json --out $R/qselected.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 (go scache python3 $X --rows 1984 1024 --each 5 --profile $R/smol.json --out $R/scache.csv $C) &
 (KV=examples/plans/smollm2-135m.json go s8 python3 .gpu/run/few.py "" --length 8192 --rows 700 1350 --each 4 --batch 16 --query-heads --plan $OUT/plan8.json --out $R/s8.csv $C) &
 (after $R/smol.json sselected python3 $X --part selected --rows 1024 --piece 4 --new 128 --profile $R/smol.json --out $R/sselected.csv $C
  go slong python3 $X --part long --length 6144 --new 4096 --rows 1024 --piece 32 --profile $R/smol.json --out $R/slong.csv $C) & wait) &
(export TRITON_CACHE_DIR=$HOME/tcs CUDA_VISIBLE_DEVICES=1; s=$(date +%s)
 l=$(( $(left) - 5 )); timeout $l python3 tests/gpu/sanitized.py --tool memcheck --limit $(( l - 10 )) > $HOME/logs/memcheck.log 2>&1; echo "memcheck rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt
 l=$(( $(left) - 5 )); [ $l -gt 30 ] && timeout $l python3 tests/gpu/sanitized.py --tool racecheck --limit $(( l - 10 )) > $HOME/logs/racecheck.log 2>&1; echo "racecheck rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt) &
wait
cat $OUT/done.txt; head -qn1 $R/*.csv | head -1 > $OUT/all.csv; for f in $R/*.csv; do tail -n +2 $f >> $OUT/all.csv; done
for f in qcache qselected scache s8 sselected slong; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error" | cut -c1-125; done
for t in memcheck racecheck; do echo "== $t"; grep -E "^----|WRONG|FAILED|NEVER|launched$|not found|rror" $HOME/logs/$t.log | cut -c1-200 | head -30; cp $HOME/logs/$t.log $OUT/$t.txt; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
