import torch, os
from express_compile.kernels.select.contest import compete, compete_reference
for D,DV,P,C,sinks in ((20,20,64,4,3),(64,80,300,3,0),(16,8,200,9,5)):
    g=torch.Generator().manual_seed(1)
    n=sinks+C*256+5
    k,v=torch.randn(1,2,n,D,generator=g)+.3,torch.randn(1,2,n,DV,generator=g)+.3
    a,b=compete(k,v,sinks,C,P),compete_reference(k,v,sinks,C,P)
    print(torch.equal(a[0],b[0]), torch.equal(a[1].sort().values,b[1].sort().values))
