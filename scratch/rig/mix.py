import sys; sys.path.insert(0,'/tmp/sus')
import sim, torch, numpy as np, time
from express_compile.core.rows import Rows
from express_compile.kernels import heads as P
from express_compile.kernels.attend.mixed import *
from express_compile.kernels.attend.segments import *
from express_compile.kernels.express import gather_rows
KEYS=64
def run(rows,B,G,H_kv,Lq,Lk,D=128,Dv=128,seed=0):
    torch.manual_seed(seed); rng=np.random.default_rng(seed)
    own=P.PerHead(tuple(rows)); what=P._together(own,B,G,H_kv,Lq,Lk)
    q=(2*torch.randn(B,Lk,H_kv*G,D)).bfloat16().transpose(1,2)[:,:,Lk-Lq:]
    k=torch.randn(B,Lk,H_kv,D).bfloat16().transpose(1,2); v=torch.randn(B,Lk,H_kv,Dv).bfloat16().transpose(1,2)
    copies=(torch.randn(what.copied,D).bfloat16(),torch.randn(what.copied,Dv).bfloat16()) if what.copied else None
    index=torch.full((what.indexed,),2**30,dtype=torch.int32) if what.indexed else None
    exp=torch.full((B,H_kv*G,Lq,Dv),float('nan'),dtype=torch.float64); explse=torch.full((B,H_kv*G,Lq),float('nan'),dtype=torch.float64); rexp=exp.clone()
    for sh in what.mixture.shares:
        if sh.chosen is not None: continue
        for i,h in enumerate(sh.heads):
            for b in range(B):
                at=sh.listed.first+i*sh.listed.head+b*sh.listed.sequence
                if index is not None: index[at+sh.copied:at+sh.copied+sh.indexed]=torch.randint(0,Lk,(sh.indexed,),dtype=torch.int32)
                idx=None if index is None or not sh.indexed else index[at:at+sh.copied+sh.indexed][None,None]
                c=sh.copies.first+i*sh.copies.head+b*sh.copies.sequence
                ck,cv=(x[c:c+sh.copied][None,None] for x in (copies or (torch.zeros(0,D).bfloat16(),torch.zeros(0,Dv).bfloat16())))
                for dt,E in ((torch.float64,exp),(torch.bfloat16,rexp)):
                    o,l=segment_attention_reference(q[b:b+1,h*G:h*G+G].to(dt),Sources(k[b:b+1,h:h+1].to(dt),v[b:b+1,h:h+1].to(dt),ck.to(dt),cv.to(dt),idx),sh.table,D**-.5)
                    E[b,h*G:h*G+G]=o[0].double()
                    if dt==torch.float64: explse[b,h*G:h*G+G]=l[0]
    total=max([0]+[sh.chosen.place.first+(len(sh.heads)-1)*sh.chosen.place.head+(B-1)*sh.chosen.place.sequence+len(sh.chosen.count)*sh.chosen.width for sh in what.mixture.shares if sh.chosen is not None])
    chosen=torch.full((total,),-1,dtype=torch.int32) if total else None
    for sh in what.mixture.shares:
        if sh.chosen is None: continue
        ch=sh.chosen
        for i,h in enumerate(sh.heads):
            for b in range(B):
                base=ch.place.first+i*ch.place.head+b*ch.place.sequence
                for blk,cnt in enumerate(ch.count):
                    begin=max(blk*128-sh.table.shift,0); sl=slice(begin,min((blk+1)*128-sh.table.shift,Lq))
                    cand=max(0,(int(sh.table.tail[blk])-ch.first)//64)
                    assert cnt<=cand,(cnt,cand)
                    sel=np.sort(rng.choice(cand,cnt,replace=False)).astype(np.int32) if cnt else np.zeros(0,np.int32)
                    chosen[base+blk*ch.width:base+blk*ch.width+cnt]=torch.from_numpy(sel)
                    tok=[*range(int(sh.table.segments[blk,0,2]))]+[ch.first+64*int(s)+j for s in sel for j in range(64)]
                    tail=int(sh.table.tail[blk])
                    pos=torch.arange(sl.start,sl.stop)+Lk-Lq
                    tt=torch.arange(tail,int(pos[-1])+1)
                    ids=torch.cat([torch.tensor(tok,dtype=torch.long),tt])
                    s=torch.einsum('gqd,kd->gqk',q[b,h*G:h*G+G,sl].double(),k[b,h,ids].double())*D**-.5
                    vis=torch.cat([torch.ones(len(pos),len(tok),dtype=torch.bool),tt[None]<=pos[:,None]],1)
                    s=s.masked_fill(~vis,-float('inf'))
                    exp[b,h*G:h*G+G,sl]=s.softmax(-1)@v[b,h,ids].double(); explse[b,h*G:h*G+G,sl]=s.logsumexp(-1)
    out=Outputs(torch.full((B,H_kv*G,Lq,Dv),float('nan'),dtype=torch.bfloat16),torch.full((B,H_kv*G,Lq),float('nan')))
    sim.WRITTEN.clear(); sim.TAKES[0]=0
    mixed_attention_triton(q,k,v,Buffers(copies,index,chosen),what.mixture,D**-.5,out)
    own_heads=torch.tensor([h*G+g for sh in what.mixture.shares for h in sh.heads for g in range(G)])
    o,e=out.out[:,own_heads].double(),exp[:,own_heads]
    print('takes',sim.TAKES[0],'rel err',((o-e).norm()/e.norm()).item(),'max',(o-e).abs().max().item(),'lse',(out.lse[:,own_heads].double()-explse[:,own_heads]).abs().max().item(),'jobs',len(what.mixture.lists(SegmentTiles(Widths(D,Dv,128,128),128,128,4,2,True))[0]),'max writes',max(w.max().item() for w in sim.WRITTEN.values()),flush=True)
W,C,K=Rows(32,256),Rows(32,256,64),Rows(32,256,128,256)
PL,BL,WH=Rows(32,256,protected=256),Rows(32,256,selected=16),Rows(everything=True)
MIXED=[BL,W,WH,K,BL,PL,WH,C]
FEW=[W,BL,Rows(70,33,selected=3),PL,Rows(32,256,selected=7),K,Rows(32,512),BL]
for a in ((MIXED,1,2,8,2300,2300),(MIXED,2,2,8,700,2100),(FEW,2,2,8,700,2200),([*FEW[:7],WH],1,2,8,1900,1900,64,128),(FEW,1,1,8,1500,2177,128,64)):
    sim.PROG[0]=132 if a[4]>1000 else 7
    t=time.time(); run(*a); print(f'{time.time()-t:.0f}s')
