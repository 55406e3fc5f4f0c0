"""(1) dense analysis of late queries: selection by smaller blocks of queries, means of blocks; (2) profiles by blocks of queries and more options; KL of their choices on two texts that are not judged."""
import sys, time, math, argparse
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch
import torch.nn.functional as F
import plans
from measures import token_statistics
from models import _bible, _code, profiled_texts
from plans import MODELS, OPTIONS, MORE, base, chosen, average_rows, only, mean_of, LAST
from express_compile import Policy, rewrite_attention, restore_attention
from express_compile.core.rows import Rows
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--length", type=int, default=16384); p.add_argument("--profile"); p.add_argument("--rows", type=float, default=1600)
p.add_argument("--limit", type=float, default=200); p.add_argument("--save", default="")
a = p.parse_args(); start = time.perf_counter(); T = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = MODELS["qwen"][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length; small = n < 4096
if small: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
A = P.Profile.from_json(Path(a.profile).read_text())
nats = [s.nats for s in A.sites]
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
texts = profiled_texts()
H, G, D, S, KB = 14, 7, 64, 32, 64
tot = {}
Wo = [l.self_attn.o_proj.weight.detach().float().unflatten(1, (H, D)).permute(1, 2, 0) for l in model.model.layers]
def dense(l, q, k, v):
    qi = torch.cat([torch.arange(s // 128 * 128, s // 128 * 128 + 128, device=dev) for s in (n // 4, n // 2 + 100, n - 200)])
    Q = q[0][:, qi].float(); Kh, Vh = (x[0].float() for x in (k, v))
    if Kh.shape[0] == 2: Kh, Vh = (x.repeat_interleave(G, 0) for x in (Kh, Vh))
    j = torch.arange(n, device=dev)
    sc = ((Q @ Kh.mT) / 8.0).masked_fill(j[None] > qi[:, None], -1e30)
    prob = sc.softmax(-1); ex = prob @ Vh
    whole = torch.einsum("hqd,hdc->qc", ex, Wo[l]).square().sum()
    err = lambda o: float((((o - ex) @ Wo[l]).square().sum((1, 2)) / whole * nats[l]).sum())
    add = lambda name, o: tot.setdefault(name, []).append(err(o))
    blk = qi // 128 * 128
    out = lambda m: sc.masked_fill(~m, -1e30).softmax(-1) @ Vh
    win = lambda w: (j[None] < S) | (j[None] >= blk[:, None] - w)
    for w in (128, 256, 512, 1024, 2048, 4096): add(f"window {w}", out(win(w)))
    nb = (n - S) // KB; end = S + (torch.arange(nb, device=dev) + 1) * KB
    w = 128; ok = end[None] - KB < (blk - w)[:, None]
    mass = prob[:, :, S:S + nb * KB].unflatten(2, (nb, KB)).sum(-1).masked_fill(~ok, 0.)
    for sub in (1, 16, 32, 64, 128):
        for how in ("head, all", "group, all", "group, first", "group, 4"):
            if sub == 1 and how[-3:] != "all": continue
            ms = mass if how.startswith("head") else mass.unflatten(0, (2, G)).mean(1).repeat_interleave(G, 0)
            mb = ms.unflatten(1, (-1, sub))
            mb = mb[:, :, :1] if how.endswith("first") else mb[:, :, ::max(1, sub // 4)] if how.endswith("4") else mb
            sco = mb.mean(2).repeat_interleave(sub, 1)
            for b in (4, 16, 64):
                ch = torch.zeros_like(sco, dtype=torch.bool).scatter_(2, sco.topk(min(b, nb), -1).indices, True) & ok
                m = win(w)[None].expand(H, -1, -1).clone(); m[:, :, S:S + nb * KB] |= ch.repeat_interleave(KB, 2)
                add(f"sub {sub:3d} {how:13s} top {b}", out(m))
    for size in (64, 256):
        nm = (n - S) // size
        km, vm = (x[:, S:S + nm * size].unflatten(1, (nm, size)).mean(2) for x in (Kh, Vh))
        for w in (128, 512, 2048):
            mok = (S + (torch.arange(nm, device=dev) + 1) * size)[None] <= (blk - w)[:, None]
            sm = ((Q @ km.mT) / 8.0 + math.log(size)).masked_fill(~mok, -1e30)
            hid = torch.zeros(len(qi), n, dtype=torch.bool, device=dev); hid[:, S:S + nm * size] = mok.repeat_interleave(size, 1)
            for om in (1.0, 0.5):
                pr = torch.cat([sc.masked_fill(hid, -1e30), sm + math.log(om)], -1).softmax(-1)
                add(f"window {w} + means of {size} x{om}", pr[..., :n] @ Vh + pr[..., n:] @ vm)
@torch.no_grad()
def analysed(ids):
    sdpa, count = F.scaled_dot_product_attention, [0]
    def own(q, k, v, *x, **y):
        dense(count[0], q, k, v); count[0] += 1
        return sdpa(q, k, v, *x, **y)
    F.scaled_dot_product_attention = own
    try: model.model(ids, use_cache=False)
    finally: F.scaled_dot_product_attention = sdpa
for name in ("genesis", "pydecimal"): analysed(ids_of(texts[name])); print(name, T(), flush=True)
for k, e in tot.items(): print(f"{k:34s} {sum(e)/2:.4f}")
DEV = {"john": _bible("In the beginning was the Word", 130_000), "optparse": _code("optparse", "pdb")}
dev_ids = {k: ids_of(t) for k, t in DEV.items()}
with torch.no_grad(): exact = {k: model.model(x, use_cache=False).last_hidden_state for k, x in dev_ids.items()}
EXTRA = (Rows(S, 8192), Rows(S, 1024, 64), Rows(S, 512, 64), Rows(S, 1024, 256), Rows(S, 512, 256), Rows(S, 2048, 256), Rows(S, 128, 64), Rows(S, 128, 256), Rows(S, 64, 16), Rows(S, 256, 1024), Rows(S, 1024, 512),
         Rows(S, 512, protected=4096), Rows(S, 256, 256, 1024), Rows(S, 512, 512, 2048), Rows(S, 2048, selected=64), Rows(S, 512, selected=32), Rows(S, 1024, selected=32), Rows(S, 256, selected=8), Rows(S, 64, selected=4), Rows(S, 2048, selected=16))
def err(f, plan):
    o = {x: i for i, x in enumerate(f.options)}
    return sum(float(s.weighted[h, o[x]]) for s in f.sites for h, x in enumerate(plan.rows[s.module]))
options = OPTIONS + MORE
if small: options, EXTRA = options[5::8] + options[20:21], EXTRA[1:3]
for label, block, opts in (("128", 128, options), ("32", 32, options), ("16", 16, options), ("128 extra", 128, options + EXTRA), ("64", 64, options)):
    if time.perf_counter() - start > a.limit: print("cut", label); break
    plans.BLOCK = block
    try:
        found = mean_of([P.profile(model, ids_of(texts[x]), opts, block=block, query_heads=True) for x in (("genesis",) if small else ("genesis", "pydecimal"))])
        if a.save: Path(f"{a.save}-{label.replace(' ', '')}.json").write_text(found.to_json())
        plan = chosen(found, a.rows, n)
        rewrite_attention(model, Policy(methods=(plan,), strict=True))
        with torch.no_grad(): hidden = {k: model.model(x, use_cache=False).last_hidden_state for k, x in dev_ids.items()}
        restore_attention(model)
        kl = [float(token_statistics(exact[k], hidden[k], model.lm_head, dev_ids[k]).tail(P.late(n)).kl.mean()) for k in dev_ids]
        print(f"{label:10s} rows {average_rows(plan, n):.0f} predicted {err(found, plan):.4f}", *(f"{r}: {err(found, chosen(found, r, n)):.4f}" for r in ((1200, 2000) if not small else ())), f"KL {kl[0]:.4f} {kl[1]:.4f}", T(), plans.in_words(plan)[:220], flush=True)
    except Exception as e: restore_attention(model); print(label, repr(e)[:300], flush=True)
