import torch
from express_compile.kernels.express import Unthinned, Express, make_layout, thin_reference
from express_compile.kernels.express_state import ExpressState
for P in (40, 300):
    cfg = Unthinned(2, 5, 16, P, block=16)
    g=torch.Generator().manual_seed(0); n=5+16+3*256+50
    k,v=torch.randn(1,2,n,8,generator=g).double()+.3,torch.randn(1,2,n,12,generator=g).double()+.3
    s=ExpressState(cfg,0.5,torch.tensor(0))
    at=0
    for step in (3,100,200,1,400,n):
        s.update(k[:,:,at:at+step],v[:,:,at:at+step]); at=min(n,at+step)
    layout=make_layout(cfg,1,n)
    idx=thin_reference(k,v,layout,0.5,torch.tensor(0), 0)
    last=idx[:,:,-P:]
    print(layout.contests, torch.equal(s._rows["places"].index.sort().values.int(), last.sort().values))
