set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; P=examples/plans/qwen2.5-coder-0.5b; mkdir -p $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go hostnew python3 .gpu/host2/go.py $PWD
 export PYTHONPATH=.gpu/old; go hostold python3 .gpu/host2/go.py .gpu/old
 export PYTHONPATH=$PWD
 go mixed python3 $B/benchmark.py --mixed --plan $P-query-heads.json $P.json --lengths 131072 --repeats 3 --out $HOME/mixed.csv $C) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 mkdir -p $OUT/s; s=$(date +%s); OO=$OUT; OUT=$HOME/s; mkdir -p $OUT; bash .gpu/sanitize/sanitize.sh none 110 > $HOME/logs/none.log 2>&1; OUT=$OO; echo "none $(( $(date +%s) - s )) s" >> $OUT/done.txt
 for g in select cache express heads hopper; do l=$(( $(left) - 4 )); [ $l -gt 15 ] || break; s=$(date +%s); timeout $l python3 tests/gpu/sanitized.py --tool memcheck --limit $(( l - 5 )) $g > $HOME/logs/mem_$g.log 2>&1; echo "memcheck $g rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; done) &
wait
cat $OUT/done.txt; for t in hostnew hostold; do grep -E "^(host|device|dense)|Error" $HOME/logs/$t.log | sort -u | cut -c1-130; done; cp $HOME/mixed.csv $OUT/
tail -20 $HOME/logs/mixed.log | cut -c1-190; tail -20 $HOME/logs/none.log | cut -c1-250; for f in $HOME/logs/mem_*; do echo $f; grep -E "^----|WRONG|FAILED|NEVER|launched$|not found|rror" $f | cut -c1-200 | head; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 5000 $f | tr '\r' '\n'; done > $OUT/logs.txt
