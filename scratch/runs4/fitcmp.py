import sys,time; sys.path[:0]=["/work/main","/work/main/examples/bench"]
import torch
from models import load_smollm2,_bible,_code,profiled_texts
from express_compile import fit
from express_compile.core.rows import Rows
from express_compile.quality.profile import DEFAULT_OPTIONS, profile
OLD=(*(Rows(sinks=32,recent=r) for r in (256,1024,2048)),*(Rows(sinks=32,recent=256,thinned=t) for t in (64,256)),Rows(32,256,64,256),*(Rows(32,256,protected=p) for p in (256,512,1024)),*(Rows(32,256,selected=b) for b in (8,16,32,64)),Rows(everything=True))
m,t=load_smollm2("cpu",torch.float32); n=2048
ids=lambda s: t(s[:12*n],return_tensors="pt").input_ids[:,:n]
P=profiled_texts(); sample=[ids(P["genesis"]),ids(P["pydecimal"])]; held=[ids(_bible("In the beginning was the Word",60000)),ids(_code("optparse"))]
for name,o in (("old",OLD),("new",DEFAULT_OPTIONS)):
    a=time.time(); found=profile(m,sample,o); print(name,len(o),f"profile {time.time()-a:.0f} s",flush=True)
    for rows in (350,450,600):
        for q in (False,):
            try:
                f=fit(m,held,rows=rows,profile=found,length=n); print(name,rows,f"KL {f.kl:.4f} rows {f.rows:.0f} {time.time()-a:.0f} s",flush=True)
            except ValueError as e: print(name,rows,e,flush=True)
