import sys; sys.path.insert(0,"/tmp/hostrig")
from bench import *
lib_=torch.library.Library("rig","FRAGMENT")
lib_.define("attn(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
O1={}
def attn(q,k,v):
    key=q.shape
    if key not in O1: O1[key]=(torch.zeros(q.shape,dtype=q.dtype),torch.zeros(q.shape[:3]))
    a,b=O1[key]
    return a.detach(),b.detach()
lib_.impl("attn",attn,"CPU")
from express_compile.kernels import heads as HD
HD.exact_attention=lambda q,k,v,scale,causal=True: torch.ops.rig.attn(q,k,v)
torch.Tensor.index_copy_=lambda self,d,i,x: self
n=128*6
xs=qkv(1100)
f=heads(xs,*(dc.BLOCKS,dc.WHOLE,dc.KEPT,dc.CORE)*2)
got=[]
old=P._code_of
def code(r,i):
    c=old(r,i); got.append((c,r)); return c
P._code_of=code
def t(f,n=15):
    best=9e9
    for _ in range(300):
        s=time.perf_counter()
        for _ in range(n): f()
        best=min(best,(time.perf_counter()-s)/n*1e6)
    return best
with torch.no_grad():
    if "plain" in sys.argv: P.RECORDINGS=0
    for _ in range(6): f()
    print("heads mixed",t(f), "code" , len(got))
    if got:
        print(sum(isinstance(s,P._Launch) for s in got[0][1].steps))
        for s in P._Code(got[0][1],-1,P._empty_strided).lines: print(s[:150])
        import cProfile,pstats
        p=cProfile.Profile(); p.enable()
        for _ in range(300): f()
        p.disable(); pstats.Stats(p).sort_stats("tottime").print_stats(22)
