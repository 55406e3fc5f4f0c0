# FIRST of the next session: argument: seconds. Pieces 00-10 in ~/m. Plans by query head of Qwen with questions three times the texts; caches
# by questions that read them. Profiles are of each sample now (plans.py --profile).
set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; X=examples/bench/caching.py; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
for i in $(seq 60); do pgrep -f encoders.py > /dev/null || break; sleep 1; done; tail -30 $HOME/enc/enc.log | cut -c1-170; mkdir -p $OUT/enc; tar -C $HOME -cf $OUT/enc/enc.tar enc
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; tail -c +491400065 $HOME/all > $HOME/smol.gguf; sha256sum $HOME/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/qwen.gguf EXPRESS_SMOLLM2=$HOME/smol.gguf
O='per head'; W='window or everything'; W1='one window or everything'; F="$O;$W"
plan() { name=$1; shift; go $name 590 python3 .gpu/run/few8.py "$F" --few --profile $R/$name.profile.json --plan $R/$name.plan.json --out $R/$name.csv $C --texts 4 "$@"; }
Q="--model qwen --rows 1600 --each 3 --query-heads --questions 3"
(export TRITON_CACHE_DIR=$HOME/tc0; plan q32 $Q --length 32768 --batch 4) &
(export TRITON_CACHE_DIR=$HOME/tc1; plan q16 $Q --length 16384) &
(export TRITON_CACHE_DIR=$HOME/tc2
 go scache 590 python3 $X --rows 1984 1024 --each 5 --questions 9 --profile $R/sc.json --out $R/scache.csv $C --methods "$O" "$W1" "$W" "without everything"
 go sselected 590 python3 $X --part selected --rows 1024 --piece 4 --new 128 --questions 9 --profile $R/sc.json --out $R/sselected.csv $C --methods "$O") &
(export TRITON_CACHE_DIR=$HOME/tc3
 go qcache 590 python3 $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --questions 9 --profile $R/qc.json --out $R/qcache.csv $C --methods "$O" "$W1" "$W" "without everything") &
wait
cat $OUT/done.txt; gzip -f $R/*.json; tar -C $R -cf $OUT/rows.tar .
for f in q16 q32 scache sselected qcache; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error|^profile" | cut -c1-300; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
