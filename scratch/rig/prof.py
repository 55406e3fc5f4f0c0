import sys; sys.path.insert(0,"/tmp/hostrig")
from bench import *
import cProfile,pstats
f=cases["express 256"]
with torch.no_grad():
    for _ in range(5): f()
    p=cProfile.Profile()
    for _ in range(50):
        P.forget(); f(); f()
        p.enable(); f(); p.disable()
pstats.Stats(p).sort_stats("tottime").print_stats(28)
