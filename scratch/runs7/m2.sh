set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$HOME/tc1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; mkdir -p $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
P=examples/plans/qwen2.5-coder-0.5b
go update 60 python3 $B/decoding.py --parts cache --out $OUT/decoding.csv $C
go mixed 130 python3 $B/benchmark.py --mixed --plan $P.json $P-query-heads.json --lengths 32768 131072 --repeats 3 --out $OUT/mixed.csv $C
go table 150 python3 $B/benchmark.py --lengths 4096 8192 16384 24576 32768 131072 --encode --decode 0 --repeats 5 --out $OUT/table.csv $C
go mixed5 70 python3 $B/benchmark.py --mixed --plan $P.json --lengths 524288 --repeats 1 --out $OUT/mixed.csv $C
go encoders 60 python3 $B/encoders.py speed --out $OUT/encoders.csv $C
cat $OUT/done.txt; grep -hE "Error|failed" $HOME/logs/{update,mixed,table,mixed5,encoders}.log | cut -c1-300 | head -12
python3 - $OUT <<'P'
import csv, pathlib, sys
for f in ("decoding","mixed","table","encoders"):
    p = pathlib.Path(sys.argv[1], f + ".csv")
    if p.exists():
        for row in csv.DictReader(open(p)):
            print(f"{row['job'][:9]:9}{row['method'][:8]:8}{row.get('B','')}x{row['Lk']:>7} s{row['s']:4} {float(row['ms_p50']):8.3f} {row['opponent'][:8]:8} {float(row['opponent_ms_p50'] or 0):8.3f} x{row['speedup'][:5]:5} {row['peak_mb'][:6]} {row['params'][:100]}")
P
for f in update mixed table mixed5 encoders; do echo "== $f"; tail -c 4000 $HOME/logs/$f.log | tr '\r' '\n'; done > $OUT/logs.txt
