# FIRST of the next session: argument: seconds. Pieces 00-10 in ~/m. Six plans by six samples (texts, and haystacks with questions).
set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"; END=$(( $(date +%s) + $1 )); R=$HOME/rows; mkdir -p $R $HOME/logs
left() { echo $(( END - $(date +%s) )); }
go() { name=$1; l=$(left); m=$2; shift 2; [ $l -lt 8 ] && { echo "$name: no time" >> $OUT/done.txt; return; }
  [ $l -gt $m ] && l=$m; s=$(date +%s); timeout $l "$@" > $HOME/logs/$name.log 2>&1; echo "$name rc $? $(( $(date +%s) - s )) s" >> $OUT/done.txt; }
cat $HOME/m/piece_* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; tail -c +491400065 $HOME/all > $HOME/smol.gguf; sha256sum $HOME/*.gguf | cut -c1-16
export EXPRESS_QWEN=$HOME/qwen.gguf EXPRESS_SMOLLM2=$HOME/smol.gguf
F="per head;window or everything"
plan() { name=$1; shift; go $name 590 python3 .gpu/run/few8.py "$F" --few --profile $R/$name.profile.json --plan $R/$name.plan.json --out $R/$name.csv $C --texts 4 "$@"; }
Q="--model qwen --rows 1600 --each 3"; S="--rows 700 1350 --each 4 --batch 16"
(export TRITON_CACHE_DIR=$HOME/tc0; plan q32 $Q --length 32768 --query-heads --batch 4) &
(export TRITON_CACHE_DIR=$HOME/tc2; plan k32 $Q --length 32768 --batch 4) &
(export TRITON_CACHE_DIR=$HOME/tc1; plan q16 $Q --length 16384 --query-heads; plan k16 $Q --length 16384) &
(export TRITON_CACHE_DIR=$HOME/tc3; plan sk $S; plan sq $S --query-heads) &
wait
cat $OUT/done.txt; gzip -f $R/*.profile.json; tar -C $R -cf $OUT/rows.tar .
for f in q16 q32 k16 k32 sk sq; do echo "== $f"; tr '\r' '\n' < $HOME/logs/$f.log | grep -E "^┃|^│|Error|^MISSED|^profile" | cut -c1-500; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 6000 $f | tr '\r' '\n'; done > $OUT/logs.txt
