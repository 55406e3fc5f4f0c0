set -u
# $1 seconds: tests of both halves, then host and device times on GPU 0 and racecheck on GPU 1
END=$(( $(date +%s) + $1 )); export COMMIT=$(cat .gpu/run/commit)
bash .gpu/run/tests3.sh 190
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1; mkdir -p $HOME/logs; B=examples/bench; P=examples/plans/qwen2.5-coder-0.5b
left() { echo $(( END - $(date +%s) )); }
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0
 timeout $(left) python3 .gpu/host2/go.py $PWD > $HOME/logs/hostnew.log 2>&1
 timeout $(left) python3 $B/benchmark.py --mixed --plan $P-query-heads.json $P.json --lengths 32768 131072 --repeats 3 --out $HOME/mixed.csv --commit $COMMIT > $HOME/logs/mixed.log 2>&1) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1
 for t in memcheck; do for g in sparse; do timeout $(left) python3 tests/gpu/sanitized.py --tool $t --limit $(( $(left) - 6 )) $g > $HOME/logs/${t}_$g.log 2>&1; done; done
 for g in express decode cache santa; do [ $(left) -gt 20 ] && timeout $(left) python3 tests/gpu/sanitized.py --tool racecheck --limit $(( $(left) - 6 )) $g > $HOME/logs/racecheck_$g.log 2>&1; done) &
wait
cp $HOME/mixed.csv $OUT/; grep -E "^(host|device|parts)|Error" $HOME/logs/hostnew.log | sort -u | cut -c1-130
python3 - <<'P'
import csv, os
for r in csv.DictReader(open(os.environ["OUT"] + "/mixed.csv")): print(r["method"], r["Lk"], f"{float(r['ms_p50']):.2f} exact {float(r['opponent_ms_p50']):.2f} x{float(r['speedup']):.2f}", r["params"][:110])
P
for f in $HOME/logs/{memcheck,racecheck}_*; do grep -HE "^----|WRONG|FAILED|NEVER|not found" $f | grep -v planted | sed 's,/root/logs/,,' | cut -c1-160 | head -4; done
for f in $HOME/logs/*.log; do echo "== $f"; tail -c 4000 $f | tr '\r' '\n'; done > $OUT/logs.txt
