import torch, collections
allrows=torch.load("/work/main/.gpu/rows/scores.pt",weights_only=False)
tot=collections.defaultdict(lambda:[0,0,0,0]); hay=sorted({r[1] for r in allrows}); PS=sorted({x[1] for x in allrows[0][5]})
print([(r[0],r[1],r[2],r[4]) for r in allrows])
for task,h,kind,d,r,res in allrows:
    for name,P,layer,a,b,e,f in res:
        for key in ((name,P,h),(name,P,"all")):
            x=tot[key]; x[0]+=sum(a);x[1]+=sum(b);x[2]+=sum(e);x[3]+=sum(f)
for name in dict.fromkeys(x[0] for x in allrows[0][5]):
    print(f"{name:28s}", *(f"| P={P} "+" ".join(f"{h}:{tot[name,P,h][0]/max(1e-9,tot[name,P,h][1]):.2f}/{tot[name,P,h][2]/max(1e-9,tot[name,P,h][3]):.2f}" for h in hay+["all"]) for P in PS))
