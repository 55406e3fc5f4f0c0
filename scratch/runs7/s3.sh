set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; R=$HOME/rows; mkdir -p $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
mkdir -p $HOME/p; for x in "k16 qwen2.5-coder-0.5b" "k32 qwen2.5-coder-0.5b-32k" "q16 qwen2.5-coder-0.5b-query-heads" "q32 qwen2.5-coder-0.5b-32k-query-heads"; do set -- $x; if [ -f $R/$1.plan.json ]; then cp $R/$1.plan.json $HOME/p/$2.json; else cp examples/plans/$2.json $HOME/p/$2.json; echo "old $2"; fi; done
P=$HOME/p/qwen2.5-coder-0.5b
go mixed python3 $B/benchmark.py --mixed --plan $P.json $P-query-heads.json --lengths 32768 131072 --repeats 3 --out $OUT/mixed.csv $C
go mixed5 python3 $B/benchmark.py --mixed --plan $P.json --lengths 524288 --repeats 1 --out $OUT/mixed.csv $C
cat $OUT/done.txt; grep -hE "Error|failed" $HOME/logs/mixed*.log | cut -c1-200 | head -5
python3 - $OUT <<'P'
import csv, pathlib, sys
for row in csv.DictReader(open(sys.argv[1] + "/mixed.csv")):
    print(f"{row['method']:10}{row['Lk']:>7} {float(row['ms_p50']):9.3f} ms exact {float(row['opponent_ms_p50'] or 0):9.3f} x{row['speedup'][:6]:6} {row['params'][:150]}")
P
