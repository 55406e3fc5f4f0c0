"""Which profile is best for Qwen at 16k: developed on other texts, haystacks, templates and keys than are judged."""
import argparse, random, sys, time, uuid
from dataclasses import replace
sys.path.insert(0, "examples/bench")
import numpy as np, torch
import models, needles, plans
from models import _bible, _code, profiled_texts
from plans import Judge, MODELS, OPTIONS, MORE, LAST, SINKS, base, chosen, mean_of, summary, average_rows
from express_compile import Policy, restore_attention, rewrite_attention
from express_compile.core.rows import Rows
from express_compile.quality import profile as P
from measures import token_statistics

p = argparse.ArgumentParser(); p.add_argument("--model", default="qwen"); p.add_argument("--length", type=int, default=16384)
p.add_argument("--rows", type=float, default=1600); p.add_argument("--each", type=int, default=4); p.add_argument("--batch", type=int, default=4)
p.add_argument("--limit", type=float, default=500); p.add_argument("--out", default="explore.csv")
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

def facts_text(characters, seed=5):
    r = random.Random(seed); lines = _bible("The book of the generation of Jesus Christ", characters).replace("\n", " ").split(". ")
    names = "Abel Brita Carl Dora Emil Fanny Georg Hilda Ingo Jutta Kurt Lena Moritz Nora Otto Paula Quentin Rosa Stefan Thea Udo Vera Willi Xenia Yvonne Zeno".split()
    out, facts = [], []
    for i, line in enumerate(lines):
        out.append(line + ".")
        if i % 3 == 0:
            k = r.random()
            key = r.choice(names) + " " + r.choice(names) if k < .5 else f"room {r.randrange(100, 9999)}" if k < .75 else str(uuid.UUID(int=r.getrandbits(128)))
            code = str(r.randrange(10**5, 10**8)); facts.append((key, code))
            out.append(f"The badge of {key} bears {code}.")
        elif i % 3 == 1 and len(facts) > 3:
            key, code = r.choice(facts)
            out.append(f"What does the badge of {key} bear? The badge of {key} bears {code}.")
    return " ".join(out)

options = OPTIONS[5::7] + OPTIONS[-1:] if n < 1024 else OPTIONS + (MORE if n > 8192 else ())
weights = [None]; stash = []
squares = P._squares
def squares_w(x, y, first, groups, weight, w):
    keep = P._CHUNK; total = 0
    for i in range(first, x.shape[2], keep):
        xs = x[:, :, i:i+keep].float() - (0 if y is None else y[:, :, i:i+keep].float())
        xs = xs * w[i:i+keep].sqrt()[None, None, :, None]
        total = total + squares(xs, None, 0, groups, weight)
    return total
class Meter(P._Meter):
    def __init__(self, *args):
        super().__init__(*args); self.off_w, self.whole_w = {}, {}
    def see(self, op, call, exact):
        H_kv, weight = call.key.shape[1], self.projections.get(call.layer)
        first, off, off_w, w = P.late(call.Lk), [], [], weights[0]
        for option in self.options:
            tried = P.with_rows(call, [option]).run(op)[0]
            off.append(squares(tried, exact, first, H_kv, weight)); off_w.append(squares_w(tried, exact, first, H_kv, weight, w)); self.advance()
        self.off[call.layer] = torch.stack(off, 1); self.off_w[call.layer] = torch.stack(off_w, 1)
        self.whole[call.layer] = squares(exact, None, first, 1, weight); self.whole_w[call.layer] = squares_w(exact, None, first, 1, weight, w)
    def errors(self):
        stash.append([(x / self.whole_w[k]).nan_to_num(0.0).cpu() for k, x in self.off_w.items()])
        return super().errors()
P._Meter = Meter

def hidden(x): 
    with torch.no_grad(): return model.model(x, use_cache=False).last_hidden_state
def ids_of(text): 
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n, ids.shape; return ids
profs, profs_w = {}, {}
for name, text in {**profiled_texts(), "facts": facts_text(220_000)}.items():
    ids = ids_of(text); exact = hidden(ids)
    rewrite_attention(model, Policy(methods=(replace(base(0), rows=(Rows(SINKS, 1024 if n > 4096 else 128),)),)))
    kl = torch.tensor(token_statistics(exact, hidden(ids), model.lm_head, ids).kl, dtype=torch.float32); restore_attention(model)
    g = torch.zeros(n); g[-len(kl):] = kl if len(kl) < n else kl[-n:]
    if len(kl) == n - 1: g = torch.cat([kl, kl.new_zeros(1)])
    g = g.clamp(0, 5.0); late = P.late(n)
    w = .25 + .75 * g / g[late:].mean().clamp(min=1e-9); weights[0] = w.to(dev)
    print(f"{name}: window KL mean {kl.mean():.4f}", flush=True)
    found = P.profile(model, ids, options, block=128)
    profs[name] = found; err_w = stash.pop()
    rows = found.rows; few = sorted((x, o) for o, x in enumerate(rows) if not options[o].everything); mid = few[len(few)//2][1]
    sites = []
    for site, ew in zip(found.sites, err_w):
        e, b = sum(h[mid] for h in site.errors), float(ew[:, mid].sum())
        sites.append(replace(site, errors=tuple(map(tuple, ew.tolist())), nats=site.nats * e / b if b else 0.0))
    profs_w[name] = replace(found, sites=tuple(sites))
    print(f"profile {name} {time.perf_counter()-start:.0f} s", flush=True)
names = list(profiled_texts())
variants = {
    "A base": mean_of([profs[x] for x in names]), "C base weighted": mean_of([profs_w[x] for x in names]),
    "B base+facts": mean_of([*profs.values()]), "D base+facts weighted": mean_of([*profs_w.values()]),
    "E facts": profs["facts"], "F facts weighted": profs_w["facts"],
    "G natural+facts": mean_of([profs[x] for x in profs if x != "records"]),
}
cs = [c for c in needles.cases(tok, n + 1, HAYS, a.each, seed=11) if c.task not in ("frequent", "single")]
judge = Judge(model, {k: ids_of(t) for k, t in DEV.items()}, cs, a.batch, dev)
print(f"{len(judge.cases)} of {len(cs)} solved {dict(judge.solved)} {time.perf_counter()-start:.0f} s", flush=True)
lines = []
def run(name, plan):
    rows = judge.rows(plan)
    kl = {r["task"]: r["value"] for r in rows if r["metric"] == "kl"}
    rec = [(r["task"], r["value"], r["high"]) for r in rows if r["metric"] == "recalled"]
    by = {}
    for t, v, h in rec:
        k = t.split(",")[0]; x = by.setdefault(k, [0, 0]); x[0] += v; x[1] += h
    total = sum(v for _, v, _ in rec), sum(h for *_, h in rec)
    line = f"{name:28s} rows {average_rows(plan, n):7.0f} " + " ".join(f"{k.split(':')[-1].strip()[:8]} {v:.4f}" for k, v in kl.items()) + f" recall {total[0]}/{total[1]} " + " ".join(f"{k}:{x[0]}/{x[1]}" for k, x in by.items())
    print(line, f"{time.perf_counter()-start:.0f} s", flush=True); lines.append(line); open(a.out, "w").write("\n".join(lines))
un = plans.uniform(a.rows, n, LAST)
todo = {"streaming last": un["streaming, last exact"], **{k: chosen(v, a.rows, n) for k, v in variants.items()}}
todo["B 1.25x rows"] = chosen(variants["B base+facts"], 1.25 * a.rows, n)
for k, plan in todo.items():
    if time.perf_counter() - start > a.limit: print("cut", k); break
    run(k, plan)
