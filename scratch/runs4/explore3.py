"""Errors of heads weighed by what they do to the output (squared first order of sampled labels, or of margins of answers):
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
p.add_argument("--out", default="explore3.txt"); p.add_argument("--profile"); p.add_argument("--save", default=""); p.add_argument("--draws", type=int, default=2)
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
# ------------------------------------------------ gradients
def gradients(ids, loss_of):
    """d loss / d output of the attention of each layer, [n, H D] by module path; loss_of(hidden) gives the gradient of hidden."""
    got, hooks = {}, []
    def hook(path):
        def pre(module, args): args[0].register_hook(lambda g: got.__setitem__(path, g[0]))
        return pre
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(hook(f"model.layers.{i}.self_attn")))
    with torch.enable_grad():
        e = model.model.embed_tokens(ids).detach().requires_grad_()
        h = model.model(inputs_embeds=e, use_cache=False).last_hidden_state
        g = loss_of(h.detach())
        h.backward(g)
    for x in hooks: x.remove()
    return got
W = model.lm_head.weight
def fisher(first):
    def loss(h):
        g = torch.zeros_like(h)
        for i in range(first, n, 1024):
            x = h[0, i:i+1024]
            prob = (x @ W.T).float().softmax(-1)
            y = torch.multinomial(prob, 1)
            prob.scatter_add_(1, y, -torch.ones_like(prob[:, :1]))
            g[0, i:i+1024] = prob.to(h.dtype) @ W
        return g
    return loss
def margins(spots, ids):
    """Random signs of log odds of the right tokens: spots are positions of answer tokens."""
    def loss(h):
        g = torch.zeros_like(h)
        at = torch.tensor(spots, device=dev)
        logits = (h[0, at - 1] @ W.T).float()
        y = ids[0, at][:, None]
        right = (logits.argmax(-1, keepdim=True) == y) | small
        others = logits.scatter(1, y, -torch.inf).softmax(-1)
        d = -others; d.scatter_(1, y, 1.0)
        sign = (torch.randint(0, 2, (len(spots), 1), device=dev) * 2 - 1) * right
        g[0, at - 1] = (d * sign).to(h.dtype) @ W
        return g
    return loss
class Meter(P._Meter):
    grads = None; stop = None
    def __init__(self, *args): super().__init__(*args); self.paths = list(self.grads[0]); self.at = {}
    def see(self, op, call, exact):
        heads = call.query.shape[1]
        path = self.at.setdefault(call.layer, self.paths[len(self.at)])
        g = torch.stack([x[path].unflatten(1, (heads, -1)).transpose(0, 1) for x in self.grads])  # [draws, H, n, D]
        off = []
        for option in self.options:
            tried = P.with_rows(call, [option]).run(op)[0]
            d = (tried - exact)[0, :, :self.stop]
            off.append(torch.stack([(x[:, :self.stop] * d).float().sum(-1).square().sum(-1) for x in g]).mean(0))
        self.off[call.layer] = torch.stack(off, 1)
    def errors(self): return {k: v.double().cpu() for k, v in self.off.items()}
options = OPTIONS[5::5] + OPTIONS[-1:] if small else OPTIONS + (MORE if n > 8192 else ())
options = tuple(dict.fromkeys(options))
def measured(ids, losses, scale, stop=None):
    Meter.grads = [gradients(ids, f) for f in losses]; Meter.stop = stop
    with torch.no_grad(), P.rewritten(model, PerHead(EVERYTHING, block=128)):
        finder, reports = P.found_in(model, ids)
        of = {x.layer: x for x in reports if x.saved is not None and x.verdict == "rewritten"}
        meter = Meter(options, {}, True, lambda: None)
        with run_by(meter): model.model(ids, use_cache=False)
        sites = tuple(P.SiteProfile(of[k].saved.module, of[k].saved.index, None, tuple(map(tuple, (v * scale).tolist()))) for k, v in meter.errors().items())
        rows = tuple(P.rows_of(options, n, PerHead(EVERYTHING, block=128)))
    return P.Profile(options, n, 1, rows, sites)
# ------------------------------------------------ what is profiled
late = P.late(n)
texts = profiled_texts(); texts = dict(list(texts.items())[:1]) if small else texts
lm = []
for name, text in texts.items():
    lm.append(measured(ids_of(text), [fisher(late)] * a.draws, 0.5 / (n - late))); print("fisher", name, T(), flush=True)
r0 = random.Random(5)
def record_text(text, code, r, count):
    """Ledger entries hidden in a text, whose seals and casks are asked for at its end."""
    goods = "tin flax amber cork salt wool indigo pepper hides coal timber honey glass paper".split()
    facts, tail, spots = [], [], []
    mk = "# {}\n" if code else "{} "
    for i in range(count):
        number, casks, seal, good = r.randrange(1000, 100000), r.randrange(100, 999), "".join(r.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(4)), r.choice(goods)
        facts.append(((i + .5) / count * .95, f"Entry {number}: {casks} casks of {good}, seal {seal}."))
        q, x = (f"\nEntry {number}: {casks} casks of {good}, seal", f" {seal}") if i % 2 else (f"\nOf entry {number} the number of casks is", f" {casks}")
        tail.append((q, x))
    r.shuffle(tail)
    ids = []
    for q, x in tail:
        q, x = (tok(y, add_special_tokens=False).input_ids for y in (q, x))
        ids += q; spots += list(range(len(ids), len(ids) + len(x))); ids += x
    m = n - len(ids)
    body = needles.Hay(tok, text, code).with_facts(m, facts, r.randrange(50))
    return torch.tensor([body + ids], device=dev), [m + s for s in spots], m
ans = []
for i, (name, text) in enumerate((("genesis", texts["genesis"]),) if small else (("genesis", texts["genesis"]), ("pydecimal", texts["pydecimal"]), ("genesis2", texts["genesis"]), ("pydecimal2", texts["pydecimal"]))):
    ids, spots, m = record_text(text, "py" in name, r0, 8 if small else 20)
    with torch.no_grad():
        lg = torch.cat([model.lm_head(model.model(ids, use_cache=False).last_hidden_state[0, torch.tensor(spots, device=dev) - 1])]).float()
    right = (lg.argmax(-1) == ids[0, torch.tensor(spots, device=dev)]).float().mean()
    ans.append(measured(ids, [margins(spots, ids)] * a.draws, 1 / len(spots), m)); print(f"answers {name}: {right:.2f} of tokens right", T(), flush=True)
F, N = mean_of(lm), mean_of(ans)
if a.save: Path(a.save + "-F.json").write_text(F.to_json()); Path(a.save + "-N.json").write_text(N.to_json())
A = P.Profile.from_json(Path(a.profile).read_text()) if a.profile and not small else F
def added(x, y, c):
    by = {s.module: s for s in y.sites}
    return replace(x, sites=tuple(replace(s, nats=1.0, errors=tuple(tuple(p * s.nats + c * q * by[s.module].nats for p, q in zip(u, v)) for u, v in zip(s.errors, by[s.module].errors))) for s in x.sites))
def charge(f, plan):
    o = {x: i for i, x in enumerate(f.options)}
    return sum(float(s.weighted[h, o[x]]) for s in f.sites for h, x in enumerate(plan.rows[s.module]))
make = lambda f, rows=a.rows: chosen(f, rows, n)
window = lambda x: x.everything or x == Rows(x.sinks, x.recent)
pA = make(A); cF, cN, cA = (charge(f, pA) for f in (F, N, A))
print(f"A's plan: F {cF:.4f} N {cN:.4f} A {cA:.4f}")
todo = {"A": pA, "F": make(F), "N": make(N), "F+N": make(added(F, N, cF / max(cN, 1e-9))), "F+4N": make(added(F, N, 4 * cF / max(cN, 1e-9))), "F+16N": make(added(F, N, 16 * cF / max(cN, 1e-9))), "A+N": make(added(A, N, cA / max(cN, 1e-9))),
        "A+4N": make(added(A, N, 4 * cA / max(cN, 1e-9))), "A+F": make(added(A, F, cA / max(cF, 1e-9))), "F+4N W": make(only(added(F, N, 4 * cF / max(cN, 1e-9)), window)),
        "F+4N 2000": make(added(F, N, 4 * cF / max(cN, 1e-9)), 1.25 * a.rows), "F+4N no thin/prot": make(only(added(F, N, 4 * cF / max(cN, 1e-9)), lambda x: not x.thinned and not x.protected)), "A 2000": make(A, 1.25 * a.rows), "W": make(only(A, window))}
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
