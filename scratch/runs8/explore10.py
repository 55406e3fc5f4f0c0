"""Ways to join what late and last queries of six samples lose (profiles by sample): KL on two texts, needles of development."""
import argparse, random, sys, time, json, glob
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
p.add_argument("--make", type=int, default=0); p.add_argument("--query-heads", type=int, default=0); p.add_argument("--variants", nargs="+", default=None); p.add_argument("--threads", type=int, default=0)
a = p.parse_args(); start = time.perf_counter()
T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
if a.threads: torch.set_num_threads(a.threads)
torch.set_grad_enabled(False)
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n, plans.BLOCK = a.length, a.block
own = PerHead(EVERYTHING, block=a.block)
F = Path(a.profiles); F.mkdir(exist_ok=True)
TEXTS, QS = ("genesis", "pydecimal", "records"), ("q noise", "q prose", "q code")
if a.make:
    bench = plans.Bench.__new__(plans.Bench); bench.tokenizer, bench.device, bench.args = tok, dev, None
    orig, got = P.joined, []
    P.joined = lambda each: (got.append(list(each)), orig(each))[1]
    for k, ids in bench.samples(n).items():
        k = k.replace("questions, ", "q ")
        P.profile(model, ids, plans.OPTIONS + (plans.MORE if n > plans.LONG else ()), block=a.block, last=256, query_heads=bool(a.query_heads))
        for kind, x in zip(("late", "last"), got[-1]): (F / f"{k}.{kind}.json").write_text(x.to_json())
        print("profile", k, T(), flush=True)
    P.joined = orig
each = {(k, w): P.Profile.from_json((F / f"{k}.{w}.json").read_text()) for k in TEXTS + QS for w in ("late", "last")}
late, last = [each[k, "late"] for k in TEXTS], [each[k, "last"] for k in TEXTS]
qlate, qlast = [each[k, "late"] for k in QS], [each[k, "last"] for k in QS]
J = P.joined
V = {"late": lambda: J(late), "late+last": lambda: J(late + last), "all six": lambda: J([J([x, y]) for x, y in zip(late + qlate, last + qlast)]),
     "late+qlast": lambda: J(late + qlast), "late+2 qlast": lambda: J(late + qlast + qlast), "late+4 qlast": lambda: J(late + qlast * 4), "six late": lambda: J(late + qlate), "late+last+qlast": lambda: J([J(late), J(last + qlast)])}
M = lambda f: (lambda w: np.round(w / w.sum() * 100, 1).tolist())(np.array([s.nats * np.array(s.errors).sum(0).mean() for s in f.sites]))
for k, f in (("late", J(late)), ("last", J(last)), ("qlate", J(qlate)), ("qlast", J(qlast))): print("share", k, M(f), flush=True)
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
some = each["genesis", "late"]
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
