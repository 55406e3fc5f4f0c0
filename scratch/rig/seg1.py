import sys, re, types
src=open('tests/gpu/test_segments.py').read().replace('"cuda"','"cpu"')
m=types.ModuleType('ts'); exec(compile(src,'ts','exec'),m.__dict__)
import torch
from express_compile.kernels.attend.segments import *
from express_compile.kernels.attend import segments as S
for n,B,H,past in [(1,1,1,0),(90,1,2,40),(2000,1,8,0),(2300,3,8,60),(5000,1,28,0)]:
  for causal in (False,True):
    try:
        q,k,v=m.tokens(n,B,H,H if H<4 else H//4,128,128,torch.bfloat16)
        q=q[:,:,past:]
        if causal: table,rows,index=causal_table(n-past,n),(k[:,:,:0],v[:,:,:0]),None
        else: table,rows,index=m.problem(past,16,77,128,k,v,n>4000)
        src_=Sources(*(k,v),*rows,index)
        A=rows[0].shape[2]
        check_table(table,n-past,n,A,src_.indexed)
        tiles=SegmentTiles(Widths(128,128,128,128),128,128,4,2,True)
        l=tiles.lists(table,A)
        out,lse=segment_attention_reference(q,src_,table,128**-.5)
        print(n,B,H,past,causal,'A',A,'I',src_.indexed,'shift',table.shift,[x.shape for x in l],out.isfinite().all().item(), 'jobs',(-(-(n-past+table.shift)//128)-table.shift//128)*B*H)
    except Exception as e:
        import traceback; traceback.print_exc()
        print(n,B,H,past,causal,'ERR',repr(e))
