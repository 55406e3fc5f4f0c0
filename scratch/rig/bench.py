import sys; sys.path.insert(0,"/tmp/hostrig")
from rig import *
from express_compile import AttentionSpec, Mask, Policy, Site, Rows
from express_compile.kernels.attend.decode import decode_attention
H,HK,D=32,8,128
seed=torch.tensor(5)
n=4096
def qkv(n,Lq=None,B=1):
    return [torch.zeros(B,h,m,D,dtype=torch.bfloat16) for h,m in ((H,Lq or n),(HK,n),(HK,n))]
def op(name,x,**options):
    (B,_,Lq,_),Lk=x[0].shape,x[1].shape[2]
    mask=Mask() if name=="thinformer" else Mask(causal=True,offset=Lk-Lq)
    spec=AttentionSpec(B,H,HK,Lq,Lk,D,D,x[0].dtype,"cuda",.1,mask)
    params=METHODS[name].params(Site(spec,"layers.3"),Policy(methods=(name,),min_length=0,method_options={name:options}))
    f=METHODS[name].op
    return lambda: f(*x,None,seed,.1,3,**params)
def heads(x,*rows,**more):
    f=METHODS["heads"].op; params={**dc.mixed(*rows),**more}
    return lambda: f(*x,None,seed,.1,3,**params)
x=qkv(n); y=qkv(n,1)
small=[torch.zeros(1,1,16,16) for _ in range(3)]
cases={
 "sdpa(tiny)": lambda: torch.nn.functional.scaled_dot_product_attention(*small,is_causal=True),
 "express 256":op("express",x,budget=256,sinks=32,recent=256,block=128,protected=0),
 "express 256 protected":op("express",x,budget=256,sinks=32,recent=256,block=128,protected=256),
 "heads mixed":heads(x,*(dc.BLOCKS,dc.WHOLE,dc.KEPT,dc.CORE)*2),
 "heads window":heads(x,*(dc.WINDOW,)*8),
 "thinformer":op("thinformer",x,budget=256),
 "sparse fixed":op("sparse",x,pattern="fixed"),
 "decode exact":lambda: decode_attention(*y,.1),
 "santa":(lambda f: lambda: f(*y,None,seed,.1,3,draws=[64],fraction=0.0,sampler="sys",shared=True,min_length=0))(METHODS["santa"].op),
}
if __name__=="__main__":
    import traceback
    only=sys.argv[1:]
    with torch.no_grad():
        for name,f in cases.items():
            if only and not any(o in name for o in only): continue
            try:
                for _ in range(4): f()
                _,b=log(f)
                m,l=host(f)
                print(f"{name:26s} host us median {m:8.1f} min {l:8.1f}  log {len(b)}",flush=True)
            except Exception: traceback.print_exc()
