"""How weights of layers (nats) of several samples are joined, and where they are measured: KL and needles of the plans.
Developed on texts, haystacks, templates and keys that are not judged. Profiles are kept by sample."""
import argparse, random, sys, time, json, math
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch, numpy as np
import needles, plans
from measures import token_statistics
from models import _bible, _code, profiled_texts
from plans import MODELS, OPTIONS, MORE, LAST, base, chosen, average_rows, only, mean_of, predicted
from express_compile import Policy, rewrite_attention, restore_attention
from express_compile.core.call import run_by
from express_compile.core.rows import Rows
from express_compile.kernels.heads import PerHead, EVERYTHING
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--model", default="qwen"); p.add_argument("--length", type=int, default=16384)
p.add_argument("--rows", type=float, nargs="+", default=[1600]); p.add_argument("--texts", type=int, default=24); p.add_argument("--limit", type=float, default=300)
p.add_argument("--out", default="explore7.txt"); p.add_argument("--save", default=""); p.add_argument("--heads", type=int, default=1); p.add_argument("--block", type=int, default=128)
p.add_argument("--only-profile", type=int, default=0); p.add_argument("--caching", type=int, default=0)
a = p.parse_args(); start = time.perf_counter()
T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_grad_enabled(False)
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length; small = n < 4096
if small: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
options = OPTIONS + (MORE if n > 8192 or a.caching else ())
if small: options = OPTIONS[5::6]
texts = {k: ids_of(v) for k, v in profiled_texts().items()}
if small: texts = dict(list(texts.items())[:2])
own = PerHead(EVERYTHING, block=a.block)
each, reports = [], None
for k, x in texts.items():
    with P.rewritten(model, own):
        found, reports = P.measured(model, [x], options, a.block, False, bool(a.heads))
    each.append(found); print("profile", k, len(options), T(), flush=True)
    if a.save: Path(f"{a.save}.{k}.json").write_text(found.to_json())
if a.only_profile: sys.exit()
mods = [s.module for s in each[0].sites]
layer_of = {(r.saved.module): r.layer for r in reports if r.saved is not None and r.verdict == "rewritten"}

def joined(weights):
    """weights [samples][sites]: predicted loss is the mean over samples of weight x error."""
    sites = []
    for i, site in enumerate(each[0].sites):
        e = sum(w[i] * np.array(x.sites[i].errors) for w, x in zip(weights, each)) / len(each)
        sites.append(replace(site, errors=tuple(map(tuple, e.tolist())), nats=1.0))
    return replace(each[0], samples=len(each), sites=tuple(sites))
nats = [[s.nats for s in x.sites] for x in each]
N = np.array(nats)
print("nats", json.dumps([[round(v, 5) for v in x] for x in nats]), flush=True)

def at_plan(plan, gm=False):
    """Weights where the plan is: what the output gains where one layer is exact, over the error of the plan there."""
    out = []
    rows = {layer_of[m]: list(plan.rows[m]) for m in mods}
    with P.rewritten(model, own):
        for (k, x), found in zip(texts.items(), each):
            exact = P.scores_of(model, x)
            with run_by(P.Chosen(rows)): whole = P.kl_of(exact, model, x)
            w = []
            for i, m in enumerate(mods):
                part = {l: r for l, r in rows.items() if l != layer_of[m]}
                with run_by(P.Chosen(part)): kl = P.kl_of(exact, model, x)
                places = {r: o for o, r in enumerate(found.options)}
                e = np.array(found.sites[i].errors); his = plan.rows[m]
                err = sum(e[h, places[r]] for h, r in enumerate(his))
                w.append(max(whole - kl, 0.02 * whole / len(mods)) / max(err, 1e-6))
            out.append(w); print("at plan", k, f"{whole:.4f}", T(), flush=True)
            del exact
    return out
S = 32
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
def judge(plan):
    if plan is not None: rewrite_attention(model, Policy(methods=(plan,), strict=True))
    hidden = {k: model.model(x, use_cache=False).last_hidden_state for k, x in dev_ids.items()}
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
late = P.late(n)
print(f"exact finds {len(solved)} of {len(tasks)}, {len(four)} among four; {T()}", flush=True)
lines = []
def tell(name, plan):
    if time.perf_counter() - start > a.limit: print("cut", name); return
    hidden, nll, hit = judge(plan)
    kl = [float(token_statistics(exact[k], hidden[k], model.lm_head, dev_ids[k]).tail(late).kl.mean()) for k in dev_ids]
    d = torch.tensor([nll[i] - nll0[i] for i in solved]).double()
    line = (f"{name:24s} rows {average_rows(plan, n):6.0f} KL {' '.join(f'{x:.4f}' for x in kl)} mean {sum(kl)/len(kl):.4f} found {sum(hit[i] for i in solved)}/{len(solved)} four {sum(hit[i] for i in four)}/{len(four)}"
            f" nats {d.mean():.3f} median {d.median():.3f}")
    print(line, T(), flush=True); lines.append(line); open(a.out, "w").write("\n".join(lines))
for budget in a.rows:
    pick = lambda f: chosen(f, budget, n, last=64)
    E = np.array([[np.array(s.errors).mean() for s in x.sites] for x in each])
    rules = {"a geometric x mean": mean_of(each), "b mean of products": joined(nats),
             "c each text alike": joined([[v / np.dot(x, E[i]) for v in x] for i, x in enumerate(nats)]),
             "e root of products": joined([[math.sqrt(max(v, 0)) for v in x] for x in nats])}
    found = {k: pick(f) for k, f in rules.items()}
    for k, plan in found.items(): tell(f"{budget:g} {k}", plan)
    if time.perf_counter() - start < a.limit * .8:
        w = at_plan(found["a geometric x mean"]); print("at plan", json.dumps([[round(v, 5) for v in x] for x in w]), flush=True)
        W = np.array(w)
        gm = np.exp(np.log(W).mean(0))
        tell(f"{budget:g} d at plan, products", p1 := pick(joined(w)))
        tell(f"{budget:g} d at plan, geometric", p2 := pick(joined([gm] * len(each))))
        tell(f"{budget:g} d both, geometric", pick(joined([np.sqrt(gm * np.exp(np.log(np.maximum(N, 1e-9)).mean(0)))] * len(each))))
        if time.perf_counter() - start < a.limit * .8:
            w = at_plan(p2); gm2 = np.exp(np.log(np.array(w)).mean(0))
            tell(f"{budget:g} d twice, geometric", pick(joined([np.sqrt(gm * gm2)] * len(each))))
