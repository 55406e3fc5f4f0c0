"""Needles of all that were asked: how many exact attention finds, and others, and how many flip by rounding alone."""
import sys, time, csv, os
from collections import Counter
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch
from models import haystacks
from needles import NOISE, cases
from plans import MODELS, base, place, recalled, uniform
from express_compile import Policy, restore_attention, rewrite_attention
from express_compile.core.plan import SavedPlan
from express_compile.core.rows import Rows
start = time.perf_counter(); n = 16384
model, tok = MODELS["qwen"][1]("cuda", torch.bfloat16)
asked = cases(tok, n + 1, {"noise": NOISE, **haystacks()}, 3)
found = {}
def run(name, policy=None, batch=8):
    try:
        if policy is not None: rewrite_attention(model, policy)
        found[name] = recalled(model, asked, batch, "cuda")
    except Exception as e: print(name, type(e), str(e)[:300])
    finally:
        if policy is not None: restore_attention(model)
    if name not in found: return
    e, f = found["exact"], found[name]
    by = Counter((c.task, "asked") for c in asked) + Counter((c.task, "found") for c, x in zip(asked, f) if x)
    print(f"{name:22s} found {sum(f)}/{len(f)}; of exact's {sum(a and b for a, b in zip(e, f))}/{sum(e)}; of others {sum(b and not a for a, b in zip(e, f))}/{len(e) - sum(e)}",
          {t: f"{by[t, 'found']}/{by[t, 'asked']}" for t in dict.fromkeys(c.task for c in asked)}, f"{time.perf_counter()-start:.0f} s", flush=True)
plan = SavedPlan.from_json(Path("examples/plans/qwen2.5-coder-0.5b.json").read_text())
run("exact"); run("exact, our kernel", Policy(methods=("exact",)))
run("plan", Policy(plan=plan, strict=True))
run("streaming, last", Policy(methods=(uniform(1600, n, 64)["streaming, last exact"],), strict=True))
run("window 8192, last", Policy(methods=(replace(base(64), rows=(Rows(32, 8192),)),), strict=True))
run("window 8192", Policy(methods=(replace(base(0), rows=(Rows(32, 8192),)),), strict=True))
model.float(); torch.backends.cuda.matmul.allow_tf32 = False
if time.perf_counter() - start < 110: run("exact, float32", batch=2)
with open(os.environ.get("OUT", "/tmp") + "/flips.csv", "w") as f:
    w = csv.writer(f); w.writerow(["task", "haystack", "kind", "depth", *found]); w.writerows([c.task, c.haystack, c.kind, c.depth, *x] for c, *x in zip(asked, *found.values()))
