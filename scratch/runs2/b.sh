set -u
O=$OUT
(export CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=$HOME/tc0 OUT=$O/c; mkdir -p $OUT; timeout 185 bash .gpu/choose2/go.sh > $O/choose.txt 2>&1) &
(export CUDA_VISIBLE_DEVICES=1 TRITON_CACHE_DIR=$HOME/tc1 OUT=$O/p; mkdir -p $OUT; timeout 150 bash .gpu/pages/go.sh > $O/pages.txt 2>&1
 cd .gpu/host && timeout 60 python3 host.py new > $O/host.txt 2>&1) &
wait
tar -C $O -czf $O/all.tgz c p 2>/dev/null; rm -rf $O/c $O/p
grep -v -i warn $O/pages.txt | tail -45 | cut -c1-220; echo; grep -v -i warn $O/choose.txt | tail -60 | cut -c1-200; grep -v -i warn $O/host.txt | tail -14 | cut -c1-200
