import sys
sys.path[:0]=["/work/main","/work/main/examples/bench"]
block=int(sys.argv.pop(1))
import plans, caching
plans.BLOCK=block; caching.BLOCK=128
caching.main()
