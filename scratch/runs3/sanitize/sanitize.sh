# usage: bash .gpu/sanitize/sanitize.sh TOOL [SECONDS] [GROUPS...]   (TOOL: none memcheck racecheck initcheck)
# none: every group without a tool, in parallel processes (checks the results, compiles all kernels)
set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=150 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
T=$1; S=${2:-500}; shift; [ $# -gt 0 ] && shift
if [ "$T" = none ]; then
  mkdir -p $OUT/none
  for g in ${*:-hopper attend express heads select decode cache santa thinformer sparse}; do
    (s=$(date +%s); timeout $S python3 tests/gpu/sanitized.py $g > $OUT/none/$g.log 2>&1; echo "$g rc $? $(( $(date +%s) - s )) s" >> $OUT/none.txt) & done; wait
  cat $OUT/none.txt; grep -hE "WRONG|FAILED|Error" $OUT/none/*.log | cut -c1-300; grep -h "^[a-z]*: .*: ok" $OUT/none/*.log | wc -l
  grep -h "^launched:" $OUT/none/*.log | tr ' ' '\n' | sort -u | grep -c kernel
else
  python3 tests/gpu/sanitized.py --tool $T --limit $S "$@" > $OUT/$T.txt 2>&1; echo "rc $?"
  grep -E "^----|WRONG|FAILED|NEVER|launched$|not found" $OUT/$T.txt | cut -c1-250; grep -A14 -E "^=+ +(Error|Invalid|Warning|Race|Uninit)|^[a-z]+:$" $OUT/$T.txt | cut -c1-200 | head -60
fi
