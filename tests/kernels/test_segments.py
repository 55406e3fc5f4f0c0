"""Segment attention: the reference against dense attention, the kernel against the reference, the gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels import express as E
from express_compile.kernels.attend.segments import (
    COMPACTED,
    NO_TAIL,
    TOKENS,
    SegmentTable,
    Sources,
    causal_table,
    dense_table,
    describe,
    merged_lists,
    segment_attention_backward,
    segment_attention_reference,
    segment_attention_triton,
    tile_lists,
)


def random_problem(
    seed, Lq, past, segments, block, B=1, H=2, H_kv=1, D=16, Dv=16, dtype=torch.float64, shift=0, indexed=0
):
    """Random tensors, a random table and index: slices of every source of rows, and a tail of random length.

    With ``indexed`` rows read by index; without, the index is None.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    Lk, A = past + Lq, 90
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv), (B, H_kv, A, D), (B, H_kv, A, Dv))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    blocks = -(-(Lq + shift) // block)
    begin = np.maximum(past, past - shift + block * np.arange(blocks))
    table = np.zeros((blocks, segments, 3), dtype=np.int64)
    tail = rng.integers(np.maximum(begin - 60, 0), begin + 1)
    log_weight = rng.uniform(-1, 3, (blocks, segments))
    for b in range(blocks):
        for i in range(segments):
            source, offset, limit = [(0, 0, int(begin[b])), (1, 0, A), (1, A, indexed)][rng.integers(2 + bool(indexed))]
            length = rng.integers(0, min(limit, 80) + 1)
            table[b, i] = source, offset + rng.integers(0, limit - length + 1), length
        if rng.integers(2):  # a segment that the tail continues
            length = rng.integers(0, tail[b] + 1)
            table[b, 0], log_weight[b, 0] = (0, tail[b] - length, length), 0
    index = None
    if indexed:  # copied rows have an index as well, which nobody may use
        unused = torch.full((B, H_kv, A), 2**30, dtype=torch.int32)
        used = torch.randint(Lk, (B, H_kv, indexed), generator=generator, dtype=torch.int32)
        index = torch.cat([unused, used], 2)
    return tensors, SegmentTable(block, past, table, log_weight, tail, shift), index


def dense(tensors, table, scale, index=None):
    """The same attention query by query, as one dense softmax in float64."""
    q, k, v, ck, cv = (x.double() for x in tensors)
    B, H, Lq, _ = q.shape
    if index is not None:
        batch, head = torch.arange(B)[:, None, None], torch.arange(k.shape[1])[:, None]
        rows = index[:, :, ck.shape[2] :].long()
        ck, cv = torch.cat([ck, k[batch, head, rows]], 2), torch.cat([cv, v[batch, head, rows]], 2)
    g = H // k.shape[1]
    out, lse = q.new_zeros(B, H, Lq, v.shape[-1]), q.new_zeros(B, H, Lq)
    seen = table.rows_seen(Lq)
    for i in range(Lq):
        block, position = (i + table.shift) // table.block, i + table.q_offset
        keys, values, bias = [], [], []
        for (source, first, rows), weight in zip(table.segments[block], table.log_weight[block], strict=True):
            keys.append((k, ck)[source][:, :, first : first + rows])
            values.append((v, cv)[source][:, :, first : first + rows])
            bias += [weight] * rows
        keys.append(k[:, :, table.tail[block] : position + 1])
        values.append(v[:, :, table.tail[block] : position + 1])
        bias += [0.0] * (position + 1 - table.tail[block])
        assert len(bias) == seen[i]
        ks, vs = (torch.cat(x, 2).repeat_interleave(g, 1) for x in (keys, values))
        scores = (ks @ q[:, :, i, :, None])[..., 0] * scale + torch.tensor(bias, dtype=torch.float64)
        out[:, :, i] = (scores.softmax(-1)[..., None, :] @ vs)[..., 0, :]
        lse[:, :, i] = scores.logsumexp(-1)
    return out, lse


PROBLEM = dict(
    seed=st.integers(0, 10**6), past=st.integers(0, 60), shift=st.integers(0, 15), indexed=st.sampled_from([0, 50])
)


@given(**PROBLEM, Lq=st.integers(1, 70), segments=st.integers(1, 4))
def test_reference_is_dense_attention(seed, Lq, past, segments, shift, indexed):
    tensors, table, index = random_problem(
        seed, Lq, past, segments, 16, B=2, H=4, H_kv=2, D=6, Dv=5, shift=shift, indexed=indexed
    )
    out, lse = attend(segment_attention_reference, tensors, table, 0.3, index)
    expected, expected_lse = dense(tensors, table, 0.3, index)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def rows_of(lists, b, table, rows):
    """``(kind, row, log2-weight)`` of everything that block b reads before its first query, in order."""
    start, tiles, log2_weight, tail = lists[:4]
    begin = max(b * table.block - table.shift, 0) + table.q_offset
    assert table.tail[b] == NO_TAIL or tail[b] <= begin
    found = [(2, row, 0.0) for row in range(tail[b], begin)]
    for t in range(start[3 * b], start[3 * b + 3]):
        kind = int(np.searchsorted(start[3 * b + 1 : 3 * b + 3], t, "right"))
        (first, count), weight = tiles[t].tolist(), log2_weight[t].tolist()
        if first >= 0:
            weight, *others = np.atleast_1d(weight)
            assert not any(others)
            found += [(kind, row, weight) for row in range(first, first + count)]
        else:
            assert kind == 0 and count > 0
            for i, slot in enumerate(lists[4][t].tolist()):
                shown = min(rows // 4, count - rows // 4 * i)
                own = weight[0] + weight[i] * (i > 0)
                assert shown > 0 or slot == lists[4][t, i - 1], "what is read and hidden is a slot that is shown"
                kind, first = (0, slot) if slot >= 0 else (2, -1 - slot)
                found += [(kind, row, own) for row in range(first, first + shown)]
    return sorted(found)


def check_lists(table, Lq, A, blocks, rows=128):
    """Of these blocks both kinds of lists have the rows of the table and their weights; merged ones, in no more tiles
    than the others have of as many rows."""
    lists, merged = (run(table, rows, A) for run in (tile_lists, merged_lists))
    assert lists[0][-1] == len(lists[1]) == len(lists[2]) and merged[0][-1] == len(merged[1]) == len(merged[2])
    assert all(((tiles[:, 1] > 0) & (tiles[:, 1] <= rows)).all() for _, tiles, *_ in (lists, merged))
    for b in blocks:
        begin = max(b * table.block - table.shift, 0) + table.q_offset
        expected = [(2, row, 0.0) for row in range(table.tail[b], begin)]
        for (source, first, count), weight in zip(table.segments[b].tolist(), table.log_weight[b], strict=True):
            kind = 2 if source == TOKENS else int(first >= A)
            expected += [(kind, row, weight / math.log(2)) for row in range(first, first + count)]
        for found in (lists, merged):
            np.testing.assert_allclose(rows_of(found, b, table, rows), sorted(expected), rtol=1e-5, atol=1e-6)
    stop = np.minimum((1 + np.arange(len(table.tail))) * table.block - table.shift, Lq) + table.q_offset
    of_lists, of_merged = (
        np.diff(start[::3]) + -(-np.maximum(0, stop - tail) // rows) for start, _, _, tail, *_ in (lists, merged)
    )
    assert (of_merged <= of_lists).all()
    return merged


@given(**PROBLEM, Lq=st.integers(1, 200), rows=st.sampled_from([4, 16, 64, 128]))
def test_tile_lists_are_the_table(seed, Lq, past, shift, indexed, rows):
    tensors, table, _ = random_problem(seed, Lq, past, 4, 16, shift=shift, indexed=indexed)
    check_lists(table, Lq, tensors[3].shape[2], range(len(table.tail)), rows)


@given(
    n=st.integers(1, 3000), past=st.integers(0, 3000), s=st.sampled_from([2, 16, 64, 256]), sinks=st.integers(0, 200),
    recent=st.integers(0, 300), protected=st.sampled_from([0, 32, 100]), block=st.sampled_from([16, 64, 128]),
)  # fmt: skip
def test_tile_lists_of_express_are_its_table(n, past, s, sinks, recent, protected, block):
    inflation = E.default_inflation(s)
    config = E.Express(s, inflation=inflation, sinks=sinks, recent=recent, block=block, protected=protected)
    layout = E.make_layout(config, n, past + n)
    table = layout.table
    blocks = {0, len(table.tail) // 2, len(table.tail) - 1}
    start, tiles, log2_weight, tail, slots = check_lists(table, n, layout.copied, blocks)
    whole = E.make_layout(config, past + n, past + n)
    others = merged_lists(whole.table, 128, whole.copied)
    for x, y in zip((tiles, log2_weight, slots), (others[1], others[2], others[4]), strict=True):
        assert (x[start[-4] :] == y[others[0][-4] :]).all(), "a block does not depend on where the call begins"
    assert tail[-1] == others[3][-1]
    found = [t for b in blocks for t in range(start[3 * b], start[3 * b + 1]) if tiles[t, 0] < 0]
    rows = [rows_of((start, tiles, log2_weight, tail, slots), b, table, 128) for b in blocks]
    for wrong in (slots, log2_weight) if found else ():  # negative control
        wrong[found[0]] += 1
        assert rows != [rows_of((start, tiles, log2_weight, tail, slots), b, table, 128) for b in blocks]
        wrong[found[0]] -= 1


def attend(run, tensors, table, scale, index=None, lengths=None):
    query, *rows = tensors
    return run(query, Sources(*rows, index, lengths), table, scale)


def check_kernel(tensors, table, scale, index=None):
    """The tolerance rule: the kernel errs at most twice as much as the reference in the same precision."""
    truth, truth_lse = attend(segment_attention_reference, [x.double() for x in tensors], table, scale, index)
    reference, _ = attend(segment_attention_reference, tensors, table, scale, index)
    out, lse = attend(segment_attention_triton, tensors, table, scale, index)

    def error(x):
        return ((x.double() - truth).norm() / truth.norm()).item()

    assert error(out) <= 2 * error(reference)
    assert (lse.double() - truth_lse).abs().max() < 1e-5 * max(1.0, truth_lse.abs().max().item())
    return out


@given(
    **PROBLEM,
    Lq=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    D=st.sampled_from([8, 16, 40]),
    Dv=st.sampled_from([16, 24]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernel_against_reference(poison, seed, Lq, past, shift, indexed, heads, D, Dv, dtype):
    tensors, table, index = random_problem(seed, Lq, past, 3, 16, 1, *heads, D, Dv, dtype, shift, indexed)
    check_kernel(tensors, table, D**-0.5, index)


@pytest.mark.parametrize("shift", [0, 30, 64, 100])
def test_parts_of_a_block(poison, shift):
    """Blocks of two parts of 64 queries; the first part may be before the first query, the last behind the last."""
    tensors, table, index = random_problem(1, 150, 70, 3, 128, H=1, dtype=torch.float16, shift=shift, indexed=50)
    check_kernel(tensors, table, 0.25, index)


@pytest.mark.parametrize("Lq, Lk", [(90, 90), (17, 150)])
def test_kernel_without_compacted_rows(poison, Lq, Lk):
    (q, k, v, *_), _, _ = random_problem(2, Lq, Lk - Lq, 1, 16, dtype=torch.float16)
    check_kernel((q, k, v, k[:, :, :0], v[:, :, :0]), causal_table(Lq, Lk), 0.25)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    tensors, table, _ = random_problem(5, 20, 30, 2, 16, dtype=torch.float32)
    check_kernel(tensors, table, scale)


@pytest.mark.parametrize("spare", [3, 4])
def test_kernel_reads_strided_inputs_and_nothing_else(poison, spare):
    tensors, table, index = random_problem(
        3, 40, 9, 3, 32, B=2, H=2, H_kv=1, D=20, Dv=16, dtype=torch.float32, shift=5, indexed=50
    )
    strided = []
    for x in tensors:  # rows are slices of a wider, longer buffer that is NaN elsewhere
        wide = torch.full((x.shape[0], x.shape[2] + 7, x.shape[1], x.shape[3] + spare), math.nan)
        wide[:, : x.shape[2], :, : x.shape[3]] = x.transpose(1, 2)
        strided.append(wide[:, : x.shape[2], :, : x.shape[3]].transpose(1, 2))
        assert (describe(strided[-1], 32, 32).base is strided[-1]) == (spare % 4 == 0), "copied only where it has to be"
    out = check_kernel(strided, table, 0.2, index)
    assert torch.equal(out, attend(segment_attention_triton, tensors, table, 0.2, index)[0])


@pytest.mark.parametrize("wrong", ["weight", "shift"])
def test_a_wrong_table_is_noticed(wrong):
    tensors, table, _ = random_problem(4, 20, 30, 2, 16, dtype=torch.float32, shift=3)
    truth, _ = attend(segment_attention_reference, [x.double() for x in tensors], table, 0.25)
    reference, _ = attend(segment_attention_reference, tensors, table, 0.25)
    if wrong == "weight":
        table = replace(table, log_weight=table.log_weight + 0.01)
    else:
        table = replace(table, shift=4)
    other, _ = attend(segment_attention_triton, tensors, table, 0.25)
    assert (other - truth).norm() > 2 * (reference - truth).norm()


@pytest.mark.parametrize("Lq, Lk", [(50, 50), (17, 50), (1, 50)])
def test_causal_table_is_exact_attention(Lq, Lk):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, Lq, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, Lk, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    out, _ = segment_attention_reference(q, Sources.tokens(k, v), causal_table(Lq, Lk, 16), 0.4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 10**6),
    Lq=st.integers(1, 50),
    R=st.integers(1, 90),
    lengths=st.none() | st.lists(st.integers(0, 100), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=12)
def test_dense_table_with_lengths(seed, Lq, R, lengths, dtype):
    """Not causal, and rows behind a sequence's length are hidden; without any row: 0 and minus infinity."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, h, n, 16, generator=generator).to(dtype) for h, n in ((2, Lq), (1, R), (1, R)))
    seen = torch.ones(3, R, dtype=torch.bool)
    if lengths is not None:
        lengths = torch.tensor(lengths)
        seen = torch.arange(R) < lengths[:, None]
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), seen[:, None, None], scale=0.3, enable_gqa=True
    )
    truth[~seen.any(1)] = 0
    table = dense_table(Lq, R)
    results = {}
    for run in (segment_attention_reference, segment_attention_triton):
        out, lse = run(q, Sources.compacted(k, v, lengths), table, 0.3)
        assert (lse == -math.inf).all(-1).all(-1).tolist() == (~seen.any(1)).tolist()
        assert out.isfinite().all()
        results[run] = (out.double() - truth).norm()
    assert results[segment_attention_triton] <= 2 * results[segment_attention_reference]


def test_lengths_count_compacted_rows_alone():
    """Of rows by index and of the tail none is hidden."""
    tensors, table, index = random_problem(7, 40, 30, 3, 16, B=2, dtype=torch.float32, indexed=50)
    lengths = torch.tensor([10, 200])
    q, k, v, ck, cv = (x.double() for x in tensors)
    ck, cv = (x.clone() for x in (ck, cv))
    ck[0, :, 10:], cv[0, :, 10:] = 0, 0
    log_weight = table.log_weight.copy()
    whole, _ = attend(segment_attention_reference, (q, k, v, ck, cv), table, 0.3, index)
    for run in (segment_attention_reference, segment_attention_triton):
        out, _ = attend(run, tensors, table, 0.3, index, lengths)
        torch.testing.assert_close(out[1].double(), whole[1], rtol=1e-4, atol=1e-5)
        segments = table.segments.copy()
        inside = (segments[..., 0] == COMPACTED) & (segments[..., 1] < 90)
        segments[..., 2] = np.where(inside, np.clip(10 - segments[..., 1], 0, segments[..., 2]), segments[..., 2])
        cut = replace(table, segments=segments, log_weight=log_weight)
        expected, _ = attend(segment_attention_reference, (q, k, v, ck, cv), cut, 0.3, index)
        torch.testing.assert_close(out[0].double(), expected[0], rtol=1e-4, atol=1e-5)
        assert (out[0].double() - whole[0]).norm() > 1e-3


@given(seed=st.integers(0, 10**6), Lq=st.integers(1, 40), past=st.integers(0, 30), shift=st.integers(0, 15))
@settings(max_examples=15)
def test_backward_is_autograd_of_the_reference(seed, Lq, past, shift):
    tensors, table, _ = random_problem(seed, Lq, past, 3, 16, B=2, H=4, H_kv=2, D=6, Dv=5, shift=shift)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = attend(segment_attention_reference, leaves, table, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    actual = segment_attention_backward(grad, tensors[0], Sources(*tensors[1:]), out.detach(), lse.detach(), table, 0.3)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("run", [segment_attention_reference, segment_attention_triton])
def test_tables_that_do_not_fit(run):
    tensors, table, index = random_problem(0, 40, 30, 3, 16, dtype=torch.float32, shift=4, indexed=50)

    def fails(message, table=table, index=index):
        with pytest.raises(ValueError, match=message):
            attend(run, tensors, table, 1.0, index)

    def reading(source, first, length):
        segments = table.segments.copy()
        segments[1, 2] = source, first, length
        return replace(table, segments=segments)

    fails("table: 3 blocks; 40 queries with shift 15 are 4", replace(table, shift=15))
    fails("table: a segment reads tokens up to 71; there are 70", reading(TOKENS, 70, 1))
    fails("reads compacted rows up to 141; there are 90 and 50 more by index", reading(COMPACTED, 100, 41))
    fails("a block without a tail reads tokens", replace(reading(TOKENS, 0, 1), tail=np.full(3, NO_TAIL)))
    fails("there are 90 and 0 more by index", index=None)
    fails("a segment crosses compacted row 90, behind which rows are read by index", reading(COMPACTED, 80, 20))
    fails(r"index: shape \(1, 1, 89\); must be \(1, 1, 90 compacted rows or more\)", index=index[:, :, :89])
    with pytest.raises(ValueError, match="shift=16: must be from 0 to block - 1 = 15"):
        replace(table, shift=16)


def test_dtypes_without_a_kernel():
    tensors, table, _ = random_problem(0, 4, 0, 1, 16)
    with pytest.raises(TypeError, match="query: dtype torch.float64; the kernel takes float16, bfloat16 or float32"):
        attend(segment_attention_triton, tensors, table, 1.0)
