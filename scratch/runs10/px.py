import os, sys
from pathlib import Path
sys.path.insert(0, "examples/bench")
import device_code as dc
os.environ["TRITON_CACHE_DIR"] = "/tmp/px_cache"
dc.use_triton(Path("/tmp/t36"), "3.6.")
import torch, device_calls as calls
from express_compile.kernels.attend import places as P
from express_compile.kernels.attend.decode import Tiling
from express_compile.kernels.held import Held
from express_compile.kernels.heads import PerHead
from express_compile.core.rows import Rows as HeadRows
from express_compile.kernels.launch import Random
q, k, v = (torch.randn(1, h, 600, 128).to(torch.bfloat16) for h in (32, 8, 8))
def go(tiles, holds):
    P._tiling = lambda *a: Tiling(*tiles)
    rec = calls.recorded(); launches = rec.__enter__()
    held = Held(PerHead((HeadRows(32, 64, 64, 64),)), k, v, Random(torch.tensor(5), 3), 0.1)
    held.fill(k[:, :, :599], v[:, :, :599]); held.settle(single=True); held.prepare_step()
    P.attend_places(*(x[:, :, 599:] for x in (q, k, v)), held._table[1], held._end, 0.1, holds)
    rec.__exit__(None, None, None); known = {}
    row = dc.compiled(launches[-1], known)
    made = row.pop("made", None)
    print(tiles, holds, {x: row.get(x) for x in ("registers", "spilled", "shared", "error")}, flush=True)
    Path(f"/tmp/px_{tiles[0]}_{tiles[2]}_{int(holds)}.ttgir").write_text(made.asm["ttgir"])
    Path(f"/tmp/px_{tiles[0]}_{tiles[2]}_{int(holds)}.ptx").write_text(made.asm["ptx"])
for t in ((128, 4, 3, 1), (64, 4, 3, 2), (64, 4, 2, 3)):
    for holds in (False, True): go(t, holds)
