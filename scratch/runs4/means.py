import sys,time; sys.path[:0]=["/work/main","/work/main/examples/bench"]
import torch, math
from pathlib import Path
from plans import Profile
torch.set_num_threads(2)
data,W=torch.load("/tmp/qkv.pt")
A=Profile.from_json(Path("/work/main/.gpu/run/q16.json").read_text())
nats=[s.nats for s in A.sites]
n=8192; H,G,D=14,7,64
S=32
import collections
tot=collections.OrderedDict()
per={}
def add(name,rows,e): 
    tot.setdefault(name,[0,[]]); tot[name][0]+=float(e.sum()); tot[name][1].append(rows); per.setdefault(name,[]).append(e)
for text in data:
  for l,(q,k,v) in data[text].items():
    qi=torch.arange(2048+63,n,64*3+8)  # late queries
    Q=q[0][:,qi].float(); K=k[0].float(); V=v[0].float()
    Kh=K.repeat_interleave(G,0) if K.shape[0]==2 else K; Vh=V.repeat_interleave(G,0) if V.shape[0]==2 else V
    sc=(Q@Kh.transpose(1,2))/8.0
    j=torch.arange(n); causal=j[None,:]<=qi[:,None]
    sc=sc.masked_fill(~causal,-1e30)
    Wo=W[l].float().unflatten(1,(H,D)).permute(1,2,0) # [H,D,C]
    ex=torch.softmax(sc,-1)@Vh
    whole=(torch.einsum("hqd,hdc->qc",ex,Wo)).square().sum()
    def err(o): return (((o-ex)@Wo).square().sum((1,2))/whole*nats[l]).double()
    blk=(qi//128)*128  # start of the block of queries
    def win(w): return (j[None,:]<S)|(j[None,:]>=blk[:,None]-w)
    for w in (64,128,256,512,1024,2048,4096):
        m=win(w); o=torch.softmax(sc.masked_fill(~m,-1e30),-1)@Vh; add(f"w{w}",w+S,err(o))
    def means(w,size,var=False,top=0,sel=None):
        # blocks aligned from S on, whole before blk-w
        nb=(n-S)//size
        Kb=Kh[:,S:S+nb*size].unflatten(1,(nb,size)); Vb=Vh[:,S:S+nb*size].unflatten(1,(nb,size))
        km,vm=Kb.mean(2),Vb.mean(2)
        end=S+(torch.arange(nb)+1)*size
        ok=end[None,:]<=(blk-w)[:,None]   # whole blocks out of the window
        sm=(Q@km.transpose(1,2))/8.0+math.log(size)
        if var:
            kv=Kb.var(2,unbiased=False); sm=sm+0.5*((Q/8.0).square()@kv.transpose(1,2))
        sm=sm.masked_fill(~ok,-1e30)
        covered=ok.float()@torch.nn.functional.one_hot(torch.arange(nb*size)//size,nb).T.float() # [q, nb*size]
        tok_ok=torch.ones(len(qi),n,dtype=torch.bool); tok_ok[:,S:S+nb*size]=covered<0.5
        full=sc.masked_fill(~tok_ok,-1e30)
        if top:
            # oracle-ish selection by the block's mass of this query's (first of the block) scores: use same query
            pb=torch.logsumexp(sc[:,:,S:S+nb*size].unflatten(2,(nb,size)),-1).masked_fill(~ok,-1e30)
            idx=pb.topk(min(top,nb),-1).indices
            chosen=torch.zeros_like(pb,dtype=torch.bool).scatter_(2,idx,True)&ok
            sm=sm.masked_fill(chosen,-1e30)
            extra=chosen.repeat_interleave(size,2)
            full[:,:,S:S+nb*size]=torch.where(extra,sc[:,:,S:S+nb*size],full[:,:,S:S+nb*size])
            if sel=="only": sm=torch.full_like(sm,-1e30)
        a=torch.cat([full,sm],-1); p=torch.softmax(a,-1)
        return p[...,:n]@Vh+p[...,n:]@vm
    for w in (64,256,512,1024,2048):
        for size in (16,64,256):
            add(f"w{w} means{size}",w+S+ (5000-w)//size,err(means(w,size)))
        add(f"w{w} means64 var",w+S+(5000-w)//64,err(means(w,64,True)))
    for top in (4,16,64):
        add(f"w128 top{top}",128+S+64*top,err(means(128,64,top=top,sel="only")))
        add(f"w128 top{top} means64",128+S+64*top+78,err(means(128,64,top=top)))
        add(f"w128 top{top} means64 var",128+S+64*top+78,err(means(128,64,True,top=top)))
print(f"{'':26s} total   median ratio of heads to the window alone")
base=torch.cat(per["w256"])
for k,(e,r) in tot.items():
    x=torch.cat(per[k]); w=k.split()[0]; ref=torch.cat(per[w]) if w in per else base
    print(f"{k:26s} rows {sum(r)/len(r):6.0f} err {e/2:.4f}  vs {w}: median {float((x/ref).median()):.3f} 10% {float((x/ref).quantile(.1)):.3f} 90% {float((x/ref).quantile(.9)):.3f}")
torch.save(per,"/tmp/per.pt")
