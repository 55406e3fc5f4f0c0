set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
END=$(( $(date +%s) + $1 )); R=$HOME/rows; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
sha256sum $HOME/m/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
X=.gpu/run/explore7.py; W=${2:-260}
(export TRITON_CACHE_DIR=$HOME/tc0
 go q16 python3 $X --heads 1 --rows 1600 --texts 21 --limit $W --save $R/q16 --out $R/q16.txt
 go sq python3 $X --model smollm2 --length 8192 --heads 1 --only-profile 1 --save $R/sq) &
(export TRITON_CACHE_DIR=$HOME/tc1
 go sk python3 $X --model smollm2 --length 8192 --heads 0 --rows 700 1350 --texts 30 --limit $W --save $R/sk --out $R/sk.txt
 go k32 python3 $X --length 32768 --heads 0 --only-profile 1 --save $R/k32) &
(export TRITON_CACHE_DIR=$HOME/tc2
 go k16 python3 $X --heads 0 --rows 1600 --texts 21 --limit $W --save $R/k16 --out $R/k16.txt
 go q32 python3 $X --length 32768 --heads 1 --only-profile 1 --save $R/q32) &
wait
cat $OUT/done.txt; tar -C $R -czf $OUT/rows.tgz .
for f in q16 k16 sk sq k32 q32; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^profile|KL|exact finds|Error" | cut -c1-190; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 20000 $f | tr '\r' '\n'; done > $OUT/logs.txt
