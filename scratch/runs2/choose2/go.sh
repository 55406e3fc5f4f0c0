# bash .gpu/choose2/go.sh : from the repository root. All variants compile and are checked side by side; then times of main and of them, then the op
# with a plan in both trees.
here=$PWD/.gpu/choose2; top=$PWD/.gpu/main0; w=$(mktemp -d); export PYTHONUNBUFFERED=1 PYTHONPATH=. L="32768 131072 524288"; s=$SECONDS; cd $here/new
all="main triton g4 g2x128ahead g3ahead"
for v in $all; do timeout 80 python3 $here/go.py check+warm $v >$w/$v.txt 2>&1 & done
for v in x_nomax x_noexp; do LENGTHS=131072 timeout 80 python3 $here/go.py warm $v >$w/$v.txt 2>&1 & done
(timeout 80 python3 $here/whole.py new warm $L >$w/whole_new.txt 2>&1) & (cd $top; timeout 80 python3 $here/whole.py main warm $L >$w/whole_main.txt 2>&1) &
wait; ok=; for v in $all; do if grep -q "ok, mass" $w/$v.txt && ! grep -q Error $w/$v.txt; then ok="$ok $v"; fi; echo "$v: $(grep -v Warn $w/$v.txt | tail -1 | cut -c1-300)"; done
grep Error $w/whole_*.txt $w/x_*.txt; tail -n 60 $w/*.txt > $OUT/logs.txt; echo "checked at $((SECONDS - s)) s; timed are$ok"
timeout 60 python3 $here/go.py time $ok x_nomax x_noexp 2>&1 | grep -v Warning | tail -70; echo "timed at $((SECONDS - s)) s"
(cd $top; timeout 50 python3 $here/whole.py main $OUT/whole_main.json $L 2>&1 | grep -v Warning | tail -5); timeout 50 python3 $here/whole.py new $OUT/whole_new.json $L 2>&1 | grep -v Warning | tail -5; echo "done at $((SECONDS - s)) s"
