import sys; sys.path[:0]=["/work/main","/work/main/examples/bench"]
import torch, time
from models import load_qwen, _bible, _code, profiled_texts
t=time.time()
model,tok=load_qwen("cpu",torch.bfloat16); print(time.time()-t)
n=8192; out={}
keep=[1,3,7,9,11,13,16,21]
texts=profiled_texts()
for name in ("genesis","pydecimal"):
    ids=tok(texts[name][:10*n],return_tensors="pt").input_ids[:,:n]
    qkv={}
    import transformers.models.qwen2.modeling_qwen2 as M
    orig=M.ALL_ATTENTION_FUNCTIONS if hasattr(M,"ALL_ATTENTION_FUNCTIONS") else None
    F=torch.nn.functional.scaled_dot_product_attention
    count=[0]
    def sdpa(q,k,v,*a,**kw):
        i=count[0]; count[0]+=1
        if i in keep: qkv[i]=(q.clone(),k.clone(),v.clone())
        return F(q,k,v,*a,**kw)
    torch.nn.functional.scaled_dot_product_attention=sdpa
    with torch.no_grad(): model.model(ids[:, :n],use_cache=False)
    torch.nn.functional.scaled_dot_product_attention=F
    out[name]=qkv; print(name,count,time.time()-t,{k:[x.shape for x in v] for k,v in qkv.items()} if name=="genesis" else "",flush=True)
W={i:model.model.layers[i].self_attn.o_proj.weight.detach().clone() for i in keep}
torch.save((out,W),"/tmp/qkv.pt")
