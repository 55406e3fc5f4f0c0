set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
cat $HOME/m/piece_0* > $HOME/all; head -c 491400064 $HOME/all > $HOME/qwen.gguf; sha256sum $HOME/qwen.gguf | cut -c1-16; export EXPRESS_QWEN=$HOME/qwen.gguf
P=.gpu/run/prof
(TRITON_CACHE_DIR=$HOME/tc0 timeout $1 python3 .gpu/run/explore11.py --length 32768 --judge 12 --late $P/q32.late.profile.json.gz --both $P/q32.both.json.gz --profiles $HOME/p0 --variants .5 .75 .9 --judged .75 .9 .5 --batch 4 --limit 110 --out $OUT/e32.txt > $OUT/q32.log 2>&1) &
(TRITON_CACHE_DIR=$HOME/tc1 timeout $1 python3 .gpu/run/explore11.py --length 16384 --judge 21 --late $P/q16.late.profile.json.gz --both $P/q16.both.json.gz --profiles $HOME/p1 --variants .5 .75 .9 --judged .75 .9 .5 --limit 120 --out $OUT/e16.txt > $OUT/q16.log 2>&1) &
wait
for f in q16 q32; do echo == $f; grep -vE "it/s|^late" $OUT/$f.log | cut -c1-500 | tail -20; done
