# From the root of a tree with h/planned merged: bash .gpu/planned/go.sh [check] [host] [whole]; all three by default.
export PYTHONPATH=. OMP_NUM_THREADS=4; O=${OUT:-/tmp}; W=" ${*:-check host whole} "
case $W in *" check "*) python -m pytest tests/gpu/test_cache.py -q -x -p no:cacheprovider 2>&1 | tail -12; [ ${PIPESTATUS[0]} = 0 ] || exit 1;; esac
case $W in *" host "*) python .gpu/planned/host.py --shapes 1x32768 1x131072 --methods planned --steps 300 > $O/host.txt 2>&1; grep -v Warning $O/host.txt | tail -42 | cut -c1-330;; esac
case $W in *" whole "*) python examples/bench/decoding.py --parts whole --shapes 1x32768 1x131072 --methods exact cache planned --steps 300 --out $O/speed.csv > $O/whole.txt 2>&1 || tail -5 $O/whole.txt
python - $O/speed.csv <<'P'
import csv, sys
for r in csv.DictReader(open(sys.argv[1])):
    print(r["method"], r["Lk"], "p20 %.2f p50 %.2f p80 %.2f" % tuple(float(r[f"ms_{x}"]) for x in ("p20", "p50", "p80")), r["params"])
P
;; esac
