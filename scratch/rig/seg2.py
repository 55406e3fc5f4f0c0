import sys; sys.path.insert(0,'/tmp/sus')
import sim, types, torch, time
src=open('tests/gpu/test_segments.py').read().replace('"cuda"','"cpu"')
m=types.ModuleType('ts'); exec(compile(src,'ts','exec'),m.__dict__)
from express_compile.kernels.attend.segments import *
cases=[(1,1,1,0),(90,1,2,40),(2000,1,8,0),(2300,3,8,60),(5000,1,28,0)]
sel=sys.argv[1:]
for n,B,H,past in cases:
  if sel and str(n) not in sel: continue
  for causal in (False,True):
    q,k,v=m.tokens(n,B,H,H if H<4 else H//4,128,128,torch.bfloat16)
    q=q[:,:,past:]
    if causal: table,rows,index=causal_table(n-past,n),(k[:,:,:0],v[:,:,:0]),None
    else: table,rows,index=m.problem(past,16,77,128,k,v,n>4000)
    t=time.time()
    ten=(q,k,v,*rows); scale=128**-.5
    truth,tl=m.attend(segment_attention_reference,[x.double() for x in ten],table,scale,index)
    ref,_=m.attend(segment_attention_reference,ten,table,scale,index)
    sim.WRITTEN.clear(); sim.TAKES[0]=0
    out,lse=m.attend(segment_attention_triton,ten,table,scale,index)
    w=[(x.min().item(),x.max().item()) for x in sim.WRITTEN.values()]
    e,r=(out.double()-truth).norm().item(),(ref.double()-truth).norm().item()
    print(n,B,H,past,causal,'takes',sim.TAKES[0],'err',e,'ref',r,'ratio',e/max(r,1e-30),'lse',(lse.double()-tl).abs().max().item(),'written',w,f'{time.time()-t:.0f}s',flush=True)
