# bash .gpu/pages/go.sh: the GPU tests in the new tree, then main's and the new step; from the repository root
here=$PWD/.gpu/pages; export PYTHONUNBUFFERED=1 OUT=${OUT:-/tmp}; start=$SECONDS
(cd $here/new && PYTHONPATH=. timeout 80 python3 -m pytest tests/gpu/test_pages.py tests/gpu/test_cache.py tests/gpu/test_decode.py -n 8 -q -p no:cacheprovider 2>&1 | tail -15); echo "tests done at $((SECONDS - start)) s"
for t in main new; do (cd $here/$t && PYTHONPATH=. timeout 60 python3 $here/prof.py $t $OUT/$t.json 2>&1 | grep -v Warning | tail -12); echo "$t done at $((SECONDS - start)) s"; done
python3 $here/table.py
