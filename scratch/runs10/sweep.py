"""Variants of the step over the places of a cache: MODE 0 as it is; 1 rows are read whatever they weigh; 2 the same, values of
dead rows zeroed; 3 as 2, one page a block, its number a scalar. python .gpu/run/sweep.py"""
import sys, itertools, time
from pathlib import Path
sys.path.insert(0, "examples/bench"); sys.path.insert(0, ".")
src = Path("kernels/attend/places.py").read_text()
def sub(a, b):
    global src
    assert src.count(a) == 1, (src.count(a), a); src = src.replace(a, b)
sub('"H G D DV BD BDV BM BN PAGE ALIGN BG BS"', '"H G D DV BD BDV BM BN PAGE ALIGN BG BS MODE"')
sub("""        b_page = tl.load(p_pages + o_row // PAGE, mask=o_row < listed, other=-1)
        o_place = tl.where(is_listed, tl.where(b_page < 0, places, b_page * PAGE + o_row % PAGE), o_row)
        m_n = (o_row < rows) & (o_place < places) & (o_place != place) & (o_place != free)
""", """        if SHAPE.MODE == 3:
            i_page = tl.load(p_pages + j * (BN // PAGE), mask=is_listed, other=0)
            o_place = tl.where(is_listed, tl.where(i_page < 0, places, i_page * PAGE + o_n), o_row)
        else:
            b_page = tl.load(p_pages + o_row // PAGE, mask=o_row < listed, other=-1)
            o_place = tl.where(is_listed, tl.where(b_page < 0, places, b_page * PAGE + o_row % PAGE), o_row)
        m_in = (o_row < rows) & (o_place < places)
        m_n = m_in & (o_place != place) & (o_place != free)
""")
sub("        b_k = load_rows(p_k, SHAPE.D, o_place, m_n, SHAPE.D, SHAPE.BD)  # [BN, BD]\n", """        m_read = m_n if SHAPE.MODE == 0 else m_in
        b_k = load_rows(p_k, SHAPE.D, o_place, m_read, SHAPE.D, SHAPE.BD)  # [BN, BD]
""")
sub("        b_v = load_rows(p_v, SHAPE.DV, o_place, m_n, SHAPE.DV, SHAPE.BDV)  # [BN, BDV]\n", """        b_v = load_rows(p_v, SHAPE.DV, o_place, m_read, SHAPE.DV, SHAPE.BDV)  # [BN, BDV]
        if SHAPE.MODE >= 2:
            b_v = tl.where(m_n[:, None], b_v, 0.0).to(b_v.dtype)
""")
sub("return _Shape(H, G, *widths, max(16, BG), rows, PAGE, align, BG, max(1, min(16, _COMBINED // (BG * widths.BDV))))",
    "return _Shape(H, G, *widths, max(16, BG), rows, PAGE, align, BG, max(1, min(16, _COMBINED // (BG * widths.BDV))), MODE)")
sub("    tiles = tiling(max(shape.BD, shape.BDV) * key.element_size(), device_of(key.device)[1])\n", "    tiles = TILES\n")
sub("    rows = tiling(max(widths.BD, widths.BDV) * key.element_size(), device_of(key.device)[1]).rows\n", "    rows = TILES.rows\n")
src += "\nfrom .decode import Tiling\nMODE, TILES = 0, Tiling(128, 4, 3, 1)\n"
Path("kernels/attend/px.py").write_text(src)
import torch, decoding
from decoding import *
from express_compile.kernels.attend import px, places
from express_compile.kernels.attend.decode import Tiling
import express_compile.kernels.held as held_module
GPU = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
start = time.perf_counter()
def make(B, n, count):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, 1, D, device=device, dtype=dtype) for h in (H, H_KV, H_KV))
    layers, end = [], torch.empty(B, dtype=torch.int32, device=device)
    for layer in range(count):
        layers.append(Held(PerHead((UNIFORM,)), k, v, Random(torch.tensor(0, device=device), layer), SCALE, layer))
        layers[-1].fill(*(torch.randn(B, H_KV, n, D, device=device, dtype=dtype) for _ in range(2)))
        layers[-1].settle(single=True); layers[-1].prepare_step(end)
    layers[0].count_into(end); layers[0].launch_step(q, k, v)
    return layers, end, (q, k, v)
def table(x, end, at_once):
    old, held_module.device_of = held_module.device_of, lambda d: (at_once, 0)
    t = x._make_table(); held_module.device_of = old
    return t
for B in ((32, 1) if GPU else (1,)):
    layers, end, (q, k, v) = make(B, 32768 if GPU else 3000, 2 if B > 1 or not GPU else 12)
    part = layers[0].parts[0]; live = int((part.log_weight > -torch.inf).sum())
    truth, _ = decode_reference(q.float(), part.key.float(), part.value.float(), SCALE, Rows(log_weight=part.log_weight))
    print("B", B, "live", live / B / H_KV, "listed", float(part.listed.float().mean()), f"{time.perf_counter()-start:.0f} s", flush=True)
    res = []
    tiles = [(128, 4, 3, 1), (64, 4, 3, 2), (64, 4, 4, 1), (64, 4, 2, 3), (32, 4, 4, 3), (128, 4, 2, 1), (64, 8, 3, 2)]
    for t in tiles if GPU else tiles[2:3]:
        for mode in (0, 1, 2, 3):
            if mode == 3 and t[0] != 64: continue
            for programs in sorted({1, t[3], 2, 4}) if B > 1 else (1, 2):
                px.MODE, px.TILES = mode, Tiling(*t)
                tables = [table(x, end, 132 * programs) for x in layers]
                try:
                    out = px.attend_places(q, k, v, tables[0], end, SCALE, False)
                    err = ((out.float() - truth).norm() / truth.norm()).item()
                    us = quantile(microseconds([lambda x=x: px.attend_places(q, k, v, x, end, SCALE, False) for x in tables]), .5)
                except Exception as e:
                    print(t, mode, programs, type(e).__name__, str(e)[:80]); continue
                res.append((us, t, mode, programs, err))
    res.sort()
    for us, t, mode, programs, err in res[:25] + [r for r in res[25:] if r[1] == (128, 4, 3, 1)]:
        print(f"B{B} {us:7.2f} us {2*live*D*2/4.27e12/us*1e6:.2f} {t} mode {mode} programs {programs} err {err:.1e}", flush=True)
    print(f"{time.perf_counter()-start:.0f} s", flush=True)
    del layers
