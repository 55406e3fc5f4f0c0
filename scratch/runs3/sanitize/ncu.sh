# usage: bash .gpu/sanitize/ncu.sh COMMIT [CALLS...]: what limits each kernel, one GPU, a minute; writes $OUT/limits.csv
set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=220 PYTHONUNBUFFERED=1
C=$1; shift; [ $# -gt 0 ] && set -- --calls "$@"
s=$(date +%s); timeout 280 python3 examples/bench/limits.py --commit $C --out $OUT/limits.csv "$@" > $OUT/limits.log 2>&1; echo "rc $? in $(( $(date +%s) - s )) s"
grep -v "^==PROF" $OUT/limits.log | cut -c1-220 | tail -60
