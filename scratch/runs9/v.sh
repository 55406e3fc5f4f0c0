set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench; P=.gpu/run/plans
s=$(date +%s); timeout 90 python3 $B/benchmark.py --padded --out $OUT/padded.csv $C > $OUT/padded.log 2>&1; echo padded rc $? $(( $(date +%s) - s ))
cut -c1-230 $OUT/padded.csv
s=$(date +%s); timeout 100 python3 tests/gpu/sanitized.py --tool memcheck $* > $OUT/mem.log 2>&1; echo mem rc $? $(( $(date +%s) - s )); tail -12 $OUT/mem.log | cut -c1-200
