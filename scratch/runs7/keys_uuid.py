import sys, time; sys.path.insert(0,'/work/main/examples/bench')
import torch
from dataclasses import replace
import express_compile.kernels.heads as H
H.MOST_LAST=128
import plans
from plans import *
from models import haystacks
torch.set_grad_enabled(False); torch.set_num_threads(2)
model,tok=MODELS['smollm2'][1]('cpu',torch.float32)
n=8192; t0=time.time()
asked=[c for c in cases(tok,n+1,{"noise":NOISE,**haystacks()},4) if c.kind=='uuid' and c.task in('single','among four')]
found=SavedPlan.from_json(Path(sys.argv[1]).read_text())
rows={s.module:list(s.rows) for s in found.sites}
def hit(case):
    ids=torch.tensor([(*case.prompt,*case.answer)])
    best=model(ids[:,:-1],use_cache=False,logits_to_keep=len(case.answer)).logits.argmax(-1)
    return answered(best,[case])[0]
for i,c in enumerate(asked):
    e=hit(c)
    if not e: print(i,c.task,c.haystack,'exact no',f'{time.time()-t0:.0f}',flush=True); continue
    out=[]
    for last in (64,128):
        rewrite_attention(model,Policy(methods=(PerHead(rows,last=last),),strict=True))
        out.append(hit(c)); restore_attention(model)
    print(i,c.task,c.haystack,'exact yes; 64, 128:',out,f'{time.time()-t0:.0f}',flush=True)
