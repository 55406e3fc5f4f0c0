"""The gradients of segment attention at real sizes on a GPU, against the PyTorch backward in float64."""

from __future__ import annotations

import pytest
import torch

from express_compile.kernels import express as E
from express_compile.kernels.attend.segments import (
    SegmentTable,
    Sources,
    causal_table,
    segment_attention_backward,
    segment_attention_reference,
    segment_attention_triton,
)
from express_compile.kernels.attend.segments_backward import (
    accumulate_rows,
    accumulate_rows_reference,
    segment_attention_backward_triton,
)


def problem(n, config, B=1, H=8, H_kv=2, D=128, Dv=128, dtype=torch.bfloat16, Lq=None):
    """The arguments of the backward for an Express layout with rows kept at random: gradient, rows, out, lse."""
    generator = torch.Generator("cuda").manual_seed(0)
    layout = E.make_layout(config, Lq or n, n)
    shapes = ((B, n, H, Dv), (B, n, H, D), (B, n, H_kv, D), (B, n, H_kv, Dv))
    grad, q, k, v = (torch.randn(s, generator=generator, device="cuda").to(dtype).transpose(1, 2) for s in shapes)
    grad, q = (x[:, :, n - (Lq or n) :] for x in (grad, q))
    kept = torch.randint(n, (B, H_kv, layout.size), generator=generator, device="cuda", dtype=torch.int32)
    rows = Sources(k, v, E.gather_rows(k, kept), E.gather_rows(v, kept))
    outputs = segment_attention_triton(q, rows, layout.table, D**-0.5)
    return kept, (grad, q, rows, *outputs, layout.table, D**-0.5)


def error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


def double_gradients(grad, query, rows, table, scale):
    query, rows = query.double(), Sources(*(x.double() for x in rows.buffers))
    out, lse = segment_attention_reference(query, rows, table, scale)
    return segment_attention_backward(grad.double(), query, rows, out, lse, table, scale)


def check(args):
    """The tolerance rule: in the dtype of the inputs, at most twice the error of the reference; the same bits twice."""
    grad, query, rows, _, _, table, scale = args
    actual = segment_attention_backward_triton(*args)
    for a, b in zip(actual, segment_attention_backward_triton(*args), strict=True):
        assert torch.equal(a, b), "same inputs, same bits"
    truth = double_gradients(grad, query, rows, table, scale)
    for a, r, t in zip(actual, segment_attention_backward(*args), truth, strict=True):
        assert a.dtype == torch.float32 and a.shape == t.shape
        assert error(a.to(grad.dtype), t) <= 2 * error(r.to(grad.dtype), t) + 1e-7
    return actual, truth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "D, Dv, H, H_kv",
    [(64, 64, 9, 3), (80, 80, 4, 4), (96, 64, 4, 1), (128, 128, 8, 2), (256, 256, 2, 1), (16, 24, 4, 1)],
)
def test_shapes_and_dtypes(poison, dtype, D, Dv, H, H_kv):
    config = E.Express(64, inflation=4, sinks=32, recent=100, protected=200, block=64 if D == 80 else 128)
    check(problem(4000, config, 2, H, H_kv, D, Dv, dtype)[1])


@pytest.mark.parametrize(
    "n, Lq, s, window, protected",
    [(20000, 20000, 512, 32, 0), (20000, 6000, 256, 256, 0), (12345, 12345, 128, 100, 256)],
)
def test_layouts(poison, n, Lq, s, window, protected):
    config = E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, protected=protected)
    check(problem(n, config, 1, 4, 2, Lq=Lq)[1])


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("Lq", [1, 700])
def test_blocks(poison, block, Lq):
    check(
        problem(3000, E.Express(64, inflation=4, sinks=32, recent=32, block=block, protected=0), D=64, Dv=64, Lq=Lq)[1]
    )


def test_exact_attention():
    """The table without segments, against PyTorch's own backward."""
    _, (grad, q, (k, v, *_), *_, scale) = problem(4096, E.Express(64, inflation=4, sinks=32, recent=32, protected=0))
    table = causal_table(4096, 4096)
    rows = Sources.tokens(k, v)
    outputs = segment_attention_triton(q, rows, table, scale)
    actual = segment_attention_backward_triton(grad, q, rows, *outputs, table, scale)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
    for a, e in zip(actual, torch.autograd.grad(out, leaves, grad.double()), strict=False):
        assert error(a, e) < 5e-3


@pytest.mark.parametrize("wrong", ["log_weight", "tail"])
def test_a_wrong_table_is_noticed(wrong):
    _, args = problem(6000, E.Express(256, inflation=6, sinks=32, recent=32, protected=0))
    grad, query, rows, out, lse, table, scale = args
    truth, reference = double_gradients(grad, query, rows, table, scale), segment_attention_backward(*args)
    log_weight, tail = table.log_weight.copy(), table.tail.copy()
    if wrong == "log_weight":
        log_weight[20:, 1] += 0.05
    else:
        tail[20:] += 1
    other = SegmentTable(table.block, table.q_offset, table.segments, log_weight, tail)
    actual = segment_attention_backward_triton(grad, query, rows, out, lse, other, scale)
    worse = [
        error(a.bfloat16(), t) > 2 * error(r.bfloat16(), t) for a, r, t in zip(actual, reference, truth, strict=True)
    ]
    assert worse[0] and any(worse[1:])


@pytest.mark.parametrize("L, A, D", [(20000, 30000, 128), (3000, 70, 80), (500, 20000, 256)])
def test_accumulated_rows(L, A, D):
    generator = torch.Generator("cuda").manual_seed(1)
    index = torch.randint(L, (2, 3, A), generator=generator, device="cuda", dtype=torch.int32)
    rows, target = (torch.randn(2, 3, x, D, generator=generator, device="cuda") for x in (A, L))
    expected, first, second = target.double(), target.clone(), target.clone()
    accumulate_rows_reference(expected, index, rows.double())
    accumulate_rows(first, index, rows)
    accumulate_rows(second, index, rows)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=2e-5)


def test_memory_is_linear():
    """Beside float32 gradients and two numbers per query: at most once more float32 dK and dV."""
    _, args = problem(32768, E.Express(512, inflation=7, sinks=32, recent=32, protected=0), H=32, H_kv=8)
    segment_attention_backward_triton(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = segment_attention_backward_triton(*args)
    taken = torch.cuda.max_memory_allocated() - before
    of_rows = sum(x.nbytes for x in gradients[1:])
    assert taken <= gradients[0].nbytes + 2.1 * of_rows + 2 * 4 * args[-3].numel() + 2**22


def test_cuda_graph():
    _, args = problem(8192, E.Express(256, inflation=6, sinks=32, recent=32, protected=0))
    expected = segment_attention_backward_triton(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = segment_attention_backward_triton(*args)
    graph.replay()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
