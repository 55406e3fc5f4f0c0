set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=160 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
[ -f $HOME/m/qwen.gguf ] || cat $HOME/m/piece_* | head -c 491400064 > $HOME/m/qwen.gguf
export EXPRESS_QWEN=$HOME/m/qwen.gguf
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0 TORCHINDUCTOR_CACHE_DIR=$HOME/ti0
 go norms python3 .gpu/run/explore2.py --norms --save $OUT/n --only '^(streaming last|A|W|relative.*|. 1.25x rows)$' --out $OUT/norms.txt
 go whole1 python3 $B/decoding.py --parts whole --shapes 1x32768 --methods exact selected cache --steps 200 --out $HOME/whole1.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1 TORCHINDUCTOR_CACHE_DIR=$HOME/ti1
 go file python3 .gpu/run/explore2.py --profile .gpu/run/q16.json --only 'third|approximate|alike|no ' --out $OUT/file.txt
 go whole8 python3 $B/decoding.py --parts whole --shapes 8x32768 --methods exact selected cache --steps 200 --out $HOME/whole8.csv $C) &
wait
cat $OUT/done.txt; cat $HOME/*.csv > $OUT/all.csv; tail -n 26 $HOME/file.log | cut -c1-190; tail -n 14 $HOME/norms.log | cut -c1-190
for f in whole1 whole8; do [ -f $HOME/$f.csv ] && tail -n +2 $HOME/$f.csv | cut -d, -f7,8,9,13,18,19,20,22,23 | cut -c1-190; done
for f in $HOME/*.log; do echo "== $f"; tail -n 80 $f | tr '\r' '\n'; done > $OUT/logs.txt
grep -hE "Error|error:" $HOME/*.log | cut -c1-250 | head -5
