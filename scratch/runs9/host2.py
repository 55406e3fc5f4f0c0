import sys,time,timeit; sys.path.insert(0,"examples/bench")
import torch
torch.set_num_threads(1)
from encoders import random_encoder
from express_compile import rewrite_attention, restore_attention
from express_compile.routes.transformers import attention as A, proof as PR, configs as C
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
torch.set_grad_enabled(False)
def us(f,n=3000):
    for _ in range(100): f()
    return min(timeit.repeat(f,number=n,repeat=5))/n*1e6
model, inputs = random_encoder("bert-base", 64, True); model.eval()
rewrite_attention(model, methods=["thinformer","exact"], budget=256)
calls=[]; orig=A._run_eagerly
A._run_eagerly=lambda g:(calls.append(g),orig(g))[1]
model(**inputs); A._run_eagerly=orig
g=calls[0]; print(type(g.mask), {k:(type(v).__name__, v) for k,v in g.arguments.items()})
m=g.module
sd=ALL_ATTENTION_FUNCTIONS["sdpa"]
a=us(lambda: sd(m,g.query,g.key,g.value,None,**{**g.arguments}))
b=us(lambda: A.attend(m,g.query,g.key,g.value,g.mask,**g.arguments))
print(f"sdpa {a:.1f} attend {b:.1f}")
site=A._site(g)
print("eager", us(lambda: g.eager), "causal", us(lambda: g.causal), "grad", us(lambda: g.gradient), "prove", us(lambda: PR.prove(site,g)))
p=PR.prove(site,g); s=p.spec(g)
print("spec", us(lambda: p.spec(g)), "plans", us(lambda: site.plans(site.path,s,None)), "weights", us(lambda: A.wants_weights(g)), "exact", us(lambda: A._exact(site,g)), "exact_step", us(lambda: A._exact_step(g,p,s)))
print("shard_of", us(lambda: A.shard_of(m,12,12,64)), "tracer", us(A.tracer), "hook", us(lambda: C._check_in_force(m,())), "disable", us(A.untraced(lambda: None)), "exporting", us(A.is_exporting), "compiling", us(torch.compiler.is_compiling))
print("config._attn", us(lambda: m.config._attn_implementation), "out_att", us(lambda: m.config.output_attentions))
from express_compile.core.spec import AttentionSpec, Mask, feature_major
from express_compile.core.shards import is_dtensor
print("unreadable", us(lambda: PR._unreadable(g,None)), "unlike", us(lambda: PR._unlike_sdpa(site,g)), "Mask", us(lambda: Mask()), "Proof", us(lambda: PR.Proof(Mask,None,3)), "dtensor", us(lambda: is_dtensor(g.key)), "fm", us(lambda: feature_major(g.key)), "shapes", us(lambda: (g.query.shape, g.key.shape)), "dt", us(lambda: g.query.dtype == g.key.dtype == g.value.dtype), "dev", us(lambda: g.query.device == g.key.device == g.value.device), "3sl", us(lambda: g.key.shape[:3] != g.value.shape[:3]))
print("replace", us(lambda: g._replace(shard=None)), "Given", us(lambda: PR.Given(m,g.query,g.key,g.value,None,g.arguments)), "hash", us(lambda: hash(s)), "run_eagerly", us(lambda: A._run_eagerly(g)), "planned", us(lambda: A._run_planned(site,g)))
import functools
mod=torch.nn.Identity(); x=torch.ones(1); a=us(lambda: mod(x)); mod.register_forward_pre_hook(C._check_in_force); print("module", a, "hooked", us(lambda: mod(x)))
