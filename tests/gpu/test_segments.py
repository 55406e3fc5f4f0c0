"""Segment attention on a GPU: shifted blocks, rows read by index, strided inputs, every dtype and head size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from express_compile.kernels import express as E
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.segments import (
    COMPACTED,
    SegmentTable,
    Sources,
    causal_table,
    segment_attention_reference,
    segment_attention_triton,
)

SIZES = [(64, 64, 9, 3), (80, 80, 4, 4), (96, 64, 4, 1), (128, 128, 8, 2), (256, 256, 2, 1), (64, 32, 4, 1)]


def tokens(n, B, H, H_kv, D, Dv, dtype, spare=0):
    """Queries, keys and values ``[B, H, n, D]``, strided as models produce them; NaN in the spare columns."""
    generator = torch.Generator("cuda").manual_seed(0)
    parts = []
    for heads, size in ((H, D), (H_kv, D), (H_kv, Dv)):
        wide = torch.full((B, n, heads, size + spare), float("nan"), device="cuda", dtype=dtype)
        wide[..., :size] = torch.randn(B, n, heads, size, generator=generator, device="cuda")
        parts.append(wide[..., :size].transpose(1, 2))
    return parts


def problem(past, s, window, block, k, v, indexed):
    """The table of an Express layout for the tokens after ``past``, over random rows instead of thinned ones.

    The last fifth of the rows is read by index with ``indexed``.
    """
    n = k.shape[2]
    table = E.make_layout(
        E.Express(s, inflation=E.default_inflation(s), sinks=32, recent=window, block=block, protected=0), n - past, n
    ).table
    source, first, length = (table.segments[..., i] for i in range(3))
    A = int((source * (first + length)).max())
    generator = torch.Generator("cuda").manual_seed(1)
    index = torch.randint(n, (*k.shape[:2], A), generator=generator, device="cuda", dtype=torch.int32)
    ck, cv = E.gather_rows(k, index), E.gather_rows(v, index)
    if not indexed:
        return table, (ck, cv), None
    A -= A // 5
    crossing = (source == COMPACTED) & (first < A) & (first + length > A)
    segments = table.segments.copy()
    segments[..., 2] = np.where(crossing, A - first, length)
    index[:, :, :A] = 2**30  # copied rows have an index as well, which nobody may use
    return replace(table, segments=segments), (ck[:, :, :A], cv[:, :, :A]), index


def attend(run, tensors, table, scale, index=None):
    query, *rows = tensors
    return run(query, Sources(*rows, index), table, scale)


def check(tensors, table, scale, index):
    """The tolerance rule: at most twice the error of the reference in the same precision, both against float64."""
    truth, truth_lse = attend(segment_attention_reference, [x.double() for x in tensors], table, scale, index)
    reference, _ = attend(segment_attention_reference, tensors, table, scale, index)
    out, lse = attend(segment_attention_triton, tensors, table, scale, index)
    assert (out - truth).norm() <= 2 * (reference - truth).norm()
    assert (lse.double() - truth_lse).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D, Dv, H, H_kv", SIZES)
@pytest.mark.parametrize("past, indexed", [(232, False), (200, True)])
def test_against_reference(poison, dtype, D, Dv, H, H_kv, past, indexed):
    n = 4000
    q, k, v = tokens(n, 2, H, H_kv, D, Dv, dtype)
    table, rows, index = problem(past, 64, 200, 64 if D == 80 else 128, k, v, indexed)
    assert (table.shift == 0) == (past == 232)
    check((q[:, :, past:], k, v, *rows), table, D**-0.5, index)


@pytest.mark.parametrize(
    "n, B, H, past", [(1, 1, 1, 0), (90, 1, 2, 40), (2000, 1, 8, 0), (2300, 3, 8, 60), (5000, 1, 28, 0)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_programs_with_one_job_or_some_or_another_number_than_others(poison, n, B, H, past, causal):
    """Of 132 programs on an H200, as few as there are jobs, with an odd number of them and parts of slots too."""
    q, k, v = tokens(n, B, H, H if H < 4 else H // 4, 128, 128, torch.bfloat16)
    q = q[:, :, past:]
    if causal:
        table, rows, index = causal_table(n - past, n), (k[:, :, :0], v[:, :, :0]), None
    else:
        table, rows, index = problem(past, 16, 77, 128, k, v, n > 4000)
    check((q, k, v, *rows), table, 128**-0.5, index)
    own, again = (attend(segment_attention_triton, (q, k, v, *rows), table, 128**-0.5, index) for _ in range(2))
    assert torch.equal(own[0], again[0]) and torch.equal(own[1], again[1])


@pytest.mark.parametrize("D, Dv", [(128, 128), (64, 128)])
def test_the_kernel_for_hopper_and_the_other_one_give_the_same_up_to_rounding(monkeypatch, poison, D, Dv):
    q, k, v = tokens(4000, 2, 8, 2, D, Dv, torch.bfloat16)
    if not hopper.takes(q, k, v, 128):
        pytest.skip("this machine or its Triton is none that the kernel for Hopper is for")
    table, rows, index = problem(200, 64, 200, 128, k, v, True)
    tensors = (q[:, :, 200:], k, v, *rows)
    own = attend(segment_attention_triton, tensors, table, D**-0.5, index)
    check(tensors, table, D**-0.5, index)
    monkeypatch.setattr(hopper, "takes", lambda *_: False)
    other = attend(segment_attention_triton, tensors, table, D**-0.5, index)
    check(tensors, table, D**-0.5, index)
    assert (own[0] - other[0]).norm() < 3e-3 * other[0].norm() and (own[1] - other[1]).abs().max() < 1e-4


@pytest.mark.parametrize("spare", [3, 8])
@pytest.mark.parametrize("D, Dv", [(64, 64), (128, 64), (20, 36)])
def test_strides(poison, spare, D, Dv):
    """With 8 spare columns a descriptor reads the tensors where they are; with 3 or D = 20 they are copied."""
    n = 2000
    q, k, v = tokens(n, 2, 4, 2, D, Dv, torch.float16, spare)
    table, rows, index = problem(100, 32, 100, 128, k, v, True)
    check((q[:, :, 100:], k, v, *rows), table, D**-0.5, index)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("Lq, Lk", [(3000, 3000), (17, 3000)])
def test_causal_table(poison, block, Lq, Lk):
    q, k, v = tokens(Lk, 2, 4, 2, 64, 64, torch.bfloat16)
    check((q[:, :, Lk - Lq :], k, v, k[:, :, :0], v[:, :, :0]), causal_table(Lq, Lk, block), 0.125, None)


def test_a_wrong_shift_is_noticed():
    n = 4000
    q, k, v = tokens(n, 1, 4, 2, 128, 128, torch.bfloat16)
    table, rows, _ = problem(200, 64, 32, 128, k, v, False)
    tensors = (q[:, :, 200:], k, v, *rows)
    truth, _ = attend(segment_attention_reference, [x.double() for x in tensors], table, 0.09)
    reference, _ = attend(segment_attention_reference, tensors, table, 0.09)
    wrong, _ = attend(segment_attention_triton, tensors, replace(table, shift=table.shift - 1), 0.09)
    assert (wrong - truth).norm() > 2 * (reference - truth).norm()


@pytest.mark.parametrize("past, indexed", [(64, False), (0, True)])
def test_long_sequence(past, indexed):
    """A few blocks at n = 131,072, the first and the last among them, in float64."""
    n, shape = 131072, (1, 8, 2, 128, 128)
    q, k, v = tokens(n, *shape, torch.bfloat16)
    q = q[:, :, past:]
    table, rows, index = problem(past, 512, 32, 128, k, v, indexed)
    out, lse = attend(segment_attention_triton, (q, k, v, *rows), table, 128**-0.5, index)
    for block in (0, 1, 300, len(table.tail) - 1):
        begin = max(block * 128 - table.shift, 0)
        own = slice(begin, (block + 1) * 128 - table.shift)
        arrays = (x[block : block + 1] for x in (table.segments, table.log_weight, table.tail))
        one = SegmentTable(128, table.q_offset + begin, *arrays, 0 if block else table.shift)
        truth, truth_lse = attend(
            segment_attention_reference, [x.double() for x in (q[:, :, own], k, v, *rows)], one, 128**-0.5, index
        )
        reference, _ = attend(segment_attention_reference, (q[:, :, own], k, v, *rows), one, 128**-0.5, index)
        assert (out[:, :, own] - truth).norm() <= 2 * (reference - truth).norm()
        assert (lse[:, :, own] - truth_lse).abs().max() < 1e-4
