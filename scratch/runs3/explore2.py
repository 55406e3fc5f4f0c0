"""Which choice by a profile of query heads keeps Qwen's needles: developed on other texts, haystacks, templates and keys than are judged."""
import argparse, random, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch
import needles, plans
from models import _bible, _code, profiled_texts
from plans import Judge, MODELS, OPTIONS, MORE, LAST, base, chosen, mean_of, average_rows, only, recalled, place
from express_compile.core.rows import Rows
from express_compile.quality import profile as P

p = argparse.ArgumentParser(); p.add_argument("--model", default="qwen"); p.add_argument("--length", type=int, default=16384)
p.add_argument("--rows", type=float, default=1600); p.add_argument("--each", type=int, default=8); p.add_argument("--batch", type=int, default=8)
p.add_argument("--limit", type=float, default=500); p.add_argument("--out", default="explore2.txt"); p.add_argument("--profile"); p.add_argument("--norms", action="store_true")
p.add_argument("--save", default=""); p.add_argument("--only", default=".")
a = p.parse_args(); start = time.perf_counter()
dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length
if n < 1024: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
needles.WORDS = tuple("anchor bramble candle dagger ember feather granite hammock inkwell jasmine kestrel lagoon marble napkin oyster parsley quiver ribbon saddle trellis urchin violin wicker zephyr".split())
def _named(key, code, depth):
    q = f"Which locker number has {key}? The locker number of {key} is"
    return [(depth, f"The locker number of {key} is {code}.")], q, f" {code}"
needles._named = _named
def _two(kind, depth, r):
    (key,), codes = needles._keys(kind, 1, r), [needles._code(r), needles._code(r)]
    depths = [depth, r.uniform(depth, 0.95)]
    return [(d, f"A locker number of {key} is {c}.") for d, c in zip(depths, codes)], f"Which two locker numbers has {key}, in the order of the text? They are", f" {codes[0]} and {codes[1]}"
needles._two_values = _two
NOISE2 = "The train leaves the valley at dawn. Nobody looks out of the window. A dog barks once, and the gate is shut. Above the town the mill turns slowly.\nSnow lies on the fields. The smith lights his fire.\n"
HAYS = {"noise": NOISE2, "prose": _bible("The words of Jeremiah the son", 250_000), "code": _code("unittest.mock", "ast")}
DEV = {"john": _bible("In the beginning was the Word", 130_000), "optparse": _code("optparse", "pdb")}
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n, ids.shape; return ids

def squares2(x, y, first, groups, weight):
    """Per token squares, aggregated: sum, and root of the sum of squares. [2, groups]"""
    by = None if weight is None else weight.detach().unflatten(1, (groups, -1)).transpose(0, 1).float()
    out = []
    for i in range(first, x.shape[2], P._CHUNK):
        part = x[:, :, i:i+P._CHUNK].float() - (0 if y is None else y[:, :, i:i+P._CHUNK].float())
        part = part.unflatten(1, (groups, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
        part = part if by is None else part @ by.mT
        out.append(part.square().sum(-1, dtype=torch.float64))
    e = torch.cat(out, 1)
    return e.sum(1), e
stash = []
class Meter(P._Meter):
    def __init__(self, *args):
        super().__init__(*args); self.more = {}
    def see(self, op, call, exact):
        heads, weight = call.query.shape[1], self.projections.get(call.layer)
        first, off, l4 = P.late(call.Lk), [], []
        whole, each = squares2(exact, None, first, 1, weight)
        for option in self.options:
            tried = P.with_rows(call, [option]).run(op)[0]
            s, e = squares2(tried, exact, first, heads, weight)
            off.append(s)
            r = e / each  # relative to the token's own output
            l4.append(torch.stack([r.mean(1), r.square().mean(1).sqrt(), r.topk(max(1, r.shape[1] // 100), 1).values.mean(1)]))
            self.advance()
        self.off[call.layer] = torch.stack(off, 1); self.whole[call.layer] = whole
        self.more[call.layer] = torch.stack(l4, 2).cpu()
    def errors(self):
        stash.append(list(self.more.values())); return super().errors()

options = OPTIONS[5::7] + OPTIONS[-1:] if n < 1024 else OPTIONS + (MORE if n > 8192 else ())
norms = {}
if a.norms:
    P._Meter = Meter
    profs, alts = [], {k: [] for k in ("relative", "relative L4", "relative top 1%")}
    for name, text in profiled_texts().items():
        found = P.profile(model, ids_of(text), options, block=128, query_heads=True)
        more, rows = stash.pop(), found.rows
        few = sorted((x, o) for o, x in enumerate(rows) if not options[o].everything); mid = few[len(few)//2][1]
        profs.append(found)
        for j, k in enumerate(alts):
            sites = []
            for site, m in zip(found.sites, more):
                e, b = sum(h[mid] for h in site.errors), float(m[j][:, mid].sum())
                sites.append(replace(site, errors=tuple(map(tuple, m[j].tolist())), nats=site.nats * e / b if b else 0.0))
            alts[k].append(replace(found, sites=tuple(sites)))
        print(f"profile {name} {time.perf_counter()-start:.0f} s", flush=True)
    A = mean_of(profs); norms = {k: mean_of(v) for k, v in alts.items()}
    if a.save:
        for k, v in {"base": A, **norms}.items(): Path(f"{a.save}-{k.replace(' ', '').replace('%', '')}.json").write_text(v.to_json())
else:
    A = P.Profile.from_json(Path(a.profile).read_text())

window = lambda x: x.everything or x == Rows(x.sinks, x.recent)
def inflated(f, c):
    keep = [1.0 if window(o) else c for o in f.options]
    return replace(f, sites=tuple(replace(s, errors=tuple(tuple(e*k for e, k in zip(h, keep)) for h in s.errors)) for s in f.sites))
L = len(A.sites)
def weighed(f, c, layers):
    return replace(f, sites=tuple(replace(s, nats=s.nats * (c if i in layers else 1)) for i, s in enumerate(f.sites)))
thirds = [range(L * i // 3, L * (i + 1) // 3) for i in range(3)]
def part(plan, layers):
    names = [s.module for s in A.sites]
    return replace(plan, rows={m: (r if names.index(m) in layers else [Rows(everything=True)]) for m, r in plan.rows.items()})
make = lambda f, rows=a.rows: chosen(f, rows, n)
W = only(A, window)
todo = {"streaming last": plans.uniform(a.rows, n, LAST)["streaming, last exact"], "A": make(A), "W": make(W)}
todo |= {f"A, approximate x{c}": make(inflated(A, c)) for c in (1.4, 2, 4)}
for k, v in norms.items(): todo[k] = make(v); todo[k + ", windows"] = make(only(v, window))
todo |= {f"A in third {i} alone": part(todo["A"], t) for i, t in enumerate(thirds)}
todo |= {f"W in third {i} alone": part(todo["W"], t) for i, t in enumerate(thirds)}
todo |= {f"W, third {i} x4": make(weighed(W, 4, t)) for i, t in enumerate(thirds)}
todo |= {f"A, third {i} x4": make(weighed(A, 4, t)) for i, t in enumerate(thirds)}
todo |= {"A 1.25x rows": make(A, 1.25 * a.rows), "W 1.25x rows": make(W, 1.25 * a.rows), "W layers alike": make(replace(W, sites=tuple(replace(s, nats=1.0) for s in W.sites))),
         "A no selected": make(only(A, lambda x: not x.selected)), "A no thinned": make(only(A, lambda x: not x.thinned)), "A no protected": make(only(A, lambda x: not x.protected))}
import re; todo = {k: v for k, v in todo.items() if re.search(a.only, k)}
print({k: round(average_rows(v, n)) for k, v in todo.items()}, flush=True)
cs = [c for c in needles.cases(tok, n + 1, HAYS, a.each, seed=11) if c.task not in ("frequent", "single", "tracking")]
judge = Judge(model, {k: ids_of(t) for k, t in DEV.items()}, cs, a.batch, dev)
print(f"{len(judge.cases)} of {len(cs)} solved {dict(judge.solved)} {time.perf_counter()-start:.0f} s", flush=True)
lines, all_ = [], {}
for name, plan in todo.items():
    if time.perf_counter() - start > a.limit: print("cut", name); break
    with judge.following(plan):
        kl = {k: float(judge.statistics(k).kl.mean()) for k in judge.ids}
        hit = judge.found(judge.cases)
    all_[name] = hit
    by = {}
    for c, h in zip(judge.cases, hit):
        for k in (c.task[:5], c.haystack, c.kind): x = by.setdefault(k, [0, 0]); x[0] += h; x[1] += 1
    line = f"{name:26s} {average_rows(plan, n):6.0f} " + " ".join(f"{v:.4f}" for v in kl.values()) + f" {sum(hit)}/{len(hit)} " + " ".join(f"{k} {x[0]}/{x[1]}" for k, x in by.items())
    print(line, f"{time.perf_counter()-start:.0f} s", flush=True); lines.append(line); open(a.out, "w").write("\n".join(lines))
print("depths lost by A", sorted(round(c.depth, 2) for c, h in zip(judge.cases, all_.get("A", [])) if not h))
