import sys, random, math, time
sys.path.insert(0, "/tmp")
import numpy as np, torch
import spans_emul as M
from express_compile.kernels import express as E
from express_compile.kernels.attend import segments
from express_compile.kernels.attend.segments import Sources, segment_attention_triton, segment_attention_reference, causal_table
from express_compile.kernels.spans import Spans
import express_compile.kernels.attend as A

import os
hopper = M.emulated(os.environ.get("HOPPER", segments.hopper.__file__))
segments.hopper = hopper
segments.require_triton = lambda: None

def places_of(rng, n, total, side):
    if side == "holes":
        return np.sort(rng.permutation(total)[:n])
    first = {"left": total - n, "right": 0, "both": (total - n) // 2}[side]
    return np.arange(first, first + n)

def case(seed):
    rng = np.random.default_rng(seed); random.seed(seed)
    gen = torch.Generator().manual_seed(seed)
    D, Dv = [(128, 128), (64, 128), (128, 64)][rng.integers(3)]
    H_kv = int(rng.integers(1, 3)); G = int(rng.integers(1, 3)); H = H_kv * G
    B = int(rng.integers(1, 5))
    total = int(rng.choice([100, 130, 300, 500, 700]))
    lengths = [int(rng.choice([0, 1, total, rng.integers(1, total + 1), min(total, 128), min(total, 64 + int(rng.integers(80)))])) for _ in range(B)]
    side = str(rng.choice(["left", "right", "both", "holes", "mixed", "packed", "packed"]))
    Lq = total if side == "packed" or rng.random() < 0.5 else int(rng.integers(1, total + 1))
    s = int(rng.choice([4, 16])); protected = int(rng.choice([0, 0, 10, 64]))
    config = E.Express(s, inflation=2, sinks=int(rng.choice([2, 32, 70])), recent=int(rng.choice([0, 5, 32, 100])), block=128, protected=protected)
    mk = lambda h, n, d: torch.randn(B, h, n, d, generator=gen)
    if side == "packed":
        starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        Tn = int(starts[-1])
        if Tn == 0: return None
        q, k, v = (torch.randn(1, h, Tn, d, generator=gen).transpose(1, 2).contiguous().transpose(1, 2).expand(B, -1, -1, -1) for h, d in ((H, D), (H_kv, D), (H_kv, Dv)))
        spans = Spans.of_packed(starts, Tn)
        total = max(lengths); Lq = Tn
        asked = None
    else:
        padding = torch.zeros(B, total, dtype=torch.bool)
        for b, n in enumerate(lengths):
            sd = str(rng.choice(["left", "right", "both", "holes"])) if side == "mixed" else side
            padding[b, places_of(rng, n, total, sd)] = True
        q, k, v = (mk(h, total, d).masked_fill(~padding[:, None, :, None], math.nan) for h, d in ((H, D), (H_kv, D), (H_kv, Dv)))
        q = q[:, :, total - Lq:]
        spans = Spans.of_padding(padding, Lq)
    tokens = total
    kind = str(rng.choice(["express", "causal", "random", "random"]))
    if os.environ.get("TOTAL") and side != "packed" and 0: pass
    if kind == "express":
        layout = E.make_layout(config, tokens, tokens)
        table = layout.table
        from express_compile.kernels.launch import Random
        index = E.thin_spans_reference(k.nan_to_num(0.0), v.nan_to_num(0.0), layout, 0.3, Random(torch.tensor(seed), 1), spans)
        copies = [E.gather_rows(x, index[:, :, :layout.copied]).nan_to_num(7.0) for x in (k, v)]
        empty = spans.length == 0
        sources = Sources(k, v, *copies, index if config.protected else None, spans=spans)
    elif kind == "random":
        shift = int(rng.choice([0, 0, 17, 64, 127])); blocks = -(-(tokens + shift) // 128)
        begin = np.maximum(np.arange(blocks) * 128 - shift, 0)
        A, I = int(rng.integers(1, 300)), int(rng.choice([0, 0, 150]))
        segs, weights, tail = np.zeros((blocks, 5, 3), np.int32), rng.normal(size=(blocks, 5)), np.zeros(blocks, np.int32)
        for b in range(blocks):
            tail[b] = rng.integers(0, begin[b] + 1)
            for c in range(5):
                kind_ = rng.integers(0, 3)
                if kind_ == 0 and begin[b]:
                    x = np.sort(rng.integers(0, begin[b] + 1, 2)); segs[b, c] = segments.TOKENS, x[0], x[1] - x[0]
                    if rng.random() < 0.3: segs[b, c] = segments.TOKENS, begin[b] - min(begin[b], 5), min(begin[b], 5)
                elif kind_ == 1:
                    x = np.sort(rng.integers(0, A + 1, 2)); segs[b, c] = segments.COMPACTED, x[0], x[1] - x[0]
                elif I:
                    x = np.sort(rng.integers(0, I + 1, 2)); segs[b, c] = segments.COMPACTED, A + x[0], x[1] - x[0]
                if segs[b, c, 2] == 0: segs[b, c] = 0
        table = segments.SegmentTable(128, 0, segs, weights, tail, shift)
        index = None
        if I:
            index = torch.zeros(B, H_kv, A + I, dtype=torch.int32)
            for b in range(B):
                at = spans.places(b)
                if len(at): index[b] = at[torch.randint(len(at), (H_kv, A + I), generator=gen)].int()
        copies = [torch.randn(B, H_kv, A, d, generator=gen) for d in (D, Dv)]
        sources = Sources(k, v, *copies, index, spans=spans)
    else:
        table = causal_table(tokens, tokens); sources = Sources.tokens(k, v, spans)
    scale = 0.3 / math.sqrt(D) * 3
    M.module.PROGRAMS = lambda n, p=int(rng.integers(1, 9)): min(n, p)
    M.module.CACHED = int(rng.choice([1, 32 << 20]))
    expected = segment_attention_reference(q, sources, table, scale)
    into = segments.spanned_outputs(q, v)
    if side == "packed":
        out = torch.zeros(Tn, H, Dv); lse = torch.full((H, Tn), -math.inf)
        mk_into = lambda: segments.Outputs(*(x[None].expand(B, *x.shape) for x in (out.transpose(0, 1), lse)))
        into = mk_into()
        e2 = segments.Outputs(torch.zeros(Tn, H, Dv), torch.full((H, Tn), -math.inf))
        expected = segments.Outputs(*(x[None].expand(B, *x.shape) for x in (e2.out.transpose(0, 1), e2.lse)))
        expected = segment_attention_reference(q, sources, table, scale, expected)
    before = dict(M.stats)
    found = segment_attention_triton(q, sources, table, scale, into)
    err = 0
    for x, e in zip(found, expected):
        assert torch.equal(torch.isfinite(x), torch.isfinite(e)), (seed, "finite")
        d = (x - e)[torch.isfinite(e)].abs()
        err = max(err, float(d.max()) if d.numel() else 0.0)
    assert err < 1e-4, (seed, err)
    return dict(seed=seed, side=side, kind=kind, B=B, H=(H, H_kv), D=(D, Dv), total=total, Lq=Lq, lengths=lengths, protected=protected, err=err,
                tma=M.stats["tma"] - before["tma"], rows=M.stats["rows"] - before["rows"])

a, b = int(sys.argv[1]), int(sys.argv[2])
t = time.time()
for seed in range(a, b):
    r = case(seed)
    if r and (seed % 10 == 0 or b - a < 5): print(r, f"{time.time() - t:.0f}s", flush=True)
print("ok", b - a, f"{time.time() - t:.0f}s")
