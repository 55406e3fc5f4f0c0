import sys; sys.path.insert(0, "/tmp/hp/new")
import torch, numpy as np
from dataclasses import replace
from express_compile.kernels.attend import segments as S
import prob
def expand(table, start, tiles, w, tail, slots, b, upto):
    rows = []
    for t in range(start[3*b], start[3*b+1]):
        r, n = tiles[t]
        if slots is not None and r < 0:
            assert -1 - r == t
            for i in range(4):
                k = min(32, n - 32*i)
                if k > 0:
                    s = slots[t, i]; ww = w[t, 0] + (w[t, i] if i else 0)
                    rows += [("c", s + m, round(float(ww), 4)) if s >= 0 else ("t", -1 - s + m, round(float(ww), 4)) for m in range(k)]
        else: rows += [("c", r + m, round(float(w[t, 0] if w.ndim == 2 else w[t]), 4)) for m in range(n)]
    for t in range(start[3*b+1], start[3*b+2]):
        rows += [("c", tiles[t][0] + m, round(float(w[t, 0] if w.ndim == 2 else w[t]), 4)) for m in range(tiles[t][1])]
    for t in range(start[3*b+2], start[3*b+3]):
        rows += [("t", tiles[t][0] + m, round(float(w[t, 0] if w.ndim == 2 else w[t]), 4)) for m in range(tiles[t][1])]
    if tail < upto: rows += [("t", m, 0.0) for m in range(tail, upto)]
    return sorted(rows)
for n in (2048, 8192, 32768, 131072):
  for name, s, w_, p in (("512/32", 512, 32, 0), ("256+256/256", 256, 256, 256)):
    q, src, t = prob.problem(torch, S, n, s, w_, p, H=1, H_kv=1)
    A = src.compacted_key.shape[2]
    old = S.tile_lists(t, 128, A); new = S.slot_lists(t, A)
    B = len(t.tail)
    for b in (range(B) if n < 9000 else range(0, B, 37)):
        upto = max(b*128 - t.shift, 0) + 1
        x = expand(t, *old[:3], int(old[3][b]), None, b, upto); y = expand(t, *new[:3], int(new[3][b]), new[4], b, upto)
        assert x == y, (n, name, b)
        assert int(new[3][b]) <= upto + t.q_offset - 1
    stop = np.minimum((np.arange(B)+1)*128 - t.shift, n)
    tot = [(st[3::3] - st[:-1:3] + -(-np.maximum(stop - tl, 0)//128)) for st, tl in ((old[0], old[3]), (new[0], new[3]))]
    seen = t.rows_seen(n).sum()
    print(n, name, "tiles/job", [x.mean() for x in tot], "eff", [seen / (x.sum()*128*128) for x in tot], "mixed/job", (new[1][:,0]<0).sum()/B)
t = prob.problem(torch, S, 5000, 64, 200, 0, H=1, H_kv=1); 
print("ok")
