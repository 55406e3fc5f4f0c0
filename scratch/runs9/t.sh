set -u
export PYTHONPATH=$PWD:$PWD/.gpu/site HF_HUB_OFFLINE=1 COLUMNS=170 PYTHONUNBUFFERED=1 EXPRESS_QWEN=$HOME/qwen.gguf EXPRESS_SMOLLM2=$HOME/smol.gguf
A="-q -rfs --tb=short -p no:benchmark -p no:cacheprovider"
timeout 100 python3 -m pytest tests/gpu/test_padding.py -k "both_kernels or find_their_jobs" -n 6 $A > $HOME/s1.log 2>&1; rc=$?
tail -c 1500 $HOME/s1.log
if [ $rc = 0 ]; then timeout 400 python3 -m pytest tests/gpu -n 12 $A > $HOME/s2.log 2>&1; echo rc $?; grep -E "^FAILED|^ERROR|^E  |passed|failed" $HOME/s2.log | cut -c1-250 | head -40; tail -3 $HOME/s2.log | cut -c1-200; cp $HOME/s2.log $OUT; else cp $HOME/s1.log $OUT; fi
