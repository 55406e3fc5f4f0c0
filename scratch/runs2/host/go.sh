# bash .gpu/host/go.sh, from the repository root: host time before, after, before; then the tests of prepared calls
here=$PWD/.gpu/host; export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$HOME/tc-host
for t in main new main; do (cd $here && timeout $([ $SECONDS -lt 2 ] && echo 150 || echo 60) python3 host.py $t 2>&1 | grep -v Warning | tail -40 | tee -a $OUT/host.txt | cut -c1-330); done
(cd $here/new && PYTHONPATH=. timeout 240 python3 -m pytest tests/gpu/test_prepared.py -q -p no:cacheprovider 2>&1 | tail -15)
