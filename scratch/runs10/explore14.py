"""Plans of caches by what questions lose that read the cache: needles of development on SmolLM2 or Qwen, CPU or GPU."""
import argparse, random, sys, time, json
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch, numpy as np
import needles, plans, caching
from plans import PROFILED_NOISE
from models import _bible, _code, profiled_texts, profiled_haystacks
from plans import MODELS, chosen
from express_compile import ExpressCache, rewrite_attention, restore_attention
from express_compile.core.rows import Rows
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--model", default="smollm2"); p.add_argument("--length", type=int, default=1024)
p.add_argument("--rows", type=float, nargs="+", default=[256]); p.add_argument("--judge", type=int, default=24); p.add_argument("--folder"); p.add_argument("--limit", type=float, default=1e9)
a = p.parse_args(); start = time.perf_counter(); T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"; n = a.length
torch.set_grad_enabled(False)
if dev == "cpu": torch.set_num_threads(1)
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
R = Rows; k = max(1, n // 1024)
OPT = caching.Caching.options if n > 4096 else tuple(dict.fromkeys([R(8, x * k) for x in (32, 64, 128, 256, 512)] + [R(8, 64 * k, 64 * k, 64 * k), R(8, 128 * k, 128 * k, 128 * k), R(8, 128 * k, 256 * k)] + [R(8, x * k, protected=y * k) for x, y in ((64, 64), (128, 128), (64, 256), (256, 256))] + [EVERYTHING]))
OPT = tuple(x for x in OPT if not x.selected)
F = Path(a.folder); F.mkdir(exist_ok=True); block = 16
def ids_of(t): return tok(t[: 10 * n], return_tensors="pt").input_ids[:, :n].to(dev)
def made(name, f):
    path = F / f"{a.model}.{n}.{name}.json"
    if not path.exists(): path.write_text(f().to_json()); print("profile", name, T(), flush=True)
    return P.Profile.from_json(path.read_text())
hay = {"noise": PROFILED_NOISE, **profiled_haystacks()}
qs = {x: torch.tensor([v], device=dev) for x, v in needles.profiled_questions(tok, n, hay, min(256, n // 8)).items()}
late = P.joined([made(f"late.{x}", lambda: P.profile(model, ids_of(t), OPT, block=block)) for x, t in profiled_texts().items()])
reading = P.joined([made(f"reading.{x}", lambda: P.profile(model, v, OPT, block=block, only_last=True)) for x, v in qs.items()])
def unit(x): m = np.array([s.nats * np.array(s.errors).sum(0).mean() for s in x.sites]); return m / m.sum()
print("late", np.round(100 * unit(late), 1).tolist()); print("reading", np.round(100 * unit(reading), 1).tolist())
V = {"late": late, "both 3": P.joined([late, reading], [1, 3]), "both 9": P.joined([late, reading], [1, 9]), "both 27": P.joined([late, reading], [1, 27]), "reading": reading}
WORDS = "alcove badger canyon dahlia easel fiddle gravel harness igloo jigsaw kayak lemon mitten nutmeg oboe pillow quartz rudder shovel tunnel urn vessel whistle yeast".split()
NOISE3 = "A kite hangs over the harbor. The clerk counts his stamps. Two carts stand before the inn, and the hay is dry. Behind the wall a child sings.\nFog comes up from the river. The tailor threads his needle.\n"
HAYS = {"noise": NOISE3, "prose": _bible("The words of Jeremiah the son", 250_000), "code": _code("unittest.mock", "ast")}
DEV = {"john": _bible("In the beginning was the Word", 170_000), "optparse": _code("optparse", "pdb", "tokenize")}
hays = {x: needles.Hay(tok, t, x == "code") for x, t in HAYS.items()}
def asked(r, name, kind):
    facts, q = [], []
    for key in needles._keys(kind, 4, r, WORDS):
        c, d = needles._code(r), r.uniform(.02, .95)
        facts.append((d, f"Parcel {key} weighs {c} grams.")); q.append((f"\n\nHow heavy is parcel {key}? Parcel {key} weighs", f" {c}"))
    h = hays[name]
    return h.with_facts(n - 64, facts, r.randrange(len(h.lines))), [(tok(x, add_special_tokens=False).input_ids, tok(y, add_special_tokens=False).input_ids) for x, y in q]
r = random.Random(3); cases = [asked(r, list(hays)[i % 3], needles.KINDS[i // 3 % 3]) for i in range(a.judge)]
rewrite_attention(model, methods=["exact"])
given = []
for ids, q in cases:
    x = caching.read(model, torch.tensor([ids + q[0][0]], device=dev), len(ids), 0)
    given.append(x)
texts = [caching.read(model, ids_of(t), n - n // 4, 0) for t in DEV.values()]
def hits(make):
    out = []
    for x, (ids, q) in zip(given, cases):
        for ask, ans in q:
            full = torch.tensor([ids + ask + ans], device=dev)
            h = model.model(full[:, len(ids):-1], past_key_values=make(x), position_ids=torch.arange(len(ids), full.shape[1] - 1, device=dev)[None]).last_hidden_state
            lp = model.lm_head(h[:, len(ask) - 1:])[0].float().log_softmax(-1); t = torch.tensor(ans, device=dev)
            out.append((bool((lp.argmax(-1) == t).all()), float(-lp[torch.arange(len(ans)), t].sum())))
    return out
def kls(make):
    out = []
    for x in texts:
        h, held = caching.follow(model, x.ids, x.n, make(x), 32)
        p, q = (model.lm_head(y)[0].float().log_softmax(-1) for y in (x.exact, h)); out.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return out, held
exact = hits(lambda x: x.full(model)); solved = [i for i, (h, _) in enumerate(exact) if h]
print(f"exact finds {len(solved)} of {len(exact)}", T(), flush=True)
count = caching.Counted(n // 4, 32)
for budget in a.rows:
    plans_ = {x: chosen(v, budget, n - n // 4, last=0, count=count) for x, v in V.items()}
    for x in ("late",):
        plans_["window or everything, " + x] = chosen(plans.only(V[x], lambda r: r.everything or r == Rows(r.sinks, r.recent)), budget, n - n // 4, last=0, count=count)
    for name, plan in plans_.items():
        make = caching.by_plan(model, plan); k_, held = kls(make); got = hits(make)
        d = [got[i][1] - exact[i][1] for i in solved]
        print(f"{budget:g} {name:20s} held {held:.0f} KL {' '.join(f'{x:.4f}' for x in k_)} found {sum(got[i][0] for i in solved)}/{len(solved)} nats {np.mean(d):.3f} median {np.median(d):.3f}", T(), flush=True)
