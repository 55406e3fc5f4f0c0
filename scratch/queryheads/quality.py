"""KL of plans per query head beside plans per KV head at equal mean rows, few options, a short text, on a CPU.

PYTHONPATH=.:examples/bench python scratch/queryheads/quality.py [tokens]
"""

import sys

import torch
from models import judged_texts, load_smollm2, profiled_texts

from express_compile import fit
from express_compile.core.rows import Rows
from express_compile.quality.profile import profile

n = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
model, tokenizer = load_smollm2("cpu", torch.float32)
OPTIONS = (*(Rows(16, x) for x in (64, 256)), *(Rows(16, 64, selected=x) for x in (1, 2, 4, 7)))


def ids(text):
    return tokenizer(text[: 8 * n], return_tensors="pt").input_ids[:, :n]


profiled = [ids(x) for x in list(profiled_texts().values())[:2]]
judged = [ids(x) for x in list(judged_texts().values())[:4]]
found = {q: profile(model, profiled, OPTIONS, query_heads=q) for q in (False, True)}
print("profiled", flush=True)
for rows in (220, 260, 320, 400):
    for q, its in found.items():
        x = fit(model, judged, rows=rows, profile=its, last=0)
        name = "query heads" if q else "KV heads"
        at = [[its.options.index(r) for r in own] for own in x.chosen]
        error = sum(
            s.nats * e[o] for s, own in zip(its.sites, at, strict=True) for e, o in zip(s.errors, own, strict=True)
        )
        print(f"n={n} {name:<12} rows {x.rows:6.1f} KL {x.kl:.4f} weighted error {error:.4f}", flush=True)
