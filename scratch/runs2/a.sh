set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=150 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; shift; l=$(left); [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
rm -f $HOME/*.csv $HOME/*.log
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0 TORCHINDUCTOR_CACHE_DIR=$HOME/ti0
 go whole1 python3 $B/decoding.py --parts whole --shapes 1x131072 --methods exact selected cache --steps 200 --out $HOME/whole1.csv $C
 go whole8 python3 $B/decoding.py --parts whole --shapes 8x32768 --methods exact selected --steps 200 --out $HOME/whole8.csv $C) &
(export CUDA_VISIBLE_DEVICES=1
 tar -xJf .gpu/t39/t39_00 -C $HOME; find $HOME/t39/triton/backends/nvidia/bin -type f -exec chmod +x {} +
 sed -i 's/^VERSIONS = ("3.6.",)/VERSIONS = ("3.6.", "3.9.")/' kernels/attend/hopper.py
 mkdir -p $HOME/v; O=$OUT; OUT=$HOME/v; export OUT; l=$(left); timeout $l bash .gpu/tri/run.sh "$(cat .gpu/run/commit)" > $HOME/versions.log 2>&1; echo "versions rc $?" >> $O/done.txt) &
wait
cat $OUT/done.txt; tail -45 $HOME/versions.log | cut -c1-170
for f in whole1 whole8; do [ -f $HOME/$f.csv ] && cut -d, -f6,7,8,9,13,18,19,20,22,23 $HOME/$f.csv | cut -c1-170; done
cat $HOME/*.csv > $OUT/all.csv; cp $HOME/v/*.csv $OUT/ ; for f in $HOME/*.log $HOME/v/*.log; do echo "== $f"; tail -n 80 $f | tr '\r' '\n'; done > $OUT/logs.txt
grep -E "Error|error:" $HOME/whole*.log | cut -c1-250 | head -5
