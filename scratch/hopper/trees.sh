# old: main before; new: programs that stay; merged: also the first tokens in the tail's tile; pp: merged with ping-pong barriers
cd /work/wt/hopper && for t in old:8493d72 new:d7fee9f merged:5d83667 head:${1:-h/hopper}; do d=/work/main/.gpu/hopper/${t%%:*}; rm -rf $d; mkdir -p $d; git archive ${t#*:} express_compile kernels passes tests pyproject.toml | tar x -C $d; done
cd /work/main/.gpu/hopper; rm -rf pp old/tests new/tests merged/tests; cp -r merged pp; rm -rf pp/tests; python3 pp.py pp/kernels/attend/hopper.py; du -sh .
