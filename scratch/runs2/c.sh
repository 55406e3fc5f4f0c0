set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=150 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; most=$2; shift 2; l=$(left); [ $l -lt $most ] && most=$l; [ $most -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $most "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
rm -f $HOME/*.csv $HOME/*.log; cat $HOME/m/piece_* | head -c 491400064 > $HOME/m/qwen.gguf; sha256sum $HOME/m/qwen.gguf | cut -c1-16
(export CUDA_VISIBLE_DEVICES=0
 tar -xJf .gpu/t39/t39_00 -C $HOME; find $HOME/t39/triton/backends/nvidia/bin -type f -exec chmod +x {} +
 cp -r . $HOME/r39; cd $HOME/r39; sed -i 's/^VERSIONS = ("3.6.",)/VERSIONS = ("3.6.", "3.9.")/' kernels/attend/hopper.py
 mkdir -p $HOME/v; (export OUT=$HOME/v; timeout 150 bash .gpu/tri/run.sh "$(cat .gpu/run/commit)" > $HOME/versions.log 2>&1); cd - >/dev/null; echo "versions $(left) left" >> $OUT/done.txt
 export PYTHONPATH=$PWD:$PWD/.gpu/site EXPRESS_QWEN=$HOME/m/qwen.gguf TRITON_CACHE_DIR=$HOME/tcq
 go qwen 400 python3 .gpu/run/expanded.py --model qwen --length 16384 --rows 1600 --each 2 --texts 4 --batch 4 --few --out $HOME/qwen.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 go mixed 60 python3 $B/benchmark.py --mixed --plan examples/plans/qwen2.5-coder-0.5b.json --lengths 32768 131072 --repeats 5 --out $HOME/mixed.csv $C
 go whole1 230 python3 $B/decoding.py --parts whole --shapes 1x131072 --methods exact selected cache planned --steps 300 --out $HOME/whole1.csv $C
 go whole8 200 python3 $B/decoding.py --parts whole --shapes 8x32768 --methods exact selected --steps 200 --out $HOME/whole8.csv $C) &
wait
cat $OUT/done.txt; tail -34 $HOME/versions.log | cut -c1-150; tail -25 $HOME/qwen.log | tr '\r' '\n' | grep -v "^$" | tail -18 | cut -c1-170
for f in mixed whole1 whole8; do [ -f $HOME/$f.csv ] && tail -n +2 $HOME/$f.csv | cut -d, -f7,8,9,13,18,19,20,22,23 | cut -c1-190; done
cat $HOME/*.csv > $OUT/all.csv; cp $HOME/v/*.csv $OUT/ ; for f in $HOME/*.log $HOME/v/*.log; do echo "== $f"; tail -n 80 $f | tr '\r' '\n'; done > $OUT/logs.txt
grep -E "Error|error:" $HOME/*.log | cut -c1-250 | head -5
