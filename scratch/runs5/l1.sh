set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); X=examples/bench/caching.py; R=$HOME/rows; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
sha256sum $HOME/m/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
(export TRITON_CACHE_DIR=$HOME/tc0
 go explore5 python3 .gpu/run/explore5.py --profile .gpu/run/q16.json --limit 120) &
(export TRITON_CACHE_DIR=$HOME/tc1
 go qcache python3 $X --model qwen --length 16384 --rows 4032 --piece 8 --profile $R/qwen.json --out $R/qcache.csv $C
 go scache python3 $X --rows 1984 --each 5 --profile $R/smol.json --out $R/scache.csv $C
 go qcache1 python3 $X --model qwen --length 16384 --rows 1024 --piece 8 --profile $R/qwen.json --out $R/qcache1.csv $C) &
wait
cat $OUT/done.txt; head -qn1 $R/*.csv | head -1 > $OUT/all.csv; for f in $R/*.csv; do tail -n +2 $f >> $OUT/all.csv; done; cp $R/*.json $OUT/
tail -8 $HOME/logs/explore5.log | cut -c1-3000
for f in qcache qcache1 scache; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error" | cut -c1-115; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
