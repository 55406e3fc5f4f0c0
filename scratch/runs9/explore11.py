"""Share of questions in the weights of layers: KL on two texts, needles of development, then the judged ones."""
import argparse, random, sys, time, json, glob, gzip
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch, numpy as np
import needles, plans
from measures import token_statistics
from models import _bible, _code, profiled_texts
from plans import MODELS, chosen, average_rows
from express_compile.core.call import run_by
from express_compile.kernels.heads import PerHead, EVERYTHING
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--model", default="qwen"); p.add_argument("--length", type=int, default=16384)
p.add_argument("--rows", type=float, nargs="+", default=[1600]); p.add_argument("--judge", type=int, default=24); p.add_argument("--block", type=int, default=128)
p.add_argument("--limit", type=float, default=250); p.add_argument("--out", default="explore10.txt"); p.add_argument("--profiles", help="folder of SAMPLE.late.json, SAMPLE.last.json"); p.add_argument("--last", type=int, default=64)
p.add_argument("--make", type=int, default=0); p.add_argument("--late"); p.add_argument("--both"); p.add_argument("--judged", nargs="*", default=[]); p.add_argument("--texts", type=int, default=4); p.add_argument("--each", type=int, default=3); p.add_argument("--batch", type=int, default=8); p.add_argument("--query-heads", type=int, default=0); p.add_argument("--variants", nargs="+", default=None); p.add_argument("--threads", type=int, default=0)
a = p.parse_args(); start = time.perf_counter()
T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
if a.threads: torch.set_num_threads(a.threads)
torch.set_grad_enabled(False)
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n, plans.BLOCK = a.length, a.block
own = PerHead(EVERYTHING, block=a.block)
def load(path): return P.Profile.from_json(json.dumps({"block": 128, **json.loads((gzip.open(path, "rt") if path.endswith("gz") else open(path)).read())}))
late, both = load(a.late), load(a.both)
def unit(x): m = np.array([s.nats * np.array(s.errors).sum(0).mean() for s in x.sites]); return m / m.sum()
t, j = unit(late), unit(both); q = np.maximum(2 * j - t, 0); q /= q.sum(); print("late", np.round(100 * t, 1).tolist(), "questions", np.round(100 * q, 1).tolist())
def variant(w):
    return replace(both, sites=tuple(replace(s, nats=float(((1 - w) * x + w * y) / np.array(s.errors).sum(0).mean())) for s, x, y in zip(both.sites, t, q)))
V = {w: (lambda w=w: variant(float(w))) for w in a.variants}
some = both
WORDS = "alcove badger canyon dahlia easel fiddle gravel harness igloo jigsaw kayak lemon mitten nutmeg oboe pillow quartz rudder shovel tunnel urn vessel whistle yeast".split()
NOISE3 = "A kite hangs over the harbor. The clerk counts his stamps. Two carts stand before the inn, and the hay is dry. Behind the wall a child sings.\nFog comes up from the river. The tailor threads his needle.\n"
HAYS = {"noise": NOISE3, "prose": _bible("The words of Jeremiah the son", 250_000), "code": _code("unittest.mock", "ast")}
DEV = {"john": _bible("In the beginning was the Word", 170_000), "optparse": _code("optparse", "pdb", "tokenize")}
hays = {k: needles.Hay(tok, t, k == "code") for k, t in HAYS.items()}
def asked(r, name, kind):
    facts, qs = [], []
    keys = needles._keys(kind, 6, r, WORDS)
    for k in keys[:4]:
        c, d = needles._code(r), r.uniform(.02, .95)
        facts.append((d, f"Parcel {k} weighs {c} grams.")); qs.append(("four", f"\n\nHow heavy is parcel {k}? Parcel {k} weighs", f" {c}"))
    for k in keys[4:]:
        c, d = [needles._code(r), needles._code(r)], r.uniform(.02, .8)
        facts += [(d, f"A seal of {k} is {c[0]}."), (r.uniform(d, .95), f"A seal of {k} is {c[1]}.")]
        qs.append(("two", f"\n\nWhich two seals has {k}, in the order of the text? They are", f" {c[0]} and {c[1]}"))
    hay = hays[name]
    return hay.with_facts(n - 64, facts, r.randrange(len(hay.lines))), [(t, tok(q, add_special_tokens=False).input_ids, tok(x, add_special_tokens=False).input_ids) for t, q, x in qs]
r = random.Random(3); cases = [asked(r, list(hays)[i % 3], needles.KINDS[i // 3 % 3]) for i in range(a.judge)]
def prefilled(ids, rows):
    with run_by(P.Chosen(rows)): return model.model(ids, use_cache=True).past_key_values
def answers(cache, qs):
    size, out = cache.get_seq_length(), []
    for _, q, x in qs:
        hidden = model.model(torch.tensor([q + x], device=dev), past_key_values=cache, use_cache=True).last_hidden_state
        out.append(model.lm_head(hidden[:, len(q) - 1:-1])[0].float().log_softmax(-1)); cache.crop(size - cache.get_seq_length())
    return out
kl = lambda p, q: float((p.exp() * (p - q)).sum(-1).mean())
dev_ids = {k: tok(t[: 10 * n], return_tensors="pt").input_ids[:, :n].to(dev) for k, t in DEV.items()}
assert all(x.shape[1] == n for x in dev_ids.values()), {k: x.shape for k, x in dev_ids.items()}
with P.rewritten(model, own):
    _, reports = P.found_in(model, [dev_ids["john"]])
    layer_of = {(x.saved.module, x.saved.index): x.layer for x in reports if x.saved is not None and x.verdict == "rewritten"}
    layers = [layer_of[s.module, s.index] for s in some.sites]
    def judge(rows):
        hidden = {}
        with run_by(P.Chosen(rows)):
            for k, x in dev_ids.items(): hidden[k] = model.model(x, use_cache=False).last_hidden_state
        nll, hit, lps = [], [], []
        for ids, qs in cases:
            for (t, q, x), lp in zip(qs, answers(prefilled(torch.tensor([ids], device=dev), rows), qs)):
                t = torch.tensor(x, device=dev); lps.append(lp)
                nll.append(float(-lp[torch.arange(len(x), device=dev), t].sum())); hit.append(bool((lp.argmax(-1) == t).all()))
        return hidden, nll, hit, lps
    exact, nll0, hit0, lp0 = judge({})
    solved = [i for i, h in enumerate(hit0) if h]
    print(f"exact finds {len(solved)} of {len(hit0)}; {T()}", flush=True)
    for budget in a.rows:
        for name in a.variants or V:
            if time.perf_counter() - start > a.limit: print("cut", name); break
            plan = chosen(V[name](), budget, n, last=a.last)
            rows = {l: list(plan.rows[s.module]) for l, s in zip(layers, some.sites)}
            hidden, nll, hit, lp = judge(rows)
            k = [float(token_statistics(exact[x], hidden[x], model.lm_head, dev_ids[x]).tail(P.late(n)).kl.mean()) for x in dev_ids]
            d = np.array([nll[i] - nll0[i] for i in solved]); e = np.array([kl(lp0[i], lp[i]) for i in solved])
            line = f"{budget:g} {name:16s} rows {average_rows(plan, n):6.0f} KL {' '.join(f'{x:.4f}' for x in k)} found {sum(hit[i] for i in solved)}/{len(solved)} nats {d.mean():.3f} median {np.median(d):.3f} KL of answers {e.mean():.4f} median {np.median(e):.4f}"
            print(line, T(), flush=True); open(a.out, "a").write(line + "\n")
if a.judged:
    ids = {k: tok(x[: 8 * n], return_tensors="pt").input_ids[:, :n].to(dev) for k, x in list(plans.judged_texts().items())[: a.texts]}
    judge = plans.Judge(model, ids, needles.cases(tok, n + 1, {"noise": plans.NOISE, **plans.haystacks()}, a.each), a.batch, dev)
    print(f"judged: exact finds {len(judge.cases)}", T(), flush=True)
    for w in a.judged:
        found = judge.rows(chosen(V[w](), a.rows[0], n, last=a.last))
        print("judged", w, round(next(x["value"] for x in found if x["metric"] == "kl"), 5), sum(x["value"] for x in found if x["metric"] == "recalled"), {x["task"]: (x["value"], x["high"]) for x in found if x["metric"] == "recalled"}, T(), flush=True)
