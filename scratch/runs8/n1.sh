set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; B=examples/bench; mkdir -p $R $HOME/logs; cp .gpu/run/prof/*.json $R/
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; sha256sum $HOME/qwen.gguf | cut -c1-16; export EXPRESS_QWEN=$HOME/qwen.gguf
P=examples/plans/qwen2.5-coder-0.5b
export TRITON_CACHE_DIR=$HOME/tc1
go prof 60 python3 .gpu/run/prof_mixed.py 32768 $P.json $P-query-heads.json
go mixed 110 python3 $B/benchmark.py --mixed --plan $P.json $P-query-heads.json --lengths 32768 131072 --repeats 3 --out $OUT/mixed.csv $C
F="per head;streaming, last exact"
plan() { name=$1; shift; go $name 400 python3 .gpu/run/few8.py "$F" --few --profile $R/$name.profile.json --plan $R/$name.plan.json --out $R/$name.csv $C --rows 1600 --each 3 --texts 4 --last 128 "$@"; }
(export TRITON_CACHE_DIR=$HOME/tc0; plan q32 --model qwen --length 32768 --query-heads --batch 4) &
(export TRITON_CACHE_DIR=$HOME/tc2; plan q16 --model qwen --length 16384 --query-heads) &
(plan k16 --model qwen --length 16384; plan k32 --model qwen --length 32768 --batch 4) &
wait
rm -rf build; go tests 200 python3 -m pytest tests/gpu/test_contest.py tests/gpu/test_heads.py tests/gpu/test_prepared.py tests/gpu/test_cache.py -n 10 -q -rfs --tb=short -p no:benchmark -p no:cacheprovider
cat $OUT/done.txt; gzip -f $R/*.profile.json; tar -C $R -cf $OUT/rows.tar .
cut -c1-110 $HOME/logs/prof.log > $OUT/prof.txt; head -60 $OUT/prof.txt
grep -hE "Error|failed" $HOME/logs/mixed.log | cut -c1-300 | head
python3 - $OUT <<'P'
import csv, sys
for row in csv.DictReader(open(sys.argv[1] + "/mixed.csv")):
    print(f"{row['method']:10}{row['Lk']:>7} {float(row['ms_p50']):9.3f} ms exact {float(row['opponent_ms_p50'] or 0):9.3f} x{row['speedup'][:6]:6} {row['params'][:130]}")
P
for f in q16 q32 k16 k32; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error|^MISSED|^profile" | cut -c1-900; done
grep -E "^FAILED|^ERROR|^E  |passed|failed" $HOME/logs/tests.log | cut -c1-200 | head -20; tail -2 $HOME/logs/tests.log | cut -c1-200
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
