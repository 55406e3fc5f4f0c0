# in the background of the uploads
set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench; O=$HOME/bg; mkdir -p $O
python3 -c "import torch, transformers, triton, torch._dynamo"
t() { name=$1; l=$2; shift 2; s=$(date +%s); timeout $l "$@" > $O/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $O/bg.txt; }
t cache 60 python3 $B/decoding.py --parts cache --cached 1x32768 8x32768 32x32768 --out $O/cache.csv $C
echo done >> $O/bg.txt
t tests 120 python3 -m pytest tests/gpu/test_cache.py -k "places or programs_wait or replays" -q -p no:cacheprovider -n 3
echo done >> $O/bg.txt
