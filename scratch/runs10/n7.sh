set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; X=examples/bench/caching.py; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
for i in $(seq 45); do grep -q done $HOME/bg/bg.txt && break; sleep 1; done
cat $HOME/bg/bg.txt; grep -E "^│|^┃|Error" $HOME/bg/cache.log | cut -c1-170; 
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; tail -c +491400065 $HOME/all > $HOME/smol.gguf; sha256sum $HOME/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/qwen.gguf EXPRESS_SMOLLM2=$HOME/smol.gguf
for x in sc qc; do zcat .gpu/prof/$x.json.gz > $R/$x.json; cp $R/$x.json $R/$x.2.json; done
O='per head'; W='window or everything'; W1='one window or everything'; F=27
(export TRITON_CACHE_DIR=$HOME/tc0
 go scache 590 python3 $X --rows 1984 1024 --each 5 --questions $F --profile $R/sc.json --out $R/scache.csv $C --methods "$O" "$W1" "$W" "without everything" "$O, prompt") &
(export TRITON_CACHE_DIR=$HOME/tc1
 go qcache 590 python3 $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --questions $F --profile $R/qc.json --out $R/qcache.csv $C --methods "$O" "$W1" "$W" "without everything" "$O, prompt") &
(export TRITON_CACHE_DIR=$HOME/tc2
 go sselected 590 python3 $X --part selected --rows 1024 --piece 4 --new 128 --questions $F --profile $R/sc.2.json --out $R/sselected.csv $C --methods "$O" "$W" "$W1"
 go slong 590 python3 $X --part long --length 6144 --new 4096 --rows 1024 --piece 32 --questions $F --profile $R/sc.2.json --out $R/slong.csv $C --methods "$O" "without everything") &
(export TRITON_CACHE_DIR=$HOME/tc3
 go qselected 590 python3 $X --model qwen --length 16384 --part selected --rows 1024 --piece 4 --new 128 --questions $F --profile $R/qc.2.json --out $R/qselected.csv $C --methods "$O" "$W" "$W1"
 go qlong 590 python3 $X --model qwen --part long --length 12288 --new 4096 --rows 1024 --piece 32 --questions $F --profile $R/qc.2.json --out $R/qlong.csv $C --methods "$O" "without everything") &
wait
tail -3 $HOME/bg/tests.log | cut -c1-200; tar -C $HOME -cf $OUT/bg.tar bg
cat $OUT/done.txt; rm $R/*.json; tar -C $R -cf $OUT/rows.tar .
for f in scache sselected qcache qselected slong qlong; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error" | cut -c1-200; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
