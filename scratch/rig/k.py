import torch,time
q=torch.zeros(1,32,4096,128,dtype=torch.bfloat16)
def t(f,n=2000):
    best=9e9
    for _ in range(50):
        s=time.perf_counter()
        for _ in range(n): f()
        best=min(best,(time.perf_counter()-s)/n*1e9)
    return best
e=t(lambda:None)
T=torch.Tensor
for n,f in dict(shape=lambda:q.shape,stride=lambda:q.stride(),dtype=lambda:q.dtype,get_device=lambda:q.get_device(),device=lambda:q.device,ptr=lambda:q.data_ptr(),inst=lambda:isinstance(q,torch.Tensor),inst2=lambda:isinstance(q,T),typ=lambda:type(q) is T,det=lambda:torch._C._get_deterministic_algorithms(),st=lambda:torch._C._len_torch_dispatch_stack()).items(): print(n,round(t(f)-e))
k=tuple([q.shape,q.stride(),q.dtype,0,1]*4+list("abcdefghij")+[1,2,3,4,5,6,7])
d={k:1}
print("hash+get",t(lambda:d.get(k))-e)
