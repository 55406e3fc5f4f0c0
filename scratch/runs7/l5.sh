set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); X=examples/bench/caching.py; R=$HOME/rows; mkdir -p $R $HOME/logs; cp .gpu/run/prof/* $R/
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); shift; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; tail -c +491400065 $HOME/all > $HOME/smol.gguf
sha256sum $HOME/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/qwen.gguf EXPRESS_SMOLLM2=$HOME/smol.gguf
O='per head' ; W='window or everything'; W1='one window or everything'; F="per head;window or everything"; FQ="$F;streaming;streaming, last exact"; FX="$FQ;express;selected, last exact"
plan() { name=$1; names=$2; shift 2; go $name python3 .gpu/run/few.py "$names" --few --profile $R/$name.profile.json --plan $R/$name.plan.json --out $R/$name.csv $C "$@"; }
(export TRITON_CACHE_DIR=$HOME/tc0
 plan q32 "$FX" --model qwen --length 32768 --rows 1600 --query-heads --each 3 --texts 4 --batch 4
 plan q16 "$F" --model qwen --length 16384 --rows 1600 --query-heads --each 3 --texts 4) &
(export TRITON_CACHE_DIR=$HOME/tc1
 plan k32 "$F" --model qwen --length 32768 --rows 1600 --each 3 --texts 4 --batch 4
 plan k16 "$F" --model qwen --length 16384 --rows 1600 --each 3 --texts 4
 go scache python3 $X --rows 1984 1024 --each 5 --profile $R/sc.json --out $R/scache.csv $C --methods "$O" "$W1" "$W" "without everything"
 go sselected python3 $X --part selected --rows 1024 --piece 4 --new 128 --profile $R/sc.json --out $R/sselected.csv $C --methods "$O") &
(export TRITON_CACHE_DIR=$HOME/tc2
 plan sk "$F" --rows 700 1350 --each 4 --batch 16
 plan sq "$F" --rows 700 1350 --query-heads --each 4 --batch 16
 go qcache python3 $X --model qwen --length 16384 --rows 4032 1024 --piece 8 --profile $R/qc.json --out $R/qcache.csv $C --methods "$O" "$W1" "$W" "without everything"
 go qselected python3 $X --model qwen --length 16384 --part selected --rows 1024 --piece 4 --new 128 --profile $R/qc.json --out $R/qselected.csv $C --methods "$O") &
wait
cat $OUT/done.txt; rm -f $R/*.profile.json; tar -C $R -czf $OUT/rows.tgz .
for f in q16 q32 k16 k32 sk sq qcache scache sselected qselected; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error" | cut -c1-128; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
