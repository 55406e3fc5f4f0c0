"""Plans per KV head at real sizes: each group against its reference, gradients, padding, CUDA graphs, no sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from express_compile.core.method import METHODS
from express_compile.core.rows import Rows, to_numbers
from express_compile.kernels import express as E
from express_compile.kernels import heads as P
from express_compile.kernels.attend.segments import segment_attention_backward, segment_attention_reference
from express_compile.kernels.launch import Random
from express_compile.kernels.select.blocks import select_blocks

WINDOW, CORE, KEPT = Rows(32, 256), Rows(32, 256, 64), Rows(32, 256, 128, 256)
PLACES, BLOCKS, WHOLE = Rows(32, 256, protected=256), Rows(32, 256, selected=16), Rows(everything=True)
MIXED = [BLOCKS, WINDOW, WHOLE, KEPT, BLOCKS, PLACES, WHOLE, CORE]
FEW = [WINDOW, BLOCKS, Rows(70, 33, selected=3), PLACES, Rows(32, 256, selected=7), KEPT, Rows(32, 512), BLOCKS]
QUERY = [BLOCKS, WINDOW, WHOLE, KEPT, BLOCKS, PLACES, WHOLE, WHOLE, CORE, CORE, FEW[4], BLOCKS, KEPT, WHOLE, *FEW[:2]]
LAYER = 3


def seed() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device="cuda")


def tokens(n: int, Lq: int | None = None, H: int = 16, H_kv: int = 8, D: int = 128, dtype=torch.bfloat16, B: int = 1):
    generator = torch.Generator("cuda").manual_seed(n)
    q, k, v = (torch.randn(B, h, n, D, generator=generator, device="cuda") for h in (H, H_kv, H_kv))
    return [(2 * q).to(dtype)[:, :, n - (Lq or n) :], k.to(dtype), v.to(dtype)]


def op(q, k, v, rows: list[Rows], padding: torch.Tensor | None = None, **changes: Any):
    options = dict(halving="balanced", inflation=-1, flatten=0.0, block=128, min_length=0)
    given = {**options, **changes, "rows": to_numbers(rows)}
    return METHODS["heads"].op(q, k, v, padding, seed(), q.shape[3] ** -0.5, LAYER, **given)


@pytest.mark.parametrize("rows", [WINDOW, CORE, KEPT], ids=str)
def test_equal_rows_for_all_heads_are_express_bit_for_bit_where_it_has_such_rows(rows: Rows) -> None:
    q, k, v = tokens(5000)
    if not rows.thinned:
        out, table = op(q, k, v, [rows])[0], E.make_layout(P.PerHead([rows]).config(rows), 5000, 5000).table
        expected = segment_attention_reference(q, P.Sources.tokens(k, v), table, 128**-0.5)[0]
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)
        return
    own = dict(s=rows.thinned, sinks=32, recent=256, protected=rows.protected, inflation=-1)
    options = dict(**own, halving="balanced", flatten=0.0, block=128, min_length=0)
    expected = METHODS["express"].op(q, k, v, None, seed(), 128**-0.5, LAYER, **options)
    for x, e in zip(op(q, k, v, [rows] * 8), expected, strict=True):
        assert torch.equal(x, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("mixed", "Lq", "B"),
    [
        (MIXED, 6000, 1),
        (MIXED, 700, 2),
        (FEW, 6000, 2),
        ([*FEW[:7], WHOLE], 6000, 1),
        ([*FEW[:7], WHOLE], 6000, 2),
        (QUERY, 6000, 1),
        (QUERY, 700, 2),
    ],
)
def test_a_head_gives_beside_others_what_it_gives_among_its_like(dtype: torch.dtype, mixed, Lq: int, B: int) -> None:
    """Also that it draws the numbers of its own place: its rows are those that it has where all heads are alike. Exact
    heads are cuDNN's where all are, and otherwise not: a rounding of the output apart."""
    q, k, v = tokens(6000, Lq, dtype=dtype, B=B)
    out, lse = op(q, k, v, mixed)
    for rows in set(mixed):
        every, every_lse = op(q, k, v, [rows])
        near = dict(rtol=1e-2, atol=4e-3) if rows == WHOLE and dtype == torch.bfloat16 else dict(rtol=1e-3, atol=1e-4)
        for h in (h for h, own in enumerate(mixed) if own == rows):
            heads = slice(h * 16 // len(mixed), (h + 1) * 16 // len(mixed))
            torch.testing.assert_close(out[:, heads], every[:, heads], **near)
            torch.testing.assert_close(lse[:, heads], every_lse[:, heads], rtol=1e-4, atol=1e-4)


def test_gradients_of_query_heads_add_up() -> None:
    """Those of each are what it adds where all heads have its rows; padded, with exact queries at the end."""
    inputs = [x.requires_grad_() for x in tokens(3000, B=2)]
    padding = torch.arange(3000, device="cuda") >= torch.tensor([[400], [0]], device="cuda")
    grad = torch.randn(inputs[0].shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    found = torch.autograd.grad(op(*inputs, QUERY, padding, last=16)[0], inputs, grad)
    expected = [torch.zeros(x.shape, device="cuda") for x in inputs]
    for rows in set(QUERY):
        own = torch.tensor([x == rows for x in QUERY], device="cuda")[:, None, None]
        alone = torch.autograd.grad(op(*inputs, [rows], padding, last=16)[0], inputs, grad * own)
        expected = [x + part.float() for x, part in zip(expected, alone, strict=True)]
    for x, e in zip(found, expected, strict=True):
        assert (x.float() - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("n", "Lq"), [(6000, 6000), (6000, 700), (6000, 9)])
@pytest.mark.parametrize(("last", "H"), [(16, 16), (64, 32), (40, 32), (256, 32)])
def test_the_last_queries_see_everything(n: int, Lq: int, padding: str | None, last: int, H: int) -> None:
    """In one piece and in several, and the others do what they do without; gradients are those of both parts."""
    q, k, v = tokens(n, Lq, H=H, B=2)
    real = torch.ones(2, n, dtype=torch.bool, device="cuda")
    real[0, slice(0, 500) if padding == "left" else slice(n - 5, n)] = padding is None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    given = None if padding is None else real
    (out, lse), (plain, plain_lse), (exact, exact_lse) = (
        op(*inputs, rows, given, last=x) for rows, x in ((MIXED, last), (MIXED, 0), ([WHOLE], 0))
    )
    ends = (real.flip(1).cumsum(1).flip(1) <= last)[:, n - Lq :] & real[:, n - Lq :]
    for b in range(2):
        torch.testing.assert_close(out[b][:, ends[b]], exact[b][:, ends[b]], rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(lse[b][:, ends[b]], exact_lse[b][:, ends[b]], rtol=1e-3, atol=1e-3)
        assert torch.equal(out[b][:, ~ends[b]], plain[b][:, ~ends[b]])
        assert torch.equal(lse[b][:, ~ends[b]], plain_lse[b][:, ~ends[b]])
    here = ends[:, None, :, None]
    found = torch.autograd.grad(out.float().sum(), inputs)
    parts = (
        torch.autograd.grad((plain * ~here).float().sum(), inputs),
        torch.autograd.grad((exact * here).sum(), inputs),
    )
    for x, a, b in zip(found, *parts, strict=True):
        expected = a.float() + b.float()
        assert (x.float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)])
@pytest.mark.parametrize(
    ("rows", "n", "Lq", "last", "B", "Dv"),
    [
        (MIXED, 6000, 6000, 256, 1, 128),
        (MIXED, 6000, 2300, 130, 2, 64),
        (QUERY, 5003, 5003, 77, 2, 128),
        (FEW, 6000, 5900, 64, 1, 128),
        ([KEPT], 6000, 6000, 200, 2, 128),
        ([WINDOW], 9000, 9000, 1, 2, 128),
    ],
)
def test_the_last_queries_are_in_the_launch_of_the_others(
    rows, n: int, Lq: int, last: int, B: int, Dv: int, dtype: torch.dtype, block: int, monkeypatch
) -> None:
    """The kernel for Hopper, which has blocks of 128 queries in bfloat16, and the other one."""
    q, k, v = tokens(n, Lq, H=32, dtype=dtype, B=B)
    v = v[..., :Dv]
    rows = [x for x in rows for _ in range(2)] if rows is QUERY else rows
    monkeypatch.setattr(P, "attend_last", None)
    (out, lse), (plain, plain_lse), (exact, exact_lse) = (
        op(q, k, v, own, last=x, block=block) for own, x in ((rows, last), (rows, 0), ([WHOLE], 0))
    )
    near = dict(rtol=1e-3, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-2, atol=4e-3)
    torch.testing.assert_close(out[:, :, -last:], exact[:, :, -last:], **near)
    torch.testing.assert_close(lse[:, :, -last:], exact_lse[:, :, -last:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain_lse[:, :, -last:], exact_lse[:, :, -last:], rtol=1e-3, atol=1e-3)
    same = dict(rtol=0, atol=0) if len(rows) > 1 else dict(rtol=1e-2, atol=1e-3)  # without last in another kernel
    torch.testing.assert_close(out[:, :, :-last], plain[:, :, :-last], **same)
    torch.testing.assert_close(lse[:, :, :-last], plain_lse[:, :, :-last], **same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [BLOCKS, Rows(70, 33, selected=3), PLACES, WINDOW], ids=str)
def test_forward_and_backward_are_as_near_to_float64_as_the_reference(rows: Rows, dtype: torch.dtype) -> None:
    """With the rows that the kernels chose: at most twice the error of the reference in the same precision."""
    q, k, v = (x.requires_grad_() for x in tokens(3000, H=4, H_kv=2, dtype=dtype))
    out, _ = op(q, k, v, [rows])
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    config = P.PerHead([rows]).config(rows)
    call = P.Call(q.detach(), k.detach(), v.detach(), None, seed(), 128**-0.5, LAYER)
    if rows.selected:
        _, index, table = P._selected(call, config, select_blocks(q.detach(), k.detach(), config, call.scale))
    else:
        layout = E.make_layout(config, 3000, 3000)
        _, index = E.select_rows(call.key, call.value, layout, call.scale, Random(seed(), LAYER))
        table = layout.table
    results = []
    for precision in (torch.float64, dtype):
        query, key, value = (x.detach().to(precision) for x in (q, k, v))
        sources = P.Sources(key, value, E.gather_rows(key, index), E.gather_rows(value, index))
        own, lse = segment_attention_reference(query, sources, table, call.scale)
        grads = list(segment_attention_backward(grad.to(precision), query, sources, own, lse, table, call.scale))
        for i in (1, 2):
            grads[i].scatter_add_(2, index.long()[..., None].expand_as(grads[i + 2]), grads[i + 2])
        results.append([own, *(g.to(precision) for g in grads[:3])])
    for x, truth, reference in zip(found, *results, strict=True):
        error, allowed = ((y.double() - truth).norm() / truth.norm() for y in (x, reference))
        assert error <= 2 * allowed + 1e-6


def test_padding_does_not_reach_any_head() -> None:
    n, left = 4000, 1100
    q, k, v = (x.expand(2, -1, -1, -1).contiguous().requires_grad_() for x in tokens(n))
    padding = torch.arange(n, device="cuda") >= torch.tensor([[left], [0]], device="cuda")
    out, lse = op(q, k, v, MIXED, padding)
    leaves = [x[:1, :, left:].detach().requires_grad_() for x in (q, k, v)]
    alone, alone_lse = op(*leaves, MIXED)
    torch.testing.assert_close(out[:1, :, left:], alone, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(lse[:1, :, left:], alone_lse, rtol=1e-3, atol=1e-3)
    assert (out[0, :, :left] == 0).all()
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    expected = torch.autograd.grad(alone, leaves, grad[:1, :, left:])
    for x, e in zip(found, expected, strict=True):
        assert (x[:1, :, left:] - e).norm() <= 2e-2 * e.norm() and (x[0, :, :left] == 0).all()


def test_it_never_waits_for_the_device_and_runs_in_a_cuda_graph() -> None:
    q, k, v = tokens(8192)
    expected = op(q, k, v, MIXED)[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(q, k, v, MIXED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(q, k, v, MIXED)[0]
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
