"""hopper.py's kernel in plain Python: threads for warp groups, barriers with phases, torch tensors for tiles."""
import threading, types, sys, torch, re
from types import SimpleNamespace as NS
from express_compile.kernels.attend import hopper as H, job as J
torch.set_num_threads(1)
class Ptr:
    def __init__(s,mem,off=0): s.mem,s.off=mem,off   # mem: flat storage tensor view (with base)
    @property
    def dtype(s): return NS(element_ty=s.mem.dtype)
    def __add__(s,o): return Ptr(s.mem,s.off+o)
def flat(x):
    # flat memory from x's data pointer to the end of what x spans
    n=1+sum((a-1)*b for a,b in zip(x.shape,x.stride())) if x.numel() else 0
    return torch.as_strided(x,(n,),(1,))
class Oob(Exception): pass
STATS={}
def load(p,mask=None,other=0):
    off=torch.as_tensor(p.off)
    if mask is not None:
        m=torch.as_tensor(mask)
        off,m=torch.broadcast_tensors(off,m)
        o=torch.where(m,off,torch.zeros_like(off))
        if (m & ((off<0)|(off>=len(p.mem)))).any(): raise Oob(('load',int(off.max()),len(p.mem)))
        if not len(p.mem): return torch.full(off.shape,other,dtype=p.mem.dtype)
        return torch.where(m,p.mem[o.clamp(0,max(len(p.mem)-1,0))],torch.as_tensor(other).to(p.mem.dtype))
    if ((off<0)|(off>=len(p.mem))).any(): raise Oob(('load',int(off.min()),int(off.max()),len(p.mem)))
    return p.mem[off]
def store(p,v,mask):
    off,m,v=torch.broadcast_tensors(torch.as_tensor(p.off),mask,v)
    o=off[m]
    if ((o<0)|(o>=len(p.mem))).any(): raise Oob(('store',int(o.min()),int(o.max()),len(p.mem)))
    with LOCK:
        W=WRITTEN.setdefault(p.mem.data_ptr(),torch.zeros(len(p.mem),dtype=torch.int32))
        W[o]+=1
        p.mem[o]=v[m].to(p.mem.dtype)
LOCK=threading.Lock(); WRITTEN={}
class Bar:
    def __init__(s): s.c=threading.Condition(); s.phase=0; s.tx=0
    def init(s,count): s.count=s.pending=count
    def check(s):
        if s.pending==0 and s.tx==0: s.pending=s.count; s.phase^=1; s.c.notify_all()
    def arrive(s,tx=0):
        with s.c:
            assert s.pending>0, "too many arrivals"
            s.pending-=1; s.tx+=tx; s.check()
    def done(s,b):
        with s.c: s.tx-=b; s.check()
    def wait(s,parity):
        with s.c:
            if not s.c.wait_for(lambda: s.phase!=int(parity) or STOP.is_set(),timeout=60): raise RuntimeError("deadlock")
            if STOP.is_set(): raise RuntimeError("stopped")
STOP=threading.Event()
class Bars:
    def __init__(s,n): s.b=[Bar() for _ in range(n)]
    def index(s,i): return s.b[int(i)]
class Tile:
    """phys [COLUMNS, rows, 64], logical [rows, D]"""
    def __init__(s,phys,dtype): s.phys,s.dtype=phys,dtype
    @property
    def shape(s): return (s.phys.shape[1],s.phys.shape[0]*64)
    def reshape(s,shape): assert tuple(shape)==s.shape,(shape,s.shape); return s
    def slice(s,a,n,dim): assert dim==0; return Tile(s.phys[:,a:a+n],s.dtype)
    def read(s): return s.phys.permute(1,0,2).reshape(s.shape)
    def write(s,x): s.phys.copy_(x.reshape(x.shape[0],-1,64).permute(1,0,2))
    def permute(s,d): return T(s)
class T:
    def __init__(s,t): s.t=t
    def read(s): return s.t.read().T
class Smem:
    def __init__(s,dtype,shape,phys=None):
        n,_,_,r,D=shape
        s.shape=list(shape); s.dtype=dtype
        s.phys=torch.full((n,D//64,r,64),float('nan'),dtype=dtype) if phys is None else phys
    def index(s,i):
        i=int(i); assert 0<=i<len(s.phys)
        return Tile(s.phys[i],s.dtype)
    def _reinterpret(s,dtype,shape,layout):
        return Smem(dtype,shape,s.phys.view(shape[0],shape[4]//64,shape[3],64))
class D_:
    def __init__(s,d):
        s.d=d; s.dtype=d.base.dtype; s.layout=None
        s.block=d.block_shape
        n=1
        for b in s.block: n*=b
        s.block_type=NS(nbytes=n*2); s.nb=n*2
        s.x=torch.as_strided(d.base,d.shape,d.strides)
    def get(s,at):
        b,h,r,c=(int(a) for a in at)
        _,_,R,C=s.block
        out=torch.zeros(R,C,dtype=s.dtype)
        B,Hh,L,Dd=s.x.shape
        if not(0<=b<B and 0<=h<Hh): raise Oob(('tma',at,s.x.shape))
        lo,hi=max(r,0),min(r+R,L)
        assert c+C<=Dd
        if lo<hi: out[lo-r:hi-r]=s.x[b,h,lo:hi,c:c+C]
        return out
def tma_copy(d,at,bar,tile):
    tile.write(d.get(at)); bar.done(d.nb)
def mma(a,b,acc,use_acc=True,is_async=False):
    A=(a.read() if hasattr(a,'read') else a).float(); Bm=b.read().float()
    r=A@Bm
    return r+acc if use_acc else r
def convert(x,l): return x
TL=threading.local()
def wrap(x): return torch.as_tensor(x)
class Arr(torch.Tensor): pass
def zeros(s,dt,l): 
    x=torch.zeros(s,dtype=dt); return x
real_gl=H.gl
gl=NS(program_id=lambda i: torch.tensor(TL.pid),num_programs=lambda i: torch.tensor(TL.n),where=lambda c,a,b: torch.where(wrap(c),wrap(a),wrap(b)),
  minimum=lambda a,b: torch.minimum(wrap(a),wrap(b)),maximum=lambda a,b: torch.maximum(wrap(a).to(torch.promote_types(wrap(a).dtype,wrap(b).dtype)),wrap(b).to(wrap(a).dtype) if wrap(a).is_floating_point() else wrap(b)),
  load=load,store=store,arange=lambda a,b,l=None: torch.arange(a,b),SliceLayout=lambda *a: None,BlockedLayout=lambda *a: None,static_range=range,
  NVMMADistributedLayout=lambda *a:None,DotOperandLayout=lambda *a:None,zeros=zeros,float32=torch.float32,int32=torch.int32,int64=torch.int64,exp2=torch.exp2,log2=torch.log2,
  max=lambda x,a: x.amax(a),sum=lambda x,a: x.sum(a),convert_layout=convert,constexpr=None,DistributedLinearLayout=lambda *a: None)
src=open(H.__file__).read()
# arrays: .type.layout
src=src.replace("b_s.type.layout","None").replace("b_acc.type.layout","None")
src=src.replace("from ..launch","from express_compile.kernels.launch").replace("from . import job","from express_compile.kernels.attend import job").replace("from .arguments","from express_compile.kernels.attend.arguments")
src=src.replace("return fn if gluon is None else gluon.jit(fn, **options)","return fn")
M=types.ModuleType("simhopper"); sys.modules["simhopper"]=M
exec(compile(src,"simhopper","exec"),M.__dict__)
M.gl=gl
import os
for n in ("ROWS","AHEAD","ROTATE","FENCE"): setattr(M,"X_"+n,int(os.environ.get("X_"+n,"0")))
M.ROWS=64; M.SLOTS=4; M.GATHERED=2048
M.job=NS(**{k:int(getattr(v,'value',v)) for k,v in vars(J).items() if k.isupper()})
M.fence_async_shared=lambda: None
M.mbarrier=NS(wait=lambda b,p,pred=True: b.wait(p) if pred else None,arrive=lambda b,pred=True: b.arrive() if pred else None,expect=lambda b,n: b.arrive(n),init=lambda b,count: b.init(count))
M.tma=NS(async_copy_global_to_shared=tma_copy)
def g2s(tile,p):
    tile.write(load(p))
M.async_copy=NS(async_copy_global_to_shared=g2s,mbarrier_arrive=lambda b: None)
M.warpgroup_mma=mma
M.warpgroup_mma_wait=lambda n,deps: deps[0]
def P(x):
    if isinstance(x,torch.Tensor): return Ptr(flat(x))
    if isinstance(x,tuple):
        y=[P(a) for a in x]
        return type(x)(*y) if hasattr(x,'_fields') else tuple(y)
    return x
ERR=[]
def sim_launch(kernel,grid,*args,SHAPE,num_warps):
    descs=[D_(d) for d in args[:9]]; x,lists,sizes=map(P,args[9:])
    d_q,d_k,d_v=descs[:3]
    n=grid[0]
    import random
    for pid in range(n):
        sh=M.Shared(Smem(d_q.dtype,[2,1,1,64,SHAPE.D]),Smem(d_k.dtype,[SHAPE.STAGES,1,1,SHAPE.BN,SHAPE.D]),Smem(d_v.dtype,[SHAPE.STAGES,1,1,SHAPE.BN,SHAPE.DV]),
            Bars(2),Bars(2),*[Bars(SHAPE.STAGES) for _ in range(4)])
        for i in range(2): sh.q_full.index(i).init(1); sh.q_empty.index(i).init(1)
        for i in range(SHAPE.STAGES):
            sh.k_full.index(i).init(1); sh.k_empty.index(i).init(2); sh.v_full.index(i).init(1); sh.v_empty.index(i).init(2)
        d=M.Descriptors(*descs[:5],tuple(descs[5:]))
        # sizes: ints as tensors
        sz=type(sizes)(*[torch.tensor(v) for v in sizes])
        STOP.clear()
        def go(f,*a):
            TL.pid,TL.n=pid,n
            try: f(*a)
            except Exception as e:
                if not STOP.is_set():
                    import traceback; ERR.append((pid,f.__name__,repr(e),traceback.format_exc())); STOP.set()
        ts=[threading.Thread(target=go,args=(M._consume,x,lists,sh,sz,0,SHAPE)),threading.Thread(target=go,args=(M._consume,x,lists,sh,sz,1,SHAPE)),threading.Thread(target=go,args=(M._produce,d,x,lists,sh,sz,SHAPE))]
        [t.start() for t in ts]; [t.join() for t in ts]
        if ERR: print(ERR[0][3]); raise SystemExit(1)
H.launch=sim_launch
H._is_hopper=lambda d: True
TAKES=[0]
def takes(query,key,value,block):
    r=(query.element_size()==2 and block==128 and {query.shape[3],value.shape[3]} in ({128},{64,128}) and all(x.stride(3)==1 and not any(s%16 for s in x.stride()[:3]) for x in (key,value)))
    TAKES[0]+=r; return r
H.takes=takes
H.processors=lambda d: PROG[0]
PROG=[132]
