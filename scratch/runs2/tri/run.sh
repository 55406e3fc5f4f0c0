# bash .gpu/tri/run.sh COMMIT: the same calls with Triton 3.6 of this machine and 3.9 of ~/t39, checked, then timed.
# $OUT: triton.csv (format of speed.csv), logs; bodies39.csv and plain39.csv (no prepared
# calls, no kernel for Hopper) only where 3.9 failed.
export PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1 COLUMNS=150 commit=$1 EXTRA=${EXTRA:-}
old() { PYTHONPATH=. TRITON_CACHE_DIR=/tmp/c36 "$@"; }
new() { PYTHONPATH=$HOME/t39:. TRITON_CACHE_DIR=/tmp/c39 "$@"; }
bench() { timeout 150 python3 examples/bench/benchmark.py --versions --commit "$commit" $EXTRA "$@"; }
said() { echo "== $SECONDS s: $*"; }
new python3 -c 'import triton, torch; print("torch", torch.__version__, "triton", triton.__version__, triton.__file__)
from triton.runtime.driver import driver; print(driver.active.get_current_target())
import triton; from express_compile.kernels.attend import hopper as h; assert h.gluon is not None and h.triton.__version__.startswith(h.VERSIONS)
import sys; print([x for x in sys.modules if x.startswith("torch._inductor.codegen")] or "no code of inductor")' \
  >"$OUT/look.log" 2>&1 || { tail -n 25 "$OUT/look.log"; [ -n "$EXTRA" ] || exit 1; }
grep -v -i "leaked\|nanobind\|skipped rem" "$OUT/look.log" | head -12
said "compiling with both, and tests with 3.9"
(new bench --repeats 1 >"$OUT/warm39.log" 2>&1) & a=$!
(old bench --repeats 1 >"$OUT/warm36.log" 2>&1) & b=$!
(new timeout 120 python3 -m pytest tests/gpu/test_segments.py tests/gpu/test_blocks.py -q -rf -n 6 -p no:cacheprovider \
  -k "hopper or programs_with or any" >"$OUT/test39.log" 2>&1) & c=$!
wait $a; x=$?; wait $b; y=$?; said "compiled: 3.9 ended with $x, 3.6 with $y"
wait $c; said "tests with 3.9 ended with $?"; grep -E "passed|failed|skipped|FAILED|^E  " "$OUT/test39.log" | head -20
old bench --repeats 15 --out "$OUT/triton.csv" >"$OUT/time36.log" 2>&1; said "timed 3.6: $?"
new bench --repeats 15 --out "$OUT/triton.csv" >"$OUT/time39.log" 2>&1; z=$?; said "timed 3.9: $z"
if [ $z != 0 ]; then
  grep -v -i "leaked\|nanobind" "$OUT/time39.log" | tail -n 12
  EXPRESS_PREPARED=0 new bench --repeats 15 --out "$OUT/bodies39.csv" >"$OUT/bodies39.log" 2>&1; said "3.9, no code: $?"
  python3 .gpu/tri/table.py "$OUT/bodies39.csv"
  new timeout 150 python3 -c 'import runpy, sys; from express_compile.kernels.attend import hopper
hopper.takes = lambda *_: False; sys.argv = sys.argv[1:]; sys.path.insert(0, "examples/bench")
runpy.run_path(sys.argv[0], run_name="__main__")' examples/bench/benchmark.py --versions --commit "$commit" \
    --out "$OUT/plain39.csv" >"$OUT/plain39.log" 2>&1; said "3.9 without the kernel for Hopper: $?"
  python3 .gpu/tri/table.py "$OUT/plain39.csv"
fi
python3 .gpu/tri/table.py "$OUT/triton.csv"
