# two GPUs of one host, nothing beside: tests/gpu but registers and packages in two halves. $1: seconds
export PYTHONPATH=. COLUMNS=150
A="test_cache test_pages test_blocks test_prepared test_heads test_decode test_cuda_graphs test_segments test_due test_express test_contest test_chunks"
one() { export CUDA_VISIBLE_DEVICES=$1 TRITON_CACHE_DIR=$HOME/tc$1; shift; timeout $T python3 -m pytest "$@" -n 15 -vv -rfs --durations=5 --tb=short -p no:benchmark -p no:cacheprovider; }
T=$1; F0=""; F1=""
for f in tests/gpu/test_*.py; do b=$(basename $f .py); case $b in test_registers|test_packages) continue;; esac; case " $A " in *" $b "*) F0="$F0 $f";; *) F1="$F1 $f";; esac; done
(one 0 $F0 > $OUT/t0.txt 2>&1) & (one 1 $F1 > $OUT/t1.txt 2>&1) & wait
for f in $OUT/t0.txt $OUT/t1.txt; do echo "== $f"; grep -E "^FAILED|^ERROR|^E  |^SKIPPED|passed|failed|s (call|setup) " $f | cut -c1-240 | head -40; grep -cE "PASSED" $f; done
