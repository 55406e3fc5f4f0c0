set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench; P=examples/plans
END=$(( $(date +%s) + $1 ))
go() { name=$1; m=$2; shift 2; l=$(( END - $(date +%s) )); [ $l -lt 15 ] && { echo "$name: no time"; return; }; [ $l -gt $m ] && l=$m
  s=$(date +%s); timeout $l "$@" > $OUT/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s"; }
nvidia-smi --query-gpu=name --format=csv,noheader
go sweep 170 python3 .gpu/run/sweep.py; grep -v Warn $OUT/sweep.log | cut -c1-150 | tail -75
go enc 60 python3 $B/encoders.py speed --out $OUT $C
go mixed 130 python3 $B/benchmark.py --mixed --plan $P/qwen2.5-coder-0.5b.json $P/qwen2.5-coder-0.5b-query-heads.json --lengths 32768 131072 --repeats 3 --out $OUT/mixed.csv $C
go first 110 python3 $B/first_token.py --plan $P/qwen2.5-coder-0.5b.json $P/qwen2.5-coder-0.5b-query-heads.json --out $OUT/first.csv $C
go mixed5 110 python3 $B/benchmark.py --mixed --plan $P/qwen2.5-coder-0.5b.json $P/qwen2.5-coder-0.5b-query-heads.json --lengths 524288 --repeats 1 --out $OUT/mixed5.csv $C
python3 - $OUT <<'P'
import csv, sys, glob
for f in glob.glob(sys.argv[1] + "/*.csv"):
    for row in csv.DictReader(open(f)):
        print(f"{row['job']:10}{row['method']:10}{row['Lk']:>7} {float(row['ms_p50']):9.3f} ms exact {float(row['opponent_ms_p50'] or 0):9.3f} x{row['speedup'][:6]:6} {row['params'][:140]}")
P
tail -3 $OUT/first.log $OUT/mixed5.log | cut -c1-200
