"""Weights of layers by what last queries, exact, lose through keys and values of later layers: plans on needles of dev."""
import argparse, random, sys, time, json, gzip
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
p.add_argument("--rows", type=float, default=1600); p.add_argument("--cases", type=int, default=6); p.add_argument("--judge", type=int, default=24)
p.add_argument("--limit", type=float, default=250); p.add_argument("--out", default="explore9.txt"); p.add_argument("--profile"); p.add_argument("--layers", type=int, default=0)
p.add_argument("--variants", nargs="+", default=["base", "N.5", "N1", "T.5"])
p.add_argument("--save", default=""); p.add_argument("--taken", default=""); p.add_argument("--pick", default="")
a = p.parse_args(); start = time.perf_counter()
T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_grad_enabled(False)
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length
if a.layers: model.model.layers = model.model.layers[:a.layers]; model.config.num_hidden_layers = a.layers
found = P.Profile.from_json(gzip.open(a.profile, "rt").read() if a.profile.endswith("gz") else Path(a.profile).read_text())
if a.layers: found = replace(found, sites=found.sites[:a.layers])
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
own = PerHead(EVERYTHING, block=128)
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
def made(seed, count):
    r = random.Random(seed); return [asked(r, list(hays)[i % 3], needles.KINDS[i // 3 % 3]) for i in range(count)]
def prefilled(ids, rows):
    with run_by(P.Chosen(rows)):
        return model.model(ids, use_cache=True).past_key_values
def answers(cache, qs):
    """log-probabilities of questions with answers, exact over the cache."""
    size = cache.get_seq_length(); out = []
    for _, q, x in qs:
        hidden = model.model(torch.tensor([q + x], device=dev), past_key_values=cache, use_cache=True).last_hidden_state
        out.append(model.lm_head(hidden)[0, :-1].float().log_softmax(-1))
        cache.crop(size - cache.get_seq_length())
    return out
kl = lambda p, q: float((p.exp() * (p - q)).sum(-1).mean())
cheapest = found.options[min((x, o) for o, x in enumerate(found.rows) if not found.options[o].everything)[1]]
cheap_at = found.options.index(cheapest)
texts = {k: ids_of(v) for k, v in profiled_texts().items()}
dev_ids = {k: ids_of(t) for k, t in DEV.items()}
with P.rewritten(model, own):
    _, reports = P.found_in(model, [texts["genesis"]])
    layer_of = {(r.saved.module, r.saved.index): r.layer for r in reports if r.saved is not None and r.verdict == "rewritten"}
    layers = [layer_of[s.module, s.index] for s in found.sites]
    # --- A: what one layer loses
    if a.taken:
        D = json.load(open(a.taken)); KN, KT = np.array(D["N"]), np.array(D["T"])
    else:
        mine = made(101, a.cases); KN, KT = [], []
        for c, (ids, qs) in enumerate(mine):
            ids, qs = torch.tensor([ids], device=dev), qs[c % 2 :: 2]
            exact = answers(prefilled(ids, {}), qs)
            one = []
            for l in layers:
                got = answers(prefilled(ids, {l: [cheapest]}), qs)
                one.append(np.mean([kl(p, q) for p, q in zip(exact, got)]))
            KN.append(one)
        print("N", json.dumps(np.round(KN, 5).tolist()), T(), flush=True)
        for k, x in texts.items():
            q = [("", x[0, -256:-1].tolist(), x[0, -1:].tolist())]
            (exact,) = answers(prefilled(x[:, :-256], {}), q)
            KT.append([kl(exact, answers(prefilled(x[:, :-256], {l: [cheapest]}), q)[0]) for l in layers])
        print("T", json.dumps(np.round(KT, 5).tolist()), T(), flush=True)
        KN, KT = np.array(KN), np.array(KT)
        if a.save: json.dump({"N": KN.tolist(), "T": KT.tolist()}, open(a.save, "w"))
    E = np.array([np.array(s.errors)[:, cheap_at].sum() for s in found.sites])
    M = np.array([np.array(s.errors).sum(0).mean() for s in found.sites])
    old = np.array([s.nats for s in found.sites])
    def unit(K):
        w = np.maximum(K, 0) / E; return (w / (w * M).sum(1, keepdims=True)).mean(0)
    W = {"N": unit(KN), "T": unit(KT), "A": (unit(KN) + unit(KT)) / 2}; o = old / (old * M).sum()
    print("share of layers: old", np.round(o * M, 3).tolist(), "N", np.round(W["N"] * M, 3).tolist(), "T", np.round(W["T"] * M, 3).tolist(), flush=True)
    def variant(name):
        if name == "base": return found
        k, x = name[0], float(name[1:]); w = (1 - x) * o + x * W[k]
        return replace(found, sites=tuple(replace(s, nats=float(v)) for s, v in zip(found.sites, w)))
    # --- C: judge
    cases = made(3, a.judge)
    def judge(rows):
        hidden = {}
        with run_by(P.Chosen(rows)):
            for k, x in dev_ids.items(): hidden[k] = model.model(x, use_cache=False).last_hidden_state
        nll, hit, lost = [], [], []
        for ids, qs in cases:
            got = answers(prefilled(torch.tensor([ids], device=dev), rows), qs)
            for (t, q, x), lp in zip(qs, got):
                lp = lp[len(q) - 1:]; t = torch.tensor(x, device=dev)
                nll.append(float(-lp[torch.arange(len(x), device=dev), t].sum())); hit.append(bool((lp.argmax(-1) == t).all())); lost.append(lp)
        return hidden, nll, hit, lost
    exact, nll0, hit0, lp0 = judge({})
    solved = [i for i, h in enumerate(hit0) if h or a.layers]
    print(f"exact finds {len(solved)} of {len(hit0)}; {T()}", flush=True)
    late = P.late(n); results = {}
    for name in a.variants:
        if time.perf_counter() - start > a.limit: print("cut", name); break
        plan = chosen(variant(name), a.rows, n, last=64)
        rows = {l: list(plan.rows[s.module]) for l, s in zip(layers, found.sites)}
        hidden, nll, hit, lp = judge(rows)
        k = [float(token_statistics(exact[x], hidden[x], model.lm_head, dev_ids[x]).tail(late).kl.mean()) for x in dev_ids]
        d = np.array([nll[i] - nll0[i] for i in solved]); r = np.array([kl(lp0[i], lp[i]) for i in solved])
        line = f"{name:8s} rows {average_rows(plan, n):6.0f} KL {' '.join(f'{x:.4f}' for x in k)} found {sum(hit[i] for i in solved)}/{len(solved)} nats {d.mean():.3f} median {np.median(d):.3f} KL of answers {r.mean():.4f} median {np.median(r):.4f}"
        print(line, T(), flush=True)
        with open(a.out, "a") as f: f.write(line + "\n")
        results[name] = d.mean(), sum(k)
    if a.pick and results:
        fine = [x for x in results if results[x][1] <= 1.25 * results["base"][1]]
        best = min(fine, key=lambda x: results[x][0])
        print("PICKED", best, flush=True)
        Path(a.pick).write_text(variant(best).to_json())
