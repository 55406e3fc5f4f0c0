set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1
C="--commit $(cat .gpu/run/commit)"
timeout $1 python3 examples/bench/decoding.py --parts whole --shapes 1x131072 8x32768 --methods exact cache planned --out $OUT/whole.csv $C > $OUT/whole.log 2>&1; echo rc $?
cut -d, -f6-9,18-23 $OUT/whole.csv | cut -c1-260
