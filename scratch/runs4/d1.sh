set -u
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=190 PYTHONUNBUFFERED=1; C="--commit $(cat .gpu/run/commit)"; mkdir -p $HOME/logs
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0 TORCHINDUCTOR_CACHE_DIR=$HOME/ti0
timeout $1 python3 examples/bench/decoding.py --parts whole --shapes 8x32768 --methods exact selected cache --steps 200 --out $HOME/whole8.csv $C > $HOME/logs/whole8.log 2>&1; echo "rc $?") &
wait
cp $HOME/whole8.csv $OUT/; tail -n 12 $HOME/logs/whole8.log | cut -c1-190; cut -d, -f7,8,9,13,18,19,20,22,23 $HOME/whole8.csv | cut -c1-190
