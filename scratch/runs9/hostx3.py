import sys,time; sys.path.insert(0,"examples/bench")
import torch, copy
torch.set_num_threads(1)
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from express_compile import rewrite_attention, restore_attention
torch.set_grad_enabled(False)
kw=dict(hidden_size=64,num_hidden_layers=12,num_attention_heads=4,intermediate_size=64)
for name,model,inputs in (("bert",BertModel(BertConfig(**kw)).eval(),dict(input_ids=torch.ones(1,64,dtype=torch.long))),("vit",ViTModel(ViTConfig(**kw,image_size=32,patch_size=4)).eval(),dict(pixel_values=torch.zeros(1,3,32,32)))):
    other = copy.deepcopy(model); rewrite_attention(other, methods=["thinformer","exact"], budget=256)
    L=12
    x={0:[],1:[]}
    for r in range(700):
        for i,m in enumerate((model,other)):
            a=time.perf_counter(); m(**inputs); x[i].append(time.perf_counter()-a)
    md=[1e6*sorted(v)[len(v)//4] for v in x.values()]
    print(name, L, [f"{v:.0f}" for v in md], f"exact {(md[1]-md[0])/L:.1f} us a site", flush=True)
