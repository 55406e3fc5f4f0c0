set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; mkdir -p $R $HOME/logs; cp .gpu/run/prof/q*.json $R/
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
if ls $HOME/m/piece_* > /dev/null 2>&1; then
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; sha256sum $HOME/qwen.gguf | cut -c1-16; export EXPRESS_QWEN=$HOME/qwen.gguf
F="per head;streaming, last exact"
plan() { name=$1; shift; go $name python3 .gpu/run/few8.py "$F" --few --profile $R/${name%%-*}.profile.json --out $R/$name.csv $C "$@"; }
(export TRITON_CACHE_DIR=$HOME/tc0
 plan q16-128 --model qwen --length 16384 --rows 1600 --query-heads --each 3 --texts 1 --last 128
 plan q32-128 --model qwen --length 32768 --rows 1600 --query-heads --each 3 --texts 1 --batch 4 --last 128
 plan k32-128 --model qwen --length 32768 --rows 1600 --each 3 --texts 1 --batch 4 --last 128) &
fi
(export TRITON_CACHE_DIR=$HOME/tc1; rm -rf build
 go tests python3 -m pytest $(ls tests/gpu/test_*.py | grep -v -e registers -e packages -e sparse -e santa -e bernoulli) -n 10 -q -rfs --tb=short -p no:benchmark -p no:cacheprovider) &
wait
cat $OUT/done.txt; rm -f $R/*.profile.json; tar -C $R -czf $OUT/rows.tgz .
for f in q16-128 q32-128 k32-128; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error|^MISSED" | cut -c1-1500; done
grep -E "^FAILED|^ERROR|^E  |passed|failed" $HOME/logs/tests.log | cut -c1-200 | head -30; tail -3 $HOME/logs/tests.log | cut -c1-200
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
