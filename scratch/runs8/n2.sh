set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; B=examples/bench; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; sha256sum $HOME/qwen.gguf | cut -c1-16; export EXPRESS_QWEN=$HOME/qwen.gguf
export TRITON_CACHE_DIR=$HOME/tc1
mkdir -p $OUT/enc; go encoders 60 python3 $B/encoders.py speed --out $OUT/enc $C
judged() { name=$1; shift; if grep -q "PICKED base" $HOME/logs/$name.log || [ ! -f $R/$name.json ]; then return; fi
  go $name-judged 200 python3 .gpu/run/few8.py "per head" --few --profile $R/$name.json --plan $R/$name.plan.json --out $R/$name.csv $C --rows 1600 --each 3 --texts 4 --query-heads --model qwen "$@"; }
(export TRITON_CACHE_DIR=$HOME/tc0
 go q32 280 python3 .gpu/run/explore9.py --length 32768 --profile .gpu/run/prof/q32.profile.json.gz --cases 3 --judge 12 --limit 210 --variants base N.5 T.5 --pick $R/q32.json --save $R/q32.D.json
 judged q32 --length 32768 --batch 4) &
(go q16 260 python3 .gpu/run/explore9.py --length 16384 --profile .gpu/run/prof/q16.profile.json.gz --cases 6 --judge 24 --limit 200 --variants base N.5 T.5 N.9 --pick $R/q16.json --save $R/q16.D.json
 judged q16 --length 16384) &
wait
cat $OUT/done.txt; tar -C $R -czf $OUT/rows.tgz .
for f in q16 q32; do echo "== $f"; grep -E "^N|^T|^share|found|PICKED|Error|cut" $HOME/logs/$f.log | cut -c1-1400; done
for f in q16-judged q32-judged; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log 2>/dev/null| grep -E "^┃|^│|Error|^MISSED" | tail -5| cut -c1-700; done
tail -16 $HOME/logs/encoders.log | cut -c1-170
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
