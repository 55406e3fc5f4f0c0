exec(open('/tmp/sus/prep.py').read().split('if __name__')[0])
import time
for case in ("express","express, protected","express, padded","heads","heads, last","thinformer"):
    PP.forget(); name,args,options=m.call_of(case,torch.bfloat16,0); f=METHODS[name].op
    with torch.no_grad():
        for _ in range(6): f(*args,**options)
        best=[]
        for _ in range(150):
            t=time.perf_counter()
            for _ in range(10): f(*args,**options)
            best.append((time.perf_counter()-t)/10*1e6)
    best.sort(); print(case,f'min {best[0]:.0f} median {best[75]:.0f}',flush=True)
