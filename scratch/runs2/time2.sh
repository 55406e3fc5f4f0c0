# two GPUs of one host, one timed program on each; $1: seconds in all
set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=150 PYTHONUNBUFFERED=1
L=$OUT; C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; P=examples/plans/qwen2.5-coder-0.5b.json
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; most=$2; shift 2; l=$(left); [ $l -lt $most ] && most=$l; [ $most -lt 5 ] && { echo "$name: no time" >> $L/done.txt; return; }
  s=$(date +%s); timeout $most "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $L/done.txt; }
rm -f $HOME/*.csv $HOME/*.log
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go whole1 140 python3 $B/decoding.py --parts whole --shapes 1x32768 1x131072 --methods exact selected planned --steps 300 --out $HOME/whole1.csv $C
 go whole8 240 python3 $B/decoding.py --parts whole --shapes 8x32768 --steps 300 --out $HOME/whole8.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 go host 60 python3 .gpu/memory/host.py
 go mixed 90 python3 $B/benchmark.py --mixed --plan $P --lengths 32768 131072 --repeats 5 --out $HOME/mixed.csv $C
 go calibrate 130 python3 -m express_compile calibrate --out $OUT/rates.json
 go mixed5 120 python3 $B/benchmark.py --mixed --plan $P --lengths 524288 --repeats 2 --out $HOME/mixed5.csv $C) &
wait
cat $L/done.txt
for f in whole1 whole8 mixed mixed5; do [ -f $HOME/$f.csv ] && { echo "# $f"; cat $HOME/$f.csv; } >> $OUT/all.csv; done
for f in $HOME/*.log; do echo "== $f"; tail -n 80 $f | tr '\r' '\n'; done > $OUT/logs.txt
cp ~/.cache/express_compile/* $OUT/ 2>/dev/null; tail -24 $HOME/host.log | cut -c1-140; tail -12 $HOME/calibrate.log | cut -c1-200
grep -iE "error" $HOME/*.log | cut -c1-200 | head; cut -d, -f6,7,8,9,13,15,21,23-26 $OUT/all.csv | cut -c1-170
