"""Gradients of segment attention: the plan against the table it inverts, the kernels against the PyTorch backward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels import express as E
from express_compile.kernels.attend import segments_backward as S
from express_compile.kernels.attend.segments import (
    COMPACTED,
    TOKENS,
    SegmentTable,
    Sources,
    causal_table,
    dense_table,
    segment_attention_backward,
    segment_attention_reference,
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 rows and 16 queries, and chunks of two products: small problems have all that large ones have."""
    monkeypatch.setattr(S, "query_tiles", lambda *shape: S.Tiles(16, 32, 4, 2))
    monkeypatch.setattr(S, "row_tiles", lambda *shape: S.Tiles(16, 32, 4, 2))
    monkeypatch.setattr(S, "MIN_CHUNK", 2)


def random_table(rng, Lq, past, A, segments, block, most=40):
    """Random segments of either buffer, and tails of random length."""
    shift = int(rng.integers(block))
    blocks = -(-(Lq + shift) // block)
    begin = np.maximum(past - shift + block * np.arange(blocks), 0)
    table = np.zeros((blocks, segments, 3), dtype=np.int64)
    for b in range(blocks):
        for i in range(segments):
            source = rng.integers(2)
            limit = A if source else int(begin[b])
            length = rng.integers(0, min(limit, most) + 1)
            table[b, i] = source, rng.integers(0, limit - length + 1), length
    tail = rng.integers(np.maximum(begin - 60, 0), np.maximum(begin - 10, 0) + 1)
    return SegmentTable(block, past, table, rng.uniform(-1, 3, (blocks, segments)), tail, shift)


def random_tensors(seed, table, Lq, A, B=1, H=2, H_kv=1, D=16, Dv=16, dtype=torch.float32):
    """Gradient, query, key, value and compacted rows, strided as models produce them."""
    generator = torch.Generator().manual_seed(seed)
    Lk = table.q_offset + Lq
    shapes = ((Lq, H, Dv), (Lq, H, D), (Lk, H_kv, D), (Lk, H_kv, Dv), (A, H_kv, D), (A, H_kv, Dv))
    return [torch.randn(B, *shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def weights_of_table(table, Lq, Lk, A):
    """``[2, Lq, rows]``: the sum of the weights with which a query sees a row, and how often it does."""
    seen = np.zeros((2, Lq, Lk + A))
    for i in range(Lq):
        block = (i + table.shift) // table.block
        for (source, first, rows), weight in zip(table.segments[block], table.log_weight[block], strict=True):
            first = first + Lk * (source == COMPACTED)
            seen[:, i, first : first + rows] += [[math.exp(weight)], [1]]
        seen[:, i, table.tail[block] : i + table.q_offset + 1] += 1
    return seen


def weights_of_plan(plan, table, Lq, Lk, A):
    """The same from the runs of every chunk."""
    seen = np.zeros((2, Lq, Lk + A))
    for source, row, first, causal, stop, _ in plan.chunks.tolist():
        for i in range(first, stop):
            a, b, q0, q1 = plan.runs[i].tolist()
            assert row <= a < b <= min(row + plan.rows, A if source == COMPACTED else Lk)
            assert 0 <= q0 < q1 and q0 % plan.queries == q1 % plan.queries == 0
            q = np.arange(max(q0 - table.shift, 0), min(q1 - table.shift, Lq))
            visible = np.ones((len(q), b - a))
            if i >= causal:
                assert source == TOKENS and plan.log_weight[i] == 0
                visible = np.arange(a, b) <= q[:, None] + table.q_offset
            at = Lk * (source == COMPACTED)
            seen[:, q[0] : q[-1] + 1, at + a : at + b] += visible * [[[math.exp(plan.log_weight[i])]], [[1]]]
    return seen


def check_plan(table, Lq, A, rows, queries, group):
    Lk = table.q_offset + Lq
    plan = S.make_plan(table, Lq, Lk, A, rows, queries, group)
    np.testing.assert_allclose(
        weights_of_plan(plan, table, Lq, Lk, A), weights_of_table(table, Lq, Lk, A), rtol=1e-5, atol=1e-9
    )
    tiles = [(s, r) for s, n in ((TOKENS, Lk), (COMPACTED, A)) for r in range(0, n, rows)]
    of_tile = {tile: [] for tile in tiles}
    for source, row, *_, slot in plan.chunks.tolist():
        of_tile[source, row].append(slot)
    shared = {tile: (min(slots), max(slots) + 1) for tile, slots in of_tile.items() if len(slots) > 1}
    assert all(slots == [-1] for tile, slots in of_tile.items() if tile not in shared), "one chunk writes directly"
    assert {(s, r): (a, b) for s, r, a, b in plan.sums.tolist()} == shared
    assert sorted(plan.chunks[plan.chunks[:, 5] >= 0, 5]) == list(range(plan.slots)), "no slot is shared"
    assert plan.slots <= max(len(tiles), S.MIN_TILES), "the slots take at most as much memory as the gradients"
    return plan


@given(
    seed=st.integers(0, 10**6),
    Lq=st.integers(1, 200),
    past=st.integers(0, 90),
    A=st.sampled_from([0, 1, 50, 130]),
    rows=st.sampled_from([16, 32, 128]),
    block=st.sampled_from([16, 64]),
    most=st.sampled_from([5, 100]),
)
def test_plan_inverts_random_tables(seed, Lq, past, A, rows, block, most):
    rng = np.random.default_rng(seed)
    table = random_table(rng, Lq, past, A, 3, block, most)
    check_plan(table, Lq, A, rows, int(rng.choice([16, block])), int(rng.choice([1, 8, 40])))


@given(Lq=st.integers(1, 300), R=st.integers(1, 100), rows=st.sampled_from([16, 32]), group=st.sampled_from([1, 8]))
def test_plan_inverts_dense_tables(Lq, R, rows, group):
    check_plan(dense_table(Lq, R, 32), Lq, R, rows, 16, group)


def test_few_rows_that_many_queries_see_are_cut_into_many_chunks():
    plan = S.make_plan(dense_table(32768, 256), 32768, 0, 256, 64, 32, 4)
    assert 128 <= len(plan.chunks) <= 256 and plan.slots == len(plan.chunks)


@pytest.mark.parametrize("protected", [0, 20])
@pytest.mark.parametrize("n, Lq, s, window", [(900, 900, 16, 16), (1501, 700, 8, 100), (2000, 1999, 32, 0)])
def test_plan_inverts_express_layouts(n, Lq, s, window, protected):
    config = E.Express(s, inflation=E.default_inflation(s), sinks=8, recent=window, protected=protected, block=32)
    layout = E.make_layout(config, Lq, n)
    plan = check_plan(layout.table, Lq, layout.size, 32, 16, 2)
    assert len(plan.sums), "rows of E are seen by most queries, others by few"


def test_plan_of_exact_attention_is_short():
    plan = S.make_plan(causal_table(1 << 17, 1 << 17), 1 << 17, 1 << 17, 0, 128, 64, 4)
    assert len(plan.runs) < 2 * (1 << 17) / 128 and plan.slots == 0


@pytest.mark.parametrize("n", [32768, 131072])
def test_work_of_express_is_balanced(n):
    layout = E.make_layout(E.Express(512, inflation=7, sinks=32, recent=32, protected=0), n, n)
    A = layout.size
    plan = S.make_plan(layout.table, n, n, A, 64, 64, 4)
    work = plan.runs[:, 3] - plan.runs[:, 2]
    chunks = np.array([work[first:stop].sum() for first, stop in plan.chunks[:, [2, 4]]])
    assert chunks.max() <= 4 * chunks.mean() and chunks[0] == chunks.max()
    # whole tiles: little more than the rows that queries really see
    assert work.sum() * 64 < 1.2 * layout.table.rows_seen(n).sum()


def gradients(tensors, table, scale, dtype=None, run=segment_attention_backward):
    """Gradients of the attention of the tensors, in ``dtype`` if one is given."""
    grad, *inputs = (x if dtype is None else x.to(dtype) for x in tensors)
    query, sources = inputs[0], Sources(*inputs[1:])
    out, lse = segment_attention_reference(query, sources, table, scale)
    return run(grad, query, sources, out, lse, table, scale)


def error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def check_gradients(tensors, table, scale):
    """The tolerance rule: in the dtype of the inputs, the kernels err at most twice as much as the reference.

    Besides, they round P and dS to that dtype, which shows where it is not one of many roundings that cancel; and
    a rounded score of size 8 is off by 8 eps of float32.
    """
    truth = gradients(tensors, table, scale, torch.float64)
    reference = gradients(tensors, table, scale)
    actual = gradients(tensors, table, scale, run=S.segment_attention_backward_triton)
    for a, r, t, x in zip(actual, reference, truth, tensors[1:], strict=True):
        assert a.dtype == torch.float32 and a.shape == x.shape and a.is_contiguous()
        slack = max(torch.finfo(x.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        assert error(a.to(x.dtype), t) <= 2 * error(r.to(x.dtype), t) + slack
    return actual


@given(
    seed=st.integers(0, 10**6),
    Lq=st.integers(1, 50),
    past=st.integers(10, 50),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    D=st.sampled_from([8, 16, 40]),
    Dv=st.sampled_from([16, 24]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_against_reference(poison, small_tiles, seed, Lq, past, heads, D, Dv, dtype):
    table = random_table(np.random.default_rng(seed), Lq, past, 50, 2, 16)
    check_gradients(random_tensors(seed, table, Lq, 50, 1, *heads, D, Dv, dtype), table, D**-0.5)


@pytest.mark.parametrize("Lq, R, dtype", [(40, 50, torch.float16), (33, 64, torch.float32)])
def test_kernels_of_dense_tables(poison, small_tiles, Lq, R, dtype):
    """More queries than rows and no tokens; a sequence that sees nothing (lse set to infinity) has gradients of 0."""
    generator = torch.Generator().manual_seed(Lq)
    shapes = [(Lq, 2), (Lq, 2), (0, 1), (0, 1), (R, 1), (R, 1)]
    tensors = [torch.randn(2, n, h, 16, generator=generator).to(dtype).transpose(1, 2) for n, h in shapes]
    table = dense_table(Lq, R, 32)
    check_gradients(tensors, table, 0.25)
    out, lse = segment_attention_reference(tensors[1], Sources(*tensors[2:]), table, 0.25)
    out[1], lse[1] = 0, math.inf
    for run in (segment_attention_backward, S.segment_attention_backward_triton):
        for x in run(*tensors[:2], Sources(*tensors[2:]), out, lse, table, 0.25):
            assert (x[1] == 0).all() and x.isfinite().all()


@pytest.mark.parametrize(
    "block, D, dtype", [(128, 64, torch.float16), (64, 256, torch.float16), (128, 64, torch.float32)]
)
def test_kernels_with_the_tiles_of_the_gpu(poison, block, D, dtype):
    table = random_table(np.random.default_rng(1), 150, 30, 70, 2, block, 70)
    check_gradients(random_tensors(1, table, 150, 70, 1, 1, 1, D, D, dtype), table, D**-0.5)


@pytest.mark.parametrize("Lq, shift", [(5, 3), (20, 0), (20, 40)])
def test_parts_of_a_block_without_a_query_read_no_rows(poison, small_tiles, Lq, shift):
    """Those behind the last query would read rows that are not there, in whole tiles."""
    segments = np.array([[[TOKENS, 0, 32], [COMPACTED, 2, 34]]])
    table = SegmentTable(128, 40, segments, np.ones((1, 2)), np.array([0 if shift else 40]), shift)
    check_gradients(random_tensors(2, table, Lq, 40), table, 0.25)


@pytest.mark.parametrize("n, Lq, protected", [(250, 180, 0), (600, 100, 20)])
def test_gradients_of_express(poison, small_tiles, n, Lq, protected):
    """A real layout: long chains, tiles with several chunks, and the way back from copies to tokens."""
    scale = 0.25
    config = E.Express(8, inflation=1, sinks=4, recent=16, protected=protected, block=16)
    layout = E.make_layout(config, Lq, n)
    A = layout.size
    tensors = random_tensors(0, layout.table, Lq, 0)
    grad, q, k, v, *_ = tensors
    kept = E.thin_reference(k, v, layout, scale, torch.tensor(3), 0)
    assert len(S.make_plan(layout.table, Lq, n, A, 32, 16, 2).sums)
    rows = [grad, q, k, v, E.gather_rows(k, kept), E.gather_rows(v, kept)]
    d_query, *d_rows = check_gradients(rows, layout.table, scale)
    for target, part in zip(d_rows[:2], d_rows[2:], strict=True):
        S.accumulate_rows_triton(target, kept, part)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    copies = [E.gather_rows(x, kept) for x in leaves[1:]]
    out, _ = segment_attention_reference(leaves[0], Sources(*leaves[1:], *copies), layout.table, scale)
    for a, e in zip((d_query, *d_rows), torch.autograd.grad(out, leaves, grad.double()), strict=False):
        assert error(a, e) < 1e-5


def test_strided_inputs_and_rows_that_nobody_sees(poison, small_tiles):
    segments = np.array([[[TOKENS, 3, 20]], [[COMPACTED, 33, 3]]])
    table = SegmentTable(16, 40, segments, np.ones((2, 1)), np.array([38, 50]))
    tensors = random_tensors(3, table, 20, 70, B=2, H=2, D=20, Dv=16)
    strided = []
    for x in tensors:  # rows are slices of a wider, longer buffer that is NaN elsewhere
        wide = torch.full((x.shape[0], x.shape[2] + 7, x.shape[1], x.shape[3] + 3), math.nan)
        wide[:, : x.shape[2], :, : x.shape[3]] = x.transpose(1, 2)
        strided.append(wide[:, : x.shape[2], :, : x.shape[3]].transpose(1, 2))
    actual = check_gradients(strided, table, 0.2)
    for a, b in zip(actual, gradients(tensors, table, 0.2, run=S.segment_attention_backward_triton), strict=True):
        assert torch.equal(a, b)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]  # stride(-1) > 1: copied
    for a, b in zip(actual, gradients(columns, table, 0.2, run=S.segment_attention_backward_triton), strict=True):
        assert torch.equal(a, b)
    for x in actual[1:3]:
        assert (x[:, :, :3] == 0).all() and (x[:, :, 23:38] == 0).all() and (x[:, :, 38:] != 0).any()
    for x in actual[3:]:
        assert (x[:, :, :33] == 0).all() and (x[:, :, 36:] == 0).all() and (x[:, :, 33:36] != 0).all()


def test_the_gradient_of_a_sum_has_stride_zero(small_tiles):
    table = causal_table(40, 40, 16)
    tensors = random_tensors(5, table, 40, 0)
    tensors[0] = torch.ones(()).expand(tensors[0].shape)
    check_gradients(tensors, table, 0.25)


@pytest.mark.parametrize("wrong", ["log_weight", "segments", "tail"])
def test_a_wrong_table_is_noticed(small_tiles, wrong):
    rng = np.random.default_rng(4)
    table = random_table(rng, 40, 60, 50, 2, 16)
    table.tail[:] = np.minimum(table.tail, 50)
    tensors = random_tensors(4, table, 40, 50)
    truth = gradients(tensors, table, 0.25, torch.float64)
    reference = gradients(tensors, table, 0.25)
    out, lse = segment_attention_reference(tensors[1], Sources(*tensors[2:]), table, 0.25)
    if wrong == "log_weight":
        table.log_weight[:] += 0.01
    elif wrong == "segments":
        table.segments[1, 0] = COMPACTED, 7, 11
    else:
        table.tail[:] += 1
    actual = S.segment_attention_backward_triton(*tensors[:2], Sources(*tensors[2:]), out, lse, table, 0.25)
    errors = [error(a, t) > 2 * error(r, t) + 1e-6 for a, r, t in zip(actual, reference, truth, strict=True)]
    assert errors[0] and any(errors[1:]), "dQ and the rows read the table each in their own way"


def test_the_plan_is_made_once_and_forgotten_with_its_table():
    table = random_table(np.random.default_rng(0), 40, 0, 0, 1, 16)
    first = S.plan_on(torch.device("cpu"), table, 40, 40, 0, 32, 16, 2)
    assert S.plan_on(torch.device("cpu"), table, 40, 40, 0, 32, 16, 2) is first
    assert S.plan_on(torch.device("cpu"), table, 30, 30, 0, 32, 16, 2) is not first
    before = len(S._plans)
    del table
    assert len(S._plans) == before - 1


def test_dtypes_without_a_kernel():
    tensors = [x.double() for x in random_tensors(0, causal_table(4, 4, 16), 4, 0)]
    with pytest.raises(TypeError, match="query: dtype torch.float64; the kernel takes float16, bfloat16 or float32"):
        rows = Sources(*tensors[2:])
        S.segment_attention_backward_triton(*tensors[:2], rows, *tensors[:2], causal_table(4, 4, 16), 1.0)


@given(seed=st.integers(0, 10**6), L=st.integers(1, 70), A=st.integers(0, 60), D=st.sampled_from([5, 16, 24]))
@settings(max_examples=10)
def test_accumulated_rows(seed, L, A, D):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(min(L, 9), (2, 3, A + 4), generator=generator, dtype=torch.int32)[:, :, 4:] * (L // min(L, 9))
    rows = torch.randn(2, 3, A, D, generator=generator)
    target = torch.randn(2, L, 3, D + 1, generator=generator)[..., :D].transpose(1, 2)
    expected = target.double()
    for b, h, i in np.ndindex(2, 3, A):
        expected[b, h, index[b, h, i]] += rows[b, h, i]
    actual, reference = target.clone(), target.clone()
    S.accumulate_rows_triton(actual, index, rows)
    S.accumulate_rows(reference, index, rows)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.double(), expected, rtol=1e-5, atol=1e-5)
    untouched = torch.ones(2, 3, L, dtype=torch.bool).scatter_(2, index.long(), False)
    assert torch.equal(actual[untouched], target[untouched])
