"""tests/gpu/test_prepared.py over the rig: counts, code; not bits."""
import sys; sys.path.insert(0,"/tmp/hostrig")
from rig import *
import types, torch
src=open('tests/gpu/test_prepared.py').read().replace('device="cuda"','device="cpu"')
m=types.ModuleType('tp'); exec(compile(src,'tp','exec'),m.__dict__)
from express_compile.kernels import prepared as PP, exact
PP.ENABLED=True
lib2=torch.library.Library("aten","IMPL")
def cudnn(q,k,v,bias,compute_lse,dropout,causal,mask,*,scale=None):
    out=torch.empty_like(q).contiguous().zero_(); lse=torch.zeros(*q.shape[:3],1)
    e=torch.empty(0,dtype=torch.int64)
    return out,lse,e,e,q.shape[2],k.shape[2],torch.zeros((),dtype=torch.int64),torch.zeros((),dtype=torch.int64),e
lib2.impl("_scaled_dot_product_cudnn_attention",cudnn,"CPU")
exact.cudnn_takes=lambda device,dtype,D: dtype!=torch.float32
torch.equal=lambda a,b: a.shape==b.shape and a.stride()==b.stride() and a.dtype==b.dtype
which=sys.argv[1:]
fails=[]
def go(name,f,*a):
    try: f(*a); print('ok',name,*a,flush=True)
    except BaseException as e:
        import traceback; print('FAIL',name,*a,repr(e)[:300],flush=True); fails.append((name,a))
        if not isinstance(e,AssertionError): traceback.print_exc(limit=-4)
if __name__=="__main__":
    for case in m.CASES:
        for dt in (torch.bfloat16,torch.float32): go('bits',m.test_code_gives_the_bits_of_the_body,None,case,dt)
    for case in m.CASES:
        if 'santa' not in case: go('grad',m.test_code_of_gradients_gives_their_bits,case)
    print(fails)
