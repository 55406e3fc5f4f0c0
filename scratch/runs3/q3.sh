set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf F=.gpu/run/few.py P=examples/plans/qwen2.5-coder-0.5b
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 FILE=1 KV=$P.json go q16 python3 $F "" --model qwen --length 16384 --rows 1600 --each 3 --texts 4 --batch 8 --query-heads --profile .gpu/run/q16.json --plan $OUT/plan16.json --out $HOME/q16.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 KV=examples/plans/smollm2-135m.json go s8 python3 $F "" --length 8192 --rows 700 1350 --each 4 --batch 16 --query-heads --plan $OUT/plan8.json --out $HOME/s8.csv $C
 FILE=1 KV=$P-32k.json go q32 python3 $F "per head;window or everything;streaming;streaming, last exact" --model qwen --length 32768 --rows 1600 --each 2 --texts 4 --batch 2 --query-heads --few --profile .gpu/run/q32.json --plan $OUT/plan32.json --out $HOME/q32.csv $C) &
wait
cat $OUT/done.txt; cat $HOME/*.csv > $OUT/all.csv
for f in s8 q32 q16; do echo "== $f"; tr '\r' '\n' < $HOME/$f.log | grep -E "^┃|^│|Error" | cut -c1-150; done; for f in $HOME/*.log; do tr '\r' '\n' < $f | tail -60; done > $OUT/logs.txt
