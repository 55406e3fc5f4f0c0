set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench; P=.gpu/run/plans
s=$(date +%s); timeout 115 python3 .gpu/run/spans_check.py > $OUT/spans.log 2>&1; echo spans rc $? $(( $(date +%s) - s )); grep -v "^$" $OUT/spans.log | tail -24 | cut -c1-210
s=$(date +%s); timeout 170 python3 $B/benchmark.py --mixed --plan $P/k16.plan.json $P/q16.plan.json --lengths 32768 131072 --repeats 3 --out $OUT/mixed.csv $C > $OUT/mixed.log 2>&1; echo mixed rc $? $(( $(date +%s) - s ))
python3 - $OUT <<'P'
import csv, sys
for row in csv.DictReader(open(sys.argv[1] + "/mixed.csv")):
    print(f"{row['method']:10}{row['Lk']:>7} {float(row['ms_p50']):9.3f} ms exact {float(row['opponent_ms_p50'] or 0):9.3f} x{row['speedup'][:6]:6} {row['params'][:130]}")
P
mkdir -p $OUT/enc; s=$(date +%s); timeout 100 python3 $B/encoders.py speed --out $OUT/enc $C > $OUT/enc.log 2>&1; echo enc rc $? $(( $(date +%s) - s )); tail -40 $OUT/enc.log | cut -c1-170
tar -C $OUT -cf $OUT/enc.tar enc; rm -r $OUT/enc
