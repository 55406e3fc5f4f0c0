"""Dense analysis: what causal ways to choose blocks for a tile of queries lose, at equal rows of a tile."""
import sys, time, math, argparse, itertools
from pathlib import Path
sys.path.insert(0, "examples/bench")
import torch
import torch.nn.functional as F
from models import profiled_texts
from plans import MODELS
from express_compile.quality import profile as P
p = argparse.ArgumentParser(); p.add_argument("--length", type=int, default=16384); p.add_argument("--profile"); p.add_argument("--limit", type=float, default=200)
a = p.parse_args(); start = time.perf_counter(); T_ = lambda: f"{time.perf_counter()-start:.0f} s"
dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = MODELS["qwen"][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
n = a.length; small = n < 4096
if small: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
A = P.Profile.from_json(Path(a.profile).read_text())
nats = [s.nats for s in A.sites]
def ids_of(text):
    ids = tok(text[: 10*n], return_tensors="pt").input_ids[:, :n].to(dev); assert ids.shape[1] == n; return ids
texts = profiled_texts()
H, G, D, S = 14, 7, 64, 32
tot = {}
Wo = [l.self_attn.o_proj.weight.detach().float().unflatten(1, (H, D)).permute(1, 2, 0) for l in model.model.layers]
POL = []
for rows in (256, 1024, 4096):
    for own in ("group", "head"):
        for T, r, share in ((128, 128, 1), (32, 32, 1), (16, 16, 1), (128, 32, .5), (128, 32, .25), (128, 16, .5), (128, 16, .25), (128, 8, .5), (128, 8, .25), (128, 4, .5), (128, 1, .25), (64, 16, .5), (64, 8, .5), (64, 8, .25), (32, 8, .5), (32, 4, .5), (32, 4, .25), (32, 1, .25)):
            for KB in (64, 32, 16):
                if KB != 64 and (own, T, r) not in {("group", 128, 128), ("group", 32, 32), ("group", 32, 8), ("group", 128, 16), ("head", 128, 128), ("head", 128, 16), ("head", 128, 8)}: continue
                POL.append((rows, own, T, r, share, KB))
def dense(l, q, k, v):
    qi = torch.cat([torch.arange(s // 128 * 128, s // 128 * 128 + 128, device=dev) for s in (n // 4, n // 2 + 100, n * 3 // 4 + 300, n - 200)])
    Q = q[0][:, qi].float(); Kh, Vh = (x[0].float() for x in (k, v))
    if Kh.shape[0] == 2: Kh, Vh = (x.repeat_interleave(G, 0) for x in (Kh, Vh))
    j = torch.arange(n, device=dev)
    sc = ((Q @ Kh.mT) / 8.0).masked_fill(j[None] > qi[:, None], -1e30)
    prob = sc.softmax(-1); ex = prob @ Vh
    whole = torch.einsum("hqd,hdc->qc", ex, Wo[l]).square().sum()
    err = lambda o: float((((o - ex) @ Wo[l]).square().sum((1, 2)) / whole * nats[l]).sum())
    out = lambda m: sc.masked_fill(~m, -1e30).softmax(-1) @ Vh
    nb = (n - S) // 64
    base = prob[:, :, S:S + nb * 64].unflatten(2, (nb * 4, 16)).sum(-1)
    w = 128
    for rows, own, T, r, share, KB in POL:
        C = nb * 64 // KB
        blk = qi // T * T
        endt = S + (torch.arange(C, device=dev) + 1) * KB
        limit = (S + (blk - S - w).clamp(min=0) // KB * KB)  # candidates end here
        ok = endt[None] <= limit[:, None]
        ms = base.unflatten(2, (C, KB // 16)).sum(-1).masked_fill(~ok, 0.)
        if own == "group": ms = ms.unflatten(0, (2, G)).mean(1)
        ms = ms.unflatten(1, (-1, T))  # heads, tiles, T, C
        B, steps = rows // KB, T // r
        b0 = B if steps == 1 else max(1, round(B * share))
        counts = [b0] + [(B - b0) * (s + 1) // (steps - 1) - (B - b0) * s // (steps - 1) for s in range(steps - 1)]
        held = torch.zeros(*ms.shape[:2], C, dtype=torch.bool, device=dev)
        vis = []
        for s, c in enumerate(counts):
            if c:
                m = ms[:, :, s * r].masked_fill(held, -1.)
                held = held.scatter(2, m.topk(min(c, C), -1).indices, True)
            vis.append(held)
        seen = torch.stack(vis, 2).repeat_interleave(r, 2).flatten(1, 2) & ok
        if own == "group": seen = seen.repeat_interleave(G, 0)
        m = ((j[None] < S) | (j[None] >= limit[:, None]))[None].repeat(H, 1, 1)
        m[:, :, S:S + C * KB] |= seen.repeat_interleave(KB, 2)
        tot.setdefault((rows, own, T, r, share, KB), []).append(err(out(m)))
@torch.no_grad()
def analysed(ids):
    sdpa, count = F.scaled_dot_product_attention, [0]
    def own(q, k, v, *x, **y):
        dense(count[0], q, k, v); count[0] += 1
        return sdpa(q, k, v, *x, **y)
    F.scaled_dot_product_attention = own
    try: model.model(ids, use_cache=False)
    finally: F.scaled_dot_product_attention = sdpa
done = 0
for name in ("genesis", "pydecimal"):
    if time.perf_counter() - start > a.limit: break
    analysed(ids_of(texts[name])); done += 1; print(name, T_(), flush=True)
for rows in (256, 1024, 4096):
    for own in ("group", "head"):
        print(f"rows {rows} {own}: " + "  ".join(f"T{T} r{r} {share} {KB}: {sum(e)/done:.4f}" for (R, o, T, r, share, KB), e in tot.items() if (R, o) == (rows, own)))
