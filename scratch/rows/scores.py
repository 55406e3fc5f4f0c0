"""Which query-blind score holds the rows of a needle: share of the answering queries' mass on it that P places catch."""
import sys, time, collections, json
sys.path.insert(0, "/work/wt/rows/examples/bench"); sys.path.insert(0, "/work/wt/rows")
import torch, transformers
from models import load_smollm2, haystacks
from needles import NOISE, cases
torch.set_num_threads(1)
n = int(sys.argv[1]); each = int(sys.argv[2]); PS = [n // 32, n // 8]
SINKS, WIN, C = 32, 256, 256
model, tok = load_smollm2("cpu", torch.float32)
asked = [c for c in cases(tok, n + 1, {"noise": NOISE, **haystacks()}, each, seed=5) if c.task in ("single", "among four")]
state = {}

def running(x):  # [H,m,C?] sums by contest -> inclusive running
    return x.cumsum(1)

def scores(layer, q, k, v):
    """q [H,n,D], k, v [K,n,D] -> name -> [K, m*C] for rows from SINKS on."""
    K, _, D = k.shape; G = q.shape[0] // K; scale = D ** -0.5
    m = (n - WIN - SINKS) // C; L = m * C
    ks, vs = k[:, SINKS:SINKS + L], v[:, SINKS:SINKS + L]
    kb = ks.reshape(K, m, C, D)
    cnt = (SINKS + C * torch.arange(1, m + 1)).view(1, m, 1)
    mean = (k[:, :SINKS].sum(1, keepdim=True) + kb.sum(2).cumsum(1)) / cnt  # [K,m,D]
    out = {}
    cos = torch.cosine_similarity(kb, mean[:, :, None], dim=-1).reshape(K, L)
    out["keydiff"] = -cos
    W = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (K * G, D))  # [hid, H, D]
    wv = torch.stack([(vs[h // G] @ W[:, h].T).norm(dim=-1) for h in range(K * G)]).view(K, G, L).square().sum(1).sqrt()
    out["Wo v"] = wv
    out["keydiff x Wo v"] = (1 - cos) * wv
    out["-|k|"] = -ks.norm(dim=-1)
    # second moments, running
    def moments(x, first):
        b = x.reshape(x.shape[0], m, C, D)
        s2 = (first.mT @ first)[:, None] + torch.einsum("kmcd,kmce->kmde", b, b).cumsum(1)
        s1 = first.sum(1, keepdim=True) + b.sum(2).cumsum(1)
        return s1 / cnt, s2 / cnt[..., None]
    def leverage(x, first, centre=True):
        mu, s2 = moments(x, first)
        b = x.reshape(x.shape[0], m, C, D)
        cov = s2 - (mu[..., :, None] * mu[..., None, :] if centre else 0)
        eps = 1e-3 * cov.diagonal(dim1=-2, dim2=-1).mean(-1)
        chol = torch.linalg.cholesky(cov + eps[..., None, None] * torch.eye(D))
        d = b - mu[:, :, None] if centre else b
        z = torch.linalg.solve_triangular(chol, d.mT, upper=False)
        return z.square().sum(2).reshape(x.shape[0], L)
    lk, lv = leverage(ks, k[:, :SINKS]), leverage(vs, v[:, :SINKS])
    out["leverage k"] = lk; out["leverage v"] = lv; out["leverage k+v"] = lk + lv
    out["leverage k uncentred"] = leverage(ks, k[:, :SINKS], False)
    out["leverage v x Wo v"] = lv * wv
    # expected attention
    qs = q[:, SINKS:SINKS + L]
    mu, s2 = moments(qs, q[:, :SINKS])
    cov = s2 - mu[..., :, None] * mu[..., None, :]
    kq = kb.repeat_interleave(G, 0)
    lin = torch.einsum("hmd,hmcd->hmc", mu, kq) * scale
    quad = torch.einsum("hmcd,hmde,hmce->hmc", kq, cov, kq) * scale ** 2 / 2
    ea = (lin + quad).reshape(K, G, L)
    out["expected"] = ea.logsumexp(1)
    wvh = torch.stack([(vs[h // G] @ W[:, h].T).norm(dim=-1) for h in range(K * G)]).view(K, G, L)
    out["expected x Wo v"] = (ea + wvh.log()).logsumexp(1)
    # clusters
    kn = torch.nn.functional.normalize(ks, dim=-1)
    for size in (256, 16):
        means = torch.nn.functional.normalize(ks.reshape(K, -1, size, D).mean(2), dim=-1)
        sim = kn @ means.mT  # [K,L,c]
        own = torch.arange(L) // size; cc = torch.arange(L // size)
        ok = cc[None] < own[:, None] if size == 16 else cc[None] <= own[:, None]
        out[f"-max cos means of {size}"] = -sim.masked_fill(~ok, -1).amax(-1)
    sim = kn @ kn.mT
    far = torch.arange(L)[None] < torch.arange(L)[:, None] - 8
    out["-nearest key before"] = -sim.masked_fill(~far, -1).amax(-1)
    vn = torch.nn.functional.normalize(vs, dim=-1)
    simv = (vn @ vn.mT).masked_fill(~far, -1).amax(-1)
    out["-nearest value before"] = -simv
    out["1-nearest value x Wo v"] = (1 - simv) * wv
    out["nearest k+v"] = -(sim.masked_fill(~far, -1).amax(-1) + simv)
    # value against running mean
    vb = vs.reshape(K, m, C, D); vm = (v[:, :SINKS].sum(1, keepdim=True) + vb.sum(2).cumsum(1)) / cnt
    vcos = torch.cosine_similarity(vb, vm[:, :, None], dim=-1).reshape(K, L)
    out["valuediff"] = -vcos
    out["key+valuediff"] = -(cos + vcos)
    kv = out["key+valuediff"]
    out["(2-cos k-cos v) x Wo v"] = (2 + kv) * wv
    out["k+2v"] = -(cos + 2 * vcos); out["2k+v"] = -(2 * cos + vcos)
    out["max(k, v)"] = -torch.minimum(cos, vcos); out["k*v"] = (1 - cos) * (1 - vcos)
    pool = lambda x, w: torch.nn.functional.avg_pool1d(x[:, None], w, 1, w // 2, count_include_pad=False)[:, 0]
    mpool = lambda x, w: torch.nn.functional.max_pool1d(x[:, None], w, 1, w // 2)[:, 0]
    for w in (3, 5, 9):
        out[f"keydiff mean of {w}"] = pool(-cos, w); out[f"k+v mean of {w}"] = pool(kv, w)
    out["k+v max of 3"] = mpool(kv, 3) + 1e-3 * kv
    z = lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    out["z(k+v)+z(expected)"] = z(kv) + z(out["expected"])
    out["z(k+v)+z(Wo v)"] = z(kv) + z(wv)
    out["z(k+v)+z(nn v)"] = z(kv) + z(-simv)
    for name in ("leverage k uncentred", "leverage v x Wo v", "leverage k+v", "nearest k+v"): del out[name]
    out["random"] = torch.rand(K, L, generator=torch.Generator().manual_seed(layer))
    out["last"] = torch.arange(L).float().expand(K, L)
    return out, L

def attention(module, query, key, value, mask, scaling=None, **more):
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    c = state["case"]; a = len(c.answer)
    q, k, v = query[0], key[0], value[0]
    K = k.shape[0]; G = q.shape[0] // K
    sc, L = scores(module.layer_idx, q, k, v)
    def mass(at):
        p = (q[:, at].unflatten(0, (K, G)) @ k[:, None].mT * scaling)
        idx = torch.as_tensor(at)
        p = p.masked_fill(torch.arange(k.shape[1]) > idx[:, None], -1e30).softmax(-1)
        return p.sum((1, 2))  # [K, n]
    N = k.shape[1]
    need = mass(list(range(N - a, N)))
    other = mass(list(range(N - 400, N - 144, 8)))
    nm = torch.zeros_like(need); nm[:, state["at"]] = need[:, state["at"]]
    for name, s in sc.items():
        for P in PS:
            held = torch.zeros(K, N, dtype=torch.bool)
            held[:, SINKS:SINKS + L].scatter_(1, s.topk(P, -1).indices, True)
            region = torch.zeros(N, dtype=torch.bool); region[SINKS:SINKS + L] = True
            state["res"].append((name, P, module.layer_idx, (nm * held).sum(1).tolist(), nm.sum(1).tolist(), (other * held).sum(1).tolist(), (other * region).sum(1).tolist()))
    return out.transpose(1, 2), None
transformers.AttentionInterface.register("rec", attention)
model.set_attn_implementation("rec")
allrows = []
for c in asked:
    t = time.time()
    digits = [t for t in c.answer if tok.decode([t]).strip().isdigit()]
    p = list(c.prompt)
    at = [i for i in range(len(p) - len(digits)) if p[i:i + len(digits)] == digits]
    if not at: print("no needle?", tok.decode(c.answer)); continue
    state.update(case=c, at=list(range(at[0] - 1, at[0] + len(digits))), res=[])
    if at[0] + 8 > n - WIN - SINKS - C: print("too late"); continue
    with torch.no_grad():
        ids = torch.tensor([p + list(c.answer)])
        logits = model(ids[:, :-1], use_cache=False, logits_to_keep=len(c.answer)).logits[0].argmax(-1).tolist()
    right = tuple(logits) == c.answer
    allrows.append((c.task, c.haystack, c.kind, c.depth, right, state["res"]))
    print(c.task, c.haystack, c.kind, round(c.depth, 2), "solved" if right else "not", f"{time.time()-t:.0f}s", flush=True)
    torch.save(allrows, "/work/main/.gpu/rows/scores.pt")
    tot = collections.defaultdict(lambda: [0, 0, 0, 0])
    hay = sorted({r[1] for r in allrows})
    for task, h, kind, d, r, res in allrows:
        for name, P, layer, a, b, e, f in res:
            for key in ((name, P, h), (name, P, "all")):
                x = tot[key]; x[0] += sum(a); x[1] += sum(b); x[2] += sum(e); x[3] += sum(f)
lines = []
for name in dict.fromkeys(r[0] for r in allrows[0][5]):
    print(f"{name:28s}", *(f"| P={P} " + " ".join(f"{h}:{tot[name,P,h][0]/max(1e-9,tot[name,P,h][1]):.2f}/{tot[name,P,h][2]/max(1e-9,tot[name,P,h][3]):.2f}" for h in hay + ["all"]) for P in PS))
