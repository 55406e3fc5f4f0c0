# One GPU, under 150 s: what a plan per query head costs beside a plan per KV head, in one run.
# From the repository root of a tree that has this branch: bash .gpu/qbench/go.sh [plan per query head] [per KV head]
# Outputs are checked before they are timed (speedup says "failed its check"); $OUT gets mixed.csv, first.csv and logs.
set -u
QUERY=${1:-.gpu/qbench/plan16.json}; KV=${2:-examples/plans/qwen2.5-coder-0.5b.json}; TO=${OUT:-/tmp/qbench}; mkdir -p $TO
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit ${COMMIT:-$(cat .gpu/run/commit 2>/dev/null || echo none)}"; B=examples/bench; rm -f $TO/mixed.csv $TO/first.csv
[ -f "$QUERY" ] && [ -f "$KV" ] || { echo "no $QUERY or no $KV"; exit 1; }
timeout 110 python3 $B/benchmark.py --mixed --plan "$QUERY" "$KV" --lengths 32768 131072 --repeats 3 --out $TO/mixed.csv $C > $TO/mixed.log 2>&1
echo "mixed rc $? after $SECONDS s"
left=$(( 144 - SECONDS ))
if [ $left -ge 35 ]; then
  timeout $left python3 $B/first_token.py --plan "$QUERY" "$KV" --lengths 32768 --repeats 2 --out $TO/first.csv $C > $TO/first.log 2>&1
  echo "first_token rc $? after $SECONDS s"
else echo "first_token: no time ($left s left)"; fi
grep -hE "Error|failed" $TO/*.log | cut -c1-200 | head -5
python3 - $TO <<'P'
import csv, pathlib, sys
for name in ("mixed", "first"):
    path = pathlib.Path(sys.argv[1], f"{name}.csv")
    for row in csv.DictReader(path.open()) if path.exists() else ():
        ms, exact = float(row["ms_p50"]), float(row["opponent_ms_p50"])
        print(f"{name} {row['method']:8}{row['Lk']:>7} {ms:9.3f} ms  exact {exact:9.3f}  x{row['speedup'][:6]:6} {row['params'][:104]}")
P
