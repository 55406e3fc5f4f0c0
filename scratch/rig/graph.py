exec(open('/tmp/sus/prep.py').read().split('if __name__')[0])
import contextlib
from unittest import mock
S=mock.MagicMock()
torch.cuda.Stream=lambda: S; torch.cuda.CUDAGraph=lambda: S; torch.cuda.graph=lambda g: contextlib.nullcontext(); torch.cuda.stream=lambda s: contextlib.nullcontext()
torch.cuda.synchronize=lambda: None; torch.cuda.current_stream=lambda *a: S
for case in ("express, protected","heads"): go('graph',m.test_code_runs_in_cuda_graphs_and_on_other_streams,case)
st={"requested_bytes.all.current":0,"requested_bytes.all.peak":0}
torch.cuda.reset_peak_memory_stats=lambda: None; torch.cuda.memory_stats=lambda: st
for case in m.CASES: go('memory',m.test_code_takes_no_more_memory_than_the_body,case)
