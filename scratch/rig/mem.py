exec(open('/tmp/sus/prep.py').read().split('if __name__')[0])
import json, tempfile
def rnd(n): return max(512,-(-n//512)*512)
class Alloc:
    """PyTorch's caching allocator as it counts: small (<=1MB) blocks from 2 MB segments, large ones from 20 MB (<10MB) or of 2MB multiples."""
    def __init__(s): s.free=[]; s.cur=s.peak=0; s.live={}; s.req=s.reqpeak=0
    def malloc(s,addr,n):
        size=rnd(n); small=size<=1<<20
        best=None
        for b in s.free:
            if b['small']==small and b['size']>=size and (best is None or (b['size'],b['at'])<(best['size'],best['at'])): best=b
        if best is None:
            seg=2<<20 if small else 20<<20 if size<10<<20 else -(-size//(2<<20))*(2<<20)
            best=dict(seg=object(),at=len(s.live)*(1<<40)+id(addr)%1000,size=seg,small=small); best['at']=0
        else: s.free.remove(best)
        rem=best['size']-size
        if (rem>=512) if small else rem>1<<20:
            s.free.append(dict(seg=best['seg'],at=best['at']+size,size=rem,small=small)); best=dict(best,size=size)
        s.live[addr]=(best,n); s.cur+=best['size']; s.peak=max(s.peak,s.cur); s.req+=n; s.reqpeak=max(s.reqpeak,s.req)
    def free_(s,addr):
        if addr not in s.live: return
        b,n=s.live.pop(addr); s.cur-=b['size']; s.req-=n
        # merge neighbours
        for o in list(s.free):
            if o['seg'] is b['seg'] and o['at']+o['size']==b['at']: s.free.remove(o); b=dict(b,at=o['at'],size=o['size']+b['size'])
        for o in list(s.free):
            if o['seg'] is b['seg'] and b['at']+b['size']==o['at']: s.free.remove(o); b=dict(b,size=o['size']+b['size'])
        s.free.append(b)
def events(f):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],profile_memory=True) as p: out=f()
    t=tempfile.mktemp(); p.export_chrome_trace(t)
    ev=[e for e in json.load(open(t))['traceEvents'] if e.get('name')=='[memory]']
    ev.sort(key=lambda e:e['ts'])
    return out,[(e['args']['Addr'],e['args']['Bytes']) for e in ev]
from express_compile.kernels import op as ops_
for case,dt in [(c,d) for c in m.CASES for d in (torch.bfloat16,)]:
    name,args,options=m.call_of(case,dt,0); name=name
    PP.forget()
    a=Alloc(); rows=[]
    with torch.no_grad():
        for f in (ops_._ON_CUDA[name].__wrapped__, *[METHODS[name].op]*5):
            out,ev=events(lambda: f(*args,**options))
            before=a.cur; a.peak=a.cur; a.reqpeak=a.req; br=a.req
            for addr,b in ev:
                if b>0: a.malloc(addr,b)
                else: a.free_(addr)
            rows.append((a.peak-before,a.reqpeak-br,len(ev)))
            for addr in list(a.live): 
                if any(addr==x.untyped_storage().data_ptr() for x in out): a.free_(addr)
            del out
    print(case,dt,rows,'ratio',rows[-1][0]/rows[0][0],rows[-1][1]/rows[0][1],flush=True)
