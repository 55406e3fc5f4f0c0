set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; mkdir -p $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; most=$2; l=$(left); [ $l -lt $most ] && most=$l; shift 2; [ $most -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $most "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 mkdir -p $HOME/q; O=$OUT; (OUT=$HOME/q bash .gpu/qbench/go.sh > $HOME/logs/qbench.log 2>&1); cat $HOME/q/*.csv > $O/qbench.csv; echo "qbench" >> $O/done.txt) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1 TORCHINDUCTOR_CACHE_DIR=$HOME/ti1
 go heads 60 python3 -m pytest tests/gpu/test_cuda_graphs.py tests/gpu/test_heads.py -n 8 -q -rf --tb=short -p no:benchmark
 go graphs 70 python3 .gpu/graphs/go.py
 go ncu 100 bash .gpu/sanitize/ncu.sh $(cat .gpu/run/commit)) &
wait
cat $OUT/done.txt; tail -20 $HOME/logs/qbench.log | cut -c1-190; tail -22 $HOME/logs/heads.log | cut -c1-150; tail -22 $HOME/logs/graphs.log | cut -c1-170; tail -26 $HOME/logs/ncu.log | cut -c1-200
for f in $HOME/logs/{qbench,heads,graphs,ncu}.log $HOME/q/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
