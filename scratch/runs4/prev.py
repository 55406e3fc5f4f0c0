import sys,time; sys.path[:0]=["/work/main","/work/main/examples/bench"]
import torch, math
from pathlib import Path
from plans import Profile
torch.set_num_threads(2)
data,W=torch.load("/tmp/qkv.pt")
A=Profile.from_json(Path("/work/main/.gpu/run/q16.json").read_text())
nats=[s.nats for s in A.sites]
n=8192; H,G,D=14,7,64; S=32; KB=64
tot={}
starts=[3200,7424]
for text in data:
  for l,(q,k,v) in data[text].items():
    K=k[0].float(); V=v[0].float()
    Kh=K.repeat_interleave(G,0) if K.shape[0]==2 else K; Vh=V.repeat_interleave(G,0) if V.shape[0]==2 else V
    Wo=W[l].float().unflatten(1,(H,D)).permute(1,2,0)
    for s in starts:
        j=torch.arange(s+128)
        def probs(qi):
            sc=(q[0][:,qi].float()@Kh[:,:s+128].transpose(1,2))/8.0
            return sc.masked_fill(~(j[None,:]<=qi[:,None]),-1e30)
        qi=torch.arange(s,s+128,2); sc=probs(qi); p=sc.softmax(-1); ex=p@Vh[:,:s+128]
        pp=probs(torch.arange(s-128,s,4)).softmax(-1)   # previous block, every 4th
        whole=(torch.einsum("hqd,hdc->qc",ex,Wo)).square().sum()
        w=128; nb=(s-w-S)//KB; lim=S+nb*KB
        mass=lambda x: x[:,:,S:lim].unflatten(2,(nb,KB)).sum(-1).unflatten(0,(2,G)).mean(1)  # [2,q,nb]
        m,mp=mass(p),mass(pp)
        first=m[:,0]; prev=mp.mean(1); last8=mp[:,-2:].mean(1); last32=mp[:,-8:].mean(1)
        mx=mp.amax(1)
        ways={"first":first,"all (not causal)":m.mean(1),"prev128":prev,"prev32":last32,"first+prev128":first+prev,"first+prev32":first+last32,"first+.5prev32":first+.5*last32,"first+2prev128":first+2*prev,"first+prev8":first+last8,"sqrt":first.sqrt()+prev.sqrt()}
        for name,sco in ways.items():
            for b in (4,16,64):
                idx=sco.topk(min(b,nb),-1).indices
                ch=torch.zeros(2,nb,dtype=torch.bool).scatter_(1,idx,True).repeat_interleave(G,0)
                mm=(j<S)|(j>=lim)
                vis=mm[None].repeat(H,1); vis[:,S:lim]|=ch.repeat_interleave(KB,1)
                o=sc.masked_fill(~vis[:,None],-1e30).softmax(-1)@Vh[:,:s+128]
                e=float((((o-ex)@Wo).square().sum((1,2))/whole*nats[l]).sum())
                tot.setdefault((name,b),[]).append(e)
  print(text,flush=True)
for name in ways: print(f"{name:20s}"," ".join(f"{b}: {sum(tot[name,b])/4:.4f}" for b in (4,16,64)))
