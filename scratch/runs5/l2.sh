set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); X=examples/bench/caching.py; R=$HOME/rows; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
sha256sum $HOME/m/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
O='per head' ; W='window or everything'; W1='one window or everything'
(export TRITON_CACHE_DIR=$HOME/tc0
 go explore6 python3 .gpu/run/explore6.py --limit 230 --save $OUT/big.json --out $OUT/e6.txt) &
(export TRITON_CACHE_DIR=$HOME/tc1
 go scache python3 $X --rows 1984 1024 --each 5 --profile $R/smol.json --out $R/scache.csv $C --methods "$O" "$W" "$W1" "without everything" "per head, prompt"
 go sselected python3 $X --part selected --rows 1024 --piece 4 --new 128 --profile $R/smol.json --out $R/sselected.csv $C
 go qselected python3 $X --model qwen --length 16384 --part selected --rows 1024 --piece 4 --new 128 --profile $R/qwen.json --out $R/qselected.csv $C
 go qcache python3 $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --profile $R/qwen.json --out $R/qcache.csv $C --methods "$O" "$W" "$W1" "without everything" "per head, prompt") &
(sleep 5; cd $PWD; export TRITON_CACHE_DIR=$HOME/tc2
 go tests python3 -m pytest $(ls tests/gpu/test_*.py | grep -v -e registers -e packages) -n 9 -q -rfs --tb=short -p no:benchmark -p no:cacheprovider) &
wait
cat $OUT/done.txt; head -qn1 $R/*.csv | head -1 > $OUT/all.csv; for f in $R/*.csv; do tail -n +2 $f >> $OUT/all.csv; done; cp $R/*.json $OUT/
tail -45 $HOME/logs/explore6.log | cut -c1-330
for f in scache sselected qselected qcache; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error" | cut -c1-115; done
grep -E "^FAILED|^ERROR|^E  |passed|failed" $HOME/logs/tests.log | cut -c1-200 | head -30; tail -3 $HOME/logs/tests.log | cut -c1-200
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
