set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; B=examples/bench
python3 -c "import torch, transformers, triton, torch._dynamo"
mkdir -p $HOME/enc; s=$(date +%s); timeout 130 python3 $B/encoders.py speed --out $HOME/enc $C > $HOME/enc/enc.log 2>&1; echo enc rc $? $(( $(date +%s) - s )) >> $HOME/enc/enc.log
