# FIRST of the next session, no models needed: steps of a cache after "four programs share a multiprocessor" and "many groups are decided at once".
# bash .gpu/run/next.sh 400   (carry .gpu/run with this file and sweep.py)
set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench; END=$(( $(date +%s) + $1 ))
go() { name=$1; m=$2; shift 2; l=$(( END - $(date +%s) )); [ $l -lt 15 ] && { echo "$name: no time"; return; }; [ $l -gt $m ] && l=$m
  s=$(date +%s); timeout $l "$@" > $OUT/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s"; }
python3 -c "import torch, transformers, triton, torch._dynamo"
go tests 130 python3 -m pytest tests/gpu/test_cache.py tests/gpu/test_pages.py -q -p no:cacheprovider -n 8; tail -3 $OUT/tests.log | cut -c1-200
go cache 70 python3 $B/decoding.py --parts cache --cached 1x32768 8x32768 32x32768 --out $OUT/cache.csv $C; grep -E "^│|Error" $OUT/cache.log | cut -c1-150
go whole 220 python3 $B/decoding.py --parts whole --shapes 1x131072 8x32768 --methods exact cache planned --out $OUT/whole.csv $C; cut -d, -f6-9,18-23 $OUT/whole.csv | cut -c1-260
