# two streams of work on two GPUs of one host; $1: seconds in all
set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site EXPRESS_SMOLLM2=$HOME/m/smol.gguf HF_HUB_OFFLINE=1 COLUMNS=150
L=$OUT; C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; most=$2; shift 2; l=$(left); [ $l -lt $most ] && most=$l; [ $most -lt 5 ] && { echo "$name: no time" >> $L/done.txt; return; }
  s=$(date +%s); timeout $most "$@" > $HOME/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $L/done.txt; }
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go tests 95 python3 -m pytest tests/gpu/test_heads.py tests/gpu/test_prepared.py tests/gpu/test_cache.py tests/gpu/test_pages.py tests/gpu/test_sparse.py -n 12 -rf --tb=short -vv -p no:benchmark -p no:cacheprovider
 EXPRESS_PREPARED=0 go mixed-streams 80 python3 $B/benchmark.py --mixed --plan examples/plans/qwen2.5-coder-0.5b.json --lengths 32768 131072 --repeats 5 --out $HOME/streams.csv $C
 go mixed 60 python3 $B/benchmark.py --mixed --plan examples/plans/qwen2.5-coder-0.5b.json --lengths 32768 131072 --repeats 5 --out $HOME/mixed.csv $C
 go ttft 110 python3 $B/first_token.py --plan examples/plans/qwen2.5-coder-0.5b.json --lengths 131072 --repeats 1 --out $HOME/ttft.csv $C
 go host 60 python3 .gpu/memory/host.py) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 go whole1 110 python3 $B/decoding.py --parts whole --shapes 1x32768 1x131072 --methods exact selected planned --steps 300 --out $HOME/whole1.csv $C
 go whole8 90 python3 $B/decoding.py --parts whole --shapes 8x32768 --steps 300 --out $HOME/whole8.csv $C
 mkdir -p $HOME/t39v; OUT=$HOME/t39v go versions 110 bash .gpu/tri/run.sh $(cat .gpu/run/commit)
 go kinds 130 python3 .gpu/run/kinds.py --limit $(( $(left) - 12 )) --out $HOME/kinds.txt) &
wait
cat $L/done.txt; grep -E "FAILED|^E  |passed|failed" $HOME/tests.log | head -20 | cut -c1-180
for f in streams mixed ttft whole1 whole8; do [ -f $HOME/$f.csv ] && { echo "# $f" >> $OUT/all.csv; cat $HOME/$f.csv >> $OUT/all.csv; }; done
cp $HOME/t39v/triton.csv $OUT/ 2>/dev/null; for f in $HOME/*.log $HOME/kinds.txt $HOME/t39v/*.log; do echo "== $f"; tail -n 60 $f | tr '\r' '\n'; done > $OUT/logs.txt
tail -25 $HOME/versions.log | cut -c1-170; tail -14 $HOME/kinds.log | cut -c1-190; tail -22 $HOME/host.log | cut -c1-140
cut -d, -f6,7,8,9,13,15,21,23-26 $OUT/all.csv | cut -c1-200
