import sys, torch
sys.path.insert(0,'examples/bench')
import blocks as b
from models import *
torch.set_num_threads(1)
for m,names in (('smollm2',['python-types','argparse','genesis','records']),('qwen',['python-types','argparse','records'])):
    model,tok=b.MODELS[m][1]('cpu',torch.float32)
    t=long_texts()|profiled_texts()
    for n in names:
        ids=tok(t[n],return_tensors='pt').input_ids[:,:4096]
        torch.save([tuple(x) for x in b.attention_inputs(model,ids,8)], f'/tmp/ph_{m}_{n}.pt'); print(m,n,flush=True)
