"""compute-sanitizer --tool X python .gpu/hopper/san.py (PYTHONPATH=.gpu/hopper/merged): every path of the kernel, small."""
import sys
sys.argv = ["check.py"]; sys.path.insert(0, __file__.rsplit("/", 1)[0])
import check
torch, hopper, S = check.setup("merged")
hopper._processors = lambda _: 5  # several jobs for each program, which is what may go wrong
for D, Dv in ((128, 128), (64, 64)):
    for n, past, s, window, ix in ((300, 0, None, 0, False), (1100, 40, 16, 40, False), (1100, 40, 16, 40, True)):
        q, src, table = check.problem(torch, S, n, past, s, window, D, Dv, ix, 1, 2, 1)
        assert hopper.takes(q, src.key, src.value, 128)
        out, lse = S.segment_attention_triton(q, src, table, D**-0.5)
        torch.cuda.synchronize(); assert out.isfinite().all() and lse.isfinite().all()
from express_compile.core.method import METHODS
from express_compile.core.rows import Rows, to_numbers
import express_compile.kernels.heads
q, k, v = (torch.randn(1, h, 2500, 128, device="cuda").bfloat16() for h in (4, 4, 4))
rows = to_numbers([Rows(32, 256, 64), Rows(32, 256, protected=256), Rows(32, 256, selected=7), Rows(32, 256)])
out, _ = METHODS["heads"].op(q[:, :, 2000:], k, v, None, torch.zeros((), dtype=torch.int64, device="cuda"), 0.09, 3, halving="balanced",
                             inflation=-1, flatten=0.0, block=128, min_length=0, rows=rows)
torch.cuda.synchronize(); assert out.isfinite().all(); print("done")
