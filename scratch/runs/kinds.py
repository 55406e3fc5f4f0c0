"""Nats per error by kind of rows: does a plan chosen by them lose less? Judged on texts that are neither profiled nor judged elsewhere, and on the judged ones."""
import argparse, sys, time, pickle, os
from dataclasses import replace
sys.path.insert(0, "examples/bench")
import numpy as np, torch
import plans
from models import _bible, _code, profiled_texts, judged_texts, haystacks
from needles import NOISE, cases
from plans import Judge, MODELS, OPTIONS, MORE, LAST, base, chosen, mean_of, average_rows, only
from express_compile.core.call import run_by
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--model", default="smollm2"); p.add_argument("--length", type=int, default=8192)
p.add_argument("--rows", type=float, nargs="+", default=[1350, 700]); p.add_argument("--each", type=int, default=2); p.add_argument("--batch", type=int, default=8)
p.add_argument("--limit", type=float, default=150); p.add_argument("--out", default="kinds.txt"); p.add_argument("--layers", type=int, default=0)
a = p.parse_args(); start = time.perf_counter(); dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32); n = a.length
if a.layers: model.model.layers = model.model.layers[:a.layers]; model.config.num_hidden_layers = a.layers
options = OPTIONS[5::7] + OPTIONS[-1:] if n < 1024 else OPTIONS + (MORE if n > 8192 else ())
kind = lambda r: (bool(r.thinned), bool(r.protected), bool(r.selected))
found_kinds = []
def ratios(model, batch, exact, errors, options, rows, advance):
    found, every = dict.fromkeys(errors, 0.0), {}
    few = sorted((x, o) for o, x in enumerate(rows) if not options[o].everything)
    middle = few[len(few) // 2][1]
    groups = {}
    for x, o in few: groups.setdefault(kind(options[o]), []).append(o)
    mids = {k: os_[len(os_) // 2] for k, os_ in groups.items()}
    for layer, of_heads in errors.items():
        for o in {middle, *mids.values()}:
            e = float(of_heads[:, o].sum())
            if e > 0:
                with run_by(P.Chosen({layer: [options[o]]})):
                    r = max(P.mean_kl(exact, P.logits_of(model, batch), P.late(exact.shape[1])), 0.0) / e
                if o == middle: found[layer] = r
                for k, m in mids.items():
                    if m == o: every.setdefault(layer, {})[k] = r
        advance()
    found_kinds.append([every.get(layer, {}) for layer in errors]); return found
P._ratios = ratios
def ids_of(text):
    ids = tok(text[: 10 * n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
profs = [P.profile(model, ids_of(t), options, block=128) for t in list(profiled_texts().values())[: 3 if n >= 1024 else 1]]
found = mean_of(profs); print(f"profile {time.perf_counter()-start:.0f} s", flush=True)
sites = []
spread = []
for i, site in enumerate(found.sites):
    per = {k: P.geometric_mean([f[i].get(k, 0.0) for f in found_kinds]) for k in {k for f in found_kinds for k in f[i]}}
    spread.append({k: v / site.nats if site.nats else 0 for k, v in per.items()})
    w = [per.get(kind(o), site.nats) / site.nats if site.nats else 1.0 for o in options]
    sites.append(replace(site, errors=tuple(tuple(e * f for e, f in zip(h, w)) for h in site.errors)))
kinds = replace(found, sites=tuple(sites))
for k in sorted({k for s in spread for k in s}):
    x = np.array([s[k] for s in spread if s.get(k)]); print(k, "ratio to middle: median %.2f, 10%% %.2f, 90%% %.2f" % tuple(np.quantile(x, [.5, .1, .9])))
texts = {"john": _bible("In the beginning was the Word", 130_000), "optparse": _code("optparse", "pdb"), **judged_texts()}
cs = cases(tok, n + 1, {"noise": NOISE, **haystacks()}, a.each) if n >= 1024 else []
judge = Judge(model, {k: ids_of(t) for k, t in texts.items()}, cs, a.batch, dev)
lines = []
stream = lambda x: only(x, lambda r: r.everything or r == plans.Rows(r.sinks, r.recent))
for budget in a.rows:
    for name, prof in {"base": found, "kinds": kinds, "base, window or everything": stream(found), "base, no thinned": only(found, lambda r: not r.thinned), "kinds, no thinned": only(kinds, lambda r: not r.thinned)}.items():
        if time.perf_counter() - start > a.limit: print("cut", name); continue
        plan = chosen(prof, budget, n); rows = judge.rows(plan)
        kl = {r["task"].split(": ")[-1][:9]: r["value"] for r in rows if r["metric"] == "kl"}
        rec = [(r["value"], r["high"]) for r in rows if r["metric"] == "recalled"]
        line = f"{budget:g} {name:28s} rows {average_rows(plan, n):6.0f} " + " ".join(f"{k} {v:.4f}" for k, v in kl.items()) + f" recall {sum(v for v, _ in rec)}/{sum(h for _, h in rec)}"
        print(line, f"{time.perf_counter()-start:.0f} s", flush=True); lines.append(line); open(a.out, "w").write("\n".join(lines))
