set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); B=examples/bench; mkdir -p $HOME/logs $HOME/tc0 $HOME/tc1
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/m/all; head -c 491400064 $HOME/m/all > $HOME/m/qwen.gguf; tail -c +491400065 $HOME/m/all > $HOME/m/smol.gguf
export EXPRESS_QWEN=$HOME/m/qwen.gguf EXPRESS_SMOLLM2=$HOME/m/smol.gguf
san() { t=$1; shift; for g in $*; do l=$(left); [ $l -gt 20 ] || break; go ${t}_$g python3 tests/gpu/sanitized.py --tool $t --limit $(( l - 6 )) $g; done; }
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 go explore4 python3 .gpu/run/explore4.py --profile .gpu/run/q16.json --limit 120 --save $HOME/p
 go hostnew python3 .gpu/host2/go.py $PWD
 export PYTHONPATH=.gpu/old; go hostold python3 .gpu/host2/go.py .gpu/old) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 (san memcheck express hopper attend cache; san racecheck express attend thinformer) &
 (san memcheck heads decode santa thinformer sparse select; san racecheck cache decode santa) & 
 sleep 60; (san racecheck select heads hopper sparse) & wait) &
wait
cat $OUT/done.txt; tail -70 $HOME/logs/explore4.log | cut -c1-230
for t in hostnew hostold; do echo "== $t"; grep -E "^(host|device|dense|parts)|Error" $HOME/logs/$t.log | sort -u | cut -c1-130; done
for f in $HOME/logs/{memcheck,racecheck}_*; do grep -HE "^----|WRONG|FAILED|NEVER|not found" $f | grep -v planted | sed 's,/root/logs/,,' | cut -c1-160 | head -4; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 4000 $f | tr '\r' '\n'; done > $OUT/logs.txt; cp $HOME/p-*.json $OUT/ 2>/dev/null
