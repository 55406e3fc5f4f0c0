set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; B=examples/bench; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; rc=$?; echo "$name rc $rc $(( $(date +%s) - s )) s" >> $OUT/done.txt; return $rc; }
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; sha256sum $HOME/qwen.gguf | cut -c1-16; export EXPRESS_QWEN=$HOME/qwen.gguf
export TRITON_CACHE_DIR=$HOME/tc1
go tests 75 python3 -m pytest tests/gpu/test_heads.py -n 10 -q -rfs --tb=short -p no:benchmark -p no:cacheprovider
go last 45 python3 .gpu/run/last_check.py
if [ -n "${NOMODELS:-}" ] || grep -q "FAILED" $HOME/logs/tests.log; then echo "tests failed: models without jobs" >> $OUT/done.txt; sed -i 's/return 2 \* scores >=/return False and 2 * scores >=/' kernels/heads.py; fi
plan() { name=$1; shift; go $name 310 python3 .gpu/run/few8.py "per head;window or everything" --few --profile $R/$name.profile.json --plan $R/$name.plan.json --out $R/$name.csv $C --rows 1600 --each 3 --texts 4 --model qwen "$@"; }
(export TRITON_CACHE_DIR=$HOME/tc0; plan q32 --length 32768 --query-heads --batch 4) &
(export TRITON_CACHE_DIR=$HOME/tc2; plan q16 --length 16384 --query-heads) &
(plan k32 --length 32768 --batch 4; plan k16 --length 16384) &
wait
cat $OUT/done.txt; gzip -f $R/*.profile.json; tar -C $R -cf $OUT/rows.tar .
grep -E "^FAILED|^ERROR|^E  |passed|failed" $HOME/logs/tests.log | cut -c1-200 | head -20; tail -2 $HOME/logs/tests.log | cut -c1-100
tail -25 $HOME/logs/last.log | cut -c1-160
for f in q16 q32 k16 k32; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error|^MISSED|^profile" | cut -c1-700; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
