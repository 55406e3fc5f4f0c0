exec(open('/tmp/sus/prep.py').read().split('if __name__')[0])
c=L._copied; tot=[0,0]
def cp(a,d): tot[0]+=-(-a.nbytes//512)*512; tot[1]+=1; return c(a,d)
L._copied=cp
name,args,options=m.call_of("heads",torch.bfloat16,0)
with torch.no_grad(): m.ops._ON_CUDA[name].__wrapped__(*args,**options)
print(tot)
