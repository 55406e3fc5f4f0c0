import numpy as np
from dataclasses import replace
SETS = {"causal": (8192, None, 0, 0), "express": (8192, 512, 32, 0), "protected": (8192, 256, 256, 256)}
def problem(torch, S, n, s, window, protected, H=32, H_kv=8, D=128, dev="cpu"):
    import importlib
    E = importlib.import_module("express_compile.kernels.express")
    q, k, v = (torch.zeros(1, h, n, D, dtype=torch.bfloat16, device=dev) for h in (H, H_kv, H_kv))
    if s is None: return q, S.Sources.tokens(k, v), S.causal_table(n, n)
    config = E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, block=128, protected=protected)
    layout = E.make_layout(config, n, n); table = layout.table
    source, first, length = (table.segments[..., i] for i in range(3))
    A = int((source * (first + length)).max())
    index = torch.zeros(1, H_kv, A, device=dev, dtype=torch.int32)
    ck = torch.zeros(1, H_kv, A, D, dtype=torch.bfloat16); cv = ck.clone()
    if protected:
        A = layout.copied
        return q, S.Sources(k, v, ck[:, :, :A], cv[:, :, :A], index), table
    return q, S.Sources(k, v, ck, cv), table
