set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=160 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 ))
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
[ -f $HOME/m/all ] || cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
F=.gpu/run/few.py; A="per head;window or everything;streaming;selected, last exact"
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go q16 python3 $F "$A" --model qwen --length 16384 --rows 1600 --each 3 --texts 9 --batch 4 --query-heads --few --profile $OUT/q16.json --plan $OUT/plan16.json --out $HOME/q16.csv $C
 go s8 python3 $F "$A" --length 8192 --rows 700 1350 --batch 16 --query-heads --few --profile $OUT/s8.json --plan $OUT/plan8.json --out $HOME/s8.csv $C
 OUT=$HOME go flips python3 .gpu/run/flips.py) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 go q32 python3 $F "per head;window or everything;streaming" --model qwen --length 32768 --rows 1600 --each 2 --texts 4 --batch 2 --query-heads --few --profile $OUT/q32.json --plan $OUT/plan32.json --out $HOME/q32.csv $C) &
wait
cat $OUT/done.txt; cat $HOME/*.csv > $OUT/all.csv
for f in $HOME/*.log; do echo "== $f"; tr '\r' '\n' < $f | grep -v "^ *$" | grep -v "━" | tail -n 22 | cut -c1-200; done | tee $OUT/logs.txt
