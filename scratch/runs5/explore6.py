"""More options: what predicted errors, KL and needles make of them. Was: Errors of heads weighed by what they do to the output (squared first order of sampled labels, or of margins of answers):
which choice keeps Qwen's needles. Developed on texts, haystacks, templates and keys that are not judged."""
import argparse, random, sys, time, json
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch
import needles, plans
from measures import token_statistics
from models import _bible, _code, profiled_texts
from plans import MODELS, OPTIONS, MORE, LAST, base, chosen, average_rows, only, mean_of
from express_compile import Policy, rewrite_attention, restore_attention
from express_compile.core.call import run_by
from express_compile.core.rows import Rows
from express_compile.kernels.heads import PerHead, EVERYTHING
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--model", default="qwen"); p.add_argument("--length", type=int, default=16384)
p.add_argument("--rows", type=float, default=1600); p.add_argument("--texts", type=int, default=24); p.add_argument("--limit", type=float, default=300)
p.add_argument("--out", default="explore3.txt"); p.add_argument("--profile"); p.add_argument("--save", default=""); p.add_argument("--heads", type=int, default=1)
a = p.parse_args(); start = time.perf_counter()
T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length; small = n < 4096
if small: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
for x in model.parameters(): x.requires_grad_(False)
L = len(model.model.layers)
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n, ids.shape; return ids

def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
S = 32
R = Rows
base29 = OPTIONS + (MORE if n > 8192 else ())
win = [R(S, w) for w in (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)]
thin = [R(S, w, t) for w in (128, 256, 512, 1024, 2048, 4096) for t in (64, 128, 256, 512, 1024, 2048)]
both = [R(S, w, t, x) for w in (128, 256, 512, 1024, 2048, 4096) for t in (128, 256, 512, 1024) for x in (256, 1024)]
prot = [R(S, w, protected=x) for w in (128, 256, 512, 1024, 2048, 4096) for x in (256, 1024, 2048, 4096)]
sel = [R(S, w, selected=x) for w in (64, 128, 256, 512, 1024, 2048, 4096) for x in (2, 4, 8, 16, 32, 64, 128)]
every = tuple(dict.fromkeys([*base29[:-1], *win, *thin, *both, *prot, *sel, EVERYTHING])) if not small else base29[5::4]
late = P.late(n)
texts = profiled_texts(); texts = dict(list(texts.items())[:1]) if small else texts
ps = []
for x in texts:
    if time.perf_counter() - start > a.limit / 2: break
    ps.append(P.profile(model, ids_of(texts[x]), every, block=128, query_heads=a.heads)); print("profile", x, len(every), T(), flush=True)
found = mean_of(ps)
if a.save: Path(a.save).write_text(found.to_json())
kinds = {"29": lambda x: x in base29, "all": lambda x: True, "no selected": lambda x: not x.selected, "29 + windows": lambda x: x in base29 or x in win, "29 + thinned": lambda x: x in base29 or x in thin or x in both, "29 + protected": lambda x: x in base29 or x in prot, "29 + selected": lambda x: x in base29 or x in sel,
   "29 + 8": lambda x: x in base29 or x in (R(S, 8192), R(S, 512, protected=4096), R(S, 2048, protected=2048), R(S, 1024, 1024, 1024), R(S, 1024, 1024), R(S, 2048, 1024), R(S, 512, 1024, 1024))}
for r in (1024, 1600, 2400, 4032):
    for k, f in kinds.items():
        g = only(found, f); p_ = chosen(g, r, n, last=64); print(f"{r} {k:18s} {len(g.options)} predicted {plans.predicted(found, p_):.4f}", plans.in_words(p_)[:300] if k == "all" else "", flush=True)
todo = {f"{k} {r}": chosen(only(found, kinds[k]), r, n) for k, r in (("all", 1600), ("29", 1600), ("29 + 8", 1600), ("all", 2000))}
charge = lambda f, plan: plans.predicted(found, plan)
F = N = A = found
# ------------------------------------------------ judged by
words = "anchor bramble candle dagger ember feather granite hammock inkwell jasmine kestrel lagoon marble napkin oyster parsley quiver ribbon saddle trellis urchin violin wicker zephyr".split()
NOISE2 = "The train leaves the valley at dawn. Nobody looks out of the window. A dog barks once, and the gate is shut. Above the town the mill turns slowly.\nSnow lies on the fields. The smith lights his fire.\n"
HAYS = {"noise": NOISE2, "prose": _bible("The words of Jeremiah the son", 250_000), "code": _code("unittest.mock", "ast")}
DEV = {"john": _bible("In the beginning was the Word", 130_000), "optparse": _code("optparse", "pdb")}
hays = {k: needles.Hay(tok, t, k == "code") for k, t in HAYS.items()}
needles.WORDS = tuple(words)
def asked(r, name, kind):
    facts, qs = [], []
    keys = needles._keys(kind, 6, r)
    for k in keys[:4]:
        c, d = needles._code(r), r.uniform(.02, .95)
        facts.append((d, f"The locker number of {k} is {c}.")); qs.append(("four", f"\n\nWhich locker number has {k}? The locker number of {k} is", f" {c}"))
    for k in keys[4:]:
        c, d = [needles._code(r), needles._code(r)], r.uniform(.02, .8)
        facts += [(d, f"A locker number of {k} is {c[0]}."), (r.uniform(d, .95), f"A locker number of {k} is {c[1]}.")]
        qs.append(("two", f"\n\nWhich two locker numbers has {k}, in the order of the text? They are", f" {c[0]} and {c[1]}"))
    hay = hays[name]
    return hay.with_facts(n - 64, facts, r.randrange(len(hay.lines))), [(t, tok(q, add_special_tokens=False).input_ids, tok(x, add_special_tokens=False).input_ids) for t, q, x in qs]
r = random.Random(3)
cases = [asked(r, list(hays)[i % 3], needles.KINDS[i // 3 % 3]) for i in range(3 if small else a.texts)]
dev_ids = {k: ids_of(t) for k, t in DEV.items()}
@torch.no_grad()
def answers():
    out = []
    for ids, qs in cases:
        cache = model.model(torch.tensor([ids], device=dev), use_cache=True).past_key_values
        out.append((cache, qs))
        yield cache, qs
@torch.no_grad()
def judge(plan):
    if plan is not None: rewrite_attention(model, Policy(methods=(plan,), strict=True))
    hidden = {k: model.model(x, use_cache=False).last_hidden_state for k, x in dev_ids.items()}
    caches = []
    nll, hit = [], []
    for ids, qs in cases:
        cache = model.model(torch.tensor([ids], device=dev), use_cache=True).past_key_values
        if plan is not None: restore_attention(model)
        size = cache.get_seq_length()
        for _, q, x in qs:
            out = model(torch.tensor([q + x], device=dev), past_key_values=cache, use_cache=True).logits[0].float()
            cache.crop(size - cache.get_seq_length())
            lp = out[len(q) - 1:-1].log_softmax(-1); t = torch.tensor(x, device=dev)
            nll.append(float(-lp[torch.arange(len(x), device=dev), t].sum())); hit.append(bool((lp.argmax(-1) == t).all()))
        if plan is not None: rewrite_attention(model, Policy(methods=(plan,), strict=True))
    if plan is not None: restore_attention(model)
    return hidden, nll, hit
exact, nll0, hit0 = judge(None)
tasks = [t for _, qs in cases for t, _, _ in qs]
solved = [i for i, h in enumerate(hit0) if h or small]
four = [i for i in solved if tasks[i] == "four"]
print(f"exact finds {len(solved)} of {len(tasks)}, {len(four)} among four; {T()}", flush=True)
lines = []
for name, plan in todo.items():
    if time.perf_counter() - start > a.limit: print("cut", name); break
    hidden, nll, hit = judge(plan)
    kl = [float(token_statistics(exact[k], hidden[k], model.lm_head, dev_ids[k]).tail(late).kl.mean()) for k in dev_ids]
    d = torch.tensor([nll[i] - nll0[i] for i in solved]).double()
    line = (f"{name:18s} rows {average_rows(plan, n):6.0f} KL {' '.join(f'{x:.4f}' for x in kl)} found {sum(hit[i] for i in solved)}/{len(solved)} four {sum(hit[i] for i in four)}/{len(four)} also {sum(hit) - sum(hit[i] for i in solved)}"
            f" nats {d.mean():.3f} median {d.median():.3f} |d| {d.abs().mean():.3f} F {charge(F, plan):.4f} N {charge(N, plan):.4f} A {charge(A, plan):.4f}")
    print(line, T(), plans.in_words(plan)[:90], flush=True); lines.append(line); open(a.out, "w").write("\n".join(lines))
