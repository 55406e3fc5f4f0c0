# two GPUs of one host, nothing beside: the whole of tests/gpu in two halves. $1: seconds
export PYTHONPATH=. COLUMNS=150
A="test_express test_heads test_thinformer test_cache test_packages test_blocks test_chunks test_contest test_pages test_registers"
one() { export CUDA_VISIBLE_DEVICES=$1 TRITON_CACHE_DIR=$HOME/tc$1; shift; timeout $T python3 -m pytest "$@" -n 15 -vv -rfs --durations=6 --tb=short -p no:benchmark -p no:cacheprovider; }
T=$1; F0=""; F1=""
for f in tests/gpu/test_*.py; do b=$(basename $f .py); case " $A " in *" $b "*) F0="$F0 $f";; *) F1="$F1 $f";; esac; done
(one 0 $F0 > $OUT/t0.txt 2>&1) & (one 1 $F1 > $OUT/t1.txt 2>&1) & wait
for f in $OUT/t0.txt $OUT/t1.txt; do echo "== $f"; grep -E "^FAILED|^ERROR|^E  |^SKIPPED|passed|failed|s (call|setup) " $f | cut -c1-220 | head -30; grep -cE "PASSED" $f; done
