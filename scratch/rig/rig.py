"""A GPU that is not there, for host time: Triton 3.6's (or another's) own C launchers over a libcuda that does nothing."""
import os, sys, ctypes, time, statistics, importlib
TR=os.environ.get("RIG_TRITON","/tmp/tr")
os.environ.pop("TRITON_INTERPRET",None)
os.environ["TRITON_LIBCUDA_PATH"]="/tmp/hostrig"
os.environ.setdefault("TRITON_CACHE_DIR","/tmp/hostrig/cache-"+("36" if TR=="/tmp/tr" else "other"))
if TR!="venv": sys.path.insert(0,TR)
sys.path.insert(0,"examples/bench")
lib=ctypes.CDLL("/tmp/hostrig/libcuda.so.1",mode=ctypes.RTLD_GLOBAL)
lib.rig_used.restype=ctypes.c_size_t; lib.rig_bytes.restype=ctypes.c_void_p
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nv
from triton.runtime.driver import driver as active
torch.set_num_threads(1)
class Fn(ctypes.Structure): _fields_=[("n",ctypes.c_int),("sizes",ctypes.c_int*512)]
KEEP=[]
class Driver:
    def __init__(self):
        self.utils=nv.CudaUtils()
        self.launcher_cls=Launcher
    def get_current_target(self): return GPUTarget("cuda",90,32)
    def get_current_device(self): return 0
    def get_current_stream(self,d): return CUR[0]
    def allocate_default_profile_scratch(self,*a): raise 1
CUR=[0x1234]
PENDING=[]
SZ={"i1":1,"i8":1,"u1":1,"u8":1,"i16":2,"u16":2,"fp16":2,"bf16":2,"i32":4,"u32":4,"fp32":4,"f32":4,"i64":8,"u64":8,"fp64":8}
class Launcher(nv.CudaLauncher):
    def __init__(self,src,metadata):
        super().__init__(src,metadata)
        sizes=[]
        metas=list(getattr(metadata,"tensordesc_meta",None) or [])
        def walk(t):
            if isinstance(t,tuple):
                for y in t: walk(y)
            elif t=="constexpr": pass
            elif t[0]=="*": sizes.append(8)
            elif t.startswith("tensordesc"):
                r=4
                if metas: sizes.append(128)
                else: raise 1
                sizes.extend([4]*r+[8]*r)
            else: sizes.append(SZ[t])
        for t in src.signature.values(): walk(t)
        sizes+= [8,8]
        f=Fn(len(sizes),(ctypes.c_int*512)(*sizes)); KEEP.append(f); PENDING.append(ctypes.addressof(f))
Launcher.__module__=nv.CudaLauncher.__module__
D=Driver()
real=D.utils
class U: pass
u=U(); u.__dict__.update({k:getattr(real,k) for k in vars(real)})
u.load_binary=lambda name,kernel,shared,device: (1,PENDING.pop(),32,0,1024)
u.unload_module=lambda m: None
u.get_device_properties=lambda d: {"max_shared_mem":227<<10}
D.utils=u
active.set_active(D)
from triton.compiler import compiler as comp
comp.max_shared_mem=lambda d: 227<<10
from types import SimpleNamespace
from unittest import mock
import express_compile
from express_compile.kernels import launch as L
try:
    from express_compile.kernels import prepared as P
except ImportError: P=None
from express_compile.kernels import op as O
# CUDA kernels of ops for CPU tensors
impl=O._Library.impl
def both(self,name,fn,key="",**o):
    if key=="CPU": return
    if key=="CUDA": impl(self,name,fn,"CPU",**o)
    impl(self,name,fn,key,**o)
O._Library.impl=both
if hasattr(O,'_is_next'):
    import functools
    O._is_next=functools.cache(lambda k: (torch._C.DispatchKeySet.from_raw_repr(k)&torch._C._after_autograd_keyset).highestPriorityTypeId()==torch._C.DispatchKey.CPU)
if os.environ.get('RIG_CHECK'): exec(open('/tmp/sus/rig/check_hook.py').read())
import device_calls as dc
class Dev:
    type="cuda"; index=0
    def __hash__(self): return 1
DEV=Dev()
H200=dc.H200
from express_compile import METHODS
def start():
    list(METHODS.values())
    torch.Tensor.is_cuda=True
    L._device=lambda args: DEV
    torch.cuda.current_device=lambda: 0
    torch.cuda.get_device_properties=lambda d: H200
    torch.cuda.get_device_capability=lambda d=None:(9,0)
    if P:
        P.current_device=lambda: -1
        P.current_stream=lambda i: CUR[0]
        from torch._C._dynamo import guards
        P._empty_strided_cpu=guards._empty_strided_cpu
    # exact: no cuDNN on a CPU
    from express_compile.kernels import exact
    exact.cudnn_takes=lambda *a: False
start()
def log(f):
    lib.rig_log(1); out=f(); n=lib.rig_used(); b=ctypes.string_at(lib.rig_bytes(),n); lib.rig_log(0); return out,b
def host(f,calls=20,rounds=15):
    out=[]
    for _ in range(rounds):
        t=time.perf_counter()
        for _ in range(calls): f()
        out.append((time.perf_counter()-t)/calls*1e6)
    return statistics.median(out),min(out)
if P:
    from torch._C._dynamo import guards
    BIG=torch.zeros(1<<26,dtype=torch.uint8)
    SEEN={}
    def fake_empty(index,shape,strides,dtype):
        guards._empty_strided_cpu((64,),(1,),dtype)
        k=(shape,strides,dtype)
        if k not in SEEN: SEEN[k]=guards._empty_strided_cpu(*k)
        return SEEN[k]
    if os.environ.get("RIG_FAKE_EMPTY"): P._empty_strided=fake_empty
