"""Segment attention: the reference against dense attention, the kernel against the reference, the gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.kernels.segments import (
    SegmentTable,
    causal_table,
    compact_triton,
    segment_attention_backward,
    segment_attention_reference,
    segment_attention_triton,
)


def random_problem(seed, Lq, past, segments, block, B=1, H=2, H_kv=1, D=16, Dv=16, dtype=torch.float64):
    """Random tensors and a random table: ``segments`` slices of either buffer, and a tail of random length."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    Lk, A = past + Lq, 50
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv), (B, H_kv, A, D), (B, H_kv, A, Dv))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    blocks = -(-Lq // block)
    begin = past + block * np.arange(blocks)
    table = np.zeros((blocks, segments, 3), dtype=np.int64)
    for b in range(blocks):
        for i in range(segments):
            source = rng.integers(2)
            limit = A if source else min(int(begin[b]), Lk)
            length = rng.integers(0, min(limit, 40) + 1)
            table[b, i] = source, rng.integers(0, limit - length + 1), length
    tail = rng.integers(np.maximum(begin - 60, 0), begin + 1)
    log_weight = rng.uniform(-1, 3, (blocks, segments))
    return tensors, SegmentTable(block, past, table, log_weight, tail)


def dense(tensors, table, scale):
    """The same attention query by query, as one dense softmax in float64."""
    q, k, v, ck, cv = (x.double() for x in tensors)
    B, H, Lq, _ = q.shape
    g = H // k.shape[1]
    out, lse = q.new_zeros(B, H, Lq, v.shape[-1]), q.new_zeros(B, H, Lq)
    for i in range(Lq):
        block, position = i // table.block, i + table.q_offset
        keys, values, bias = [], [], []
        for (source, first, rows), weight in zip(table.segments[block], table.log_weight[block], strict=True):
            keys.append((k, ck)[source][:, :, first : first + rows])
            values.append((v, cv)[source][:, :, first : first + rows])
            bias += [weight] * rows
        keys.append(k[:, :, table.tail[block] : position + 1])
        values.append(v[:, :, table.tail[block] : position + 1])
        bias += [0.0] * (position + 1 - table.tail[block])
        ks, vs = (torch.cat(x, 2).repeat_interleave(g, 1) for x in (keys, values))
        scores = (ks @ q[:, :, i, :, None])[..., 0] * scale + torch.tensor(bias, dtype=torch.float64)
        out[:, :, i] = (scores.softmax(-1)[..., None, :] @ vs)[..., 0, :]
        lse[:, :, i] = scores.logsumexp(-1)
    return out, lse


@given(seed=st.integers(0, 10**6), Lq=st.integers(1, 70), past=st.integers(0, 60), segments=st.integers(1, 4))
def test_reference_is_dense_attention(seed, Lq, past, segments):
    tensors, table = random_problem(seed, Lq, past, segments, 16, B=2, H=4, H_kv=2, D=6, Dv=5)
    out, lse = segment_attention_reference(*tensors, table, 0.3)
    expected, expected_lse = dense(tensors, table, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def check_kernel(tensors, table, scale):
    """The tolerance rule: the kernel errs at most twice as much as the reference in the same precision."""
    truth, truth_lse = segment_attention_reference(*(x.double() for x in tensors), table, scale)
    reference, _ = segment_attention_reference(*tensors, table, scale)
    out, lse = segment_attention_triton(*tensors, table, scale)

    def error(x):
        return ((x.double() - truth).norm() / truth.norm()).item()

    assert error(out) <= 2 * error(reference)
    assert (lse.double() - truth_lse).abs().max() < 1e-5 * max(1.0, truth_lse.abs().max().item())
    return out


@given(
    seed=st.integers(0, 10**6),
    Lq=st.integers(1, 50),
    past=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    D=st.sampled_from([8, 16, 40]),
    Dv=st.sampled_from([16, 24]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernel_against_reference(poison, seed, Lq, past, heads, D, Dv, dtype):
    tensors, table = random_problem(seed, Lq, past, 3, 16, 1, *heads, D, Dv, dtype)
    check_kernel(tensors, table, D**-0.5)


def test_kernel_reads_strided_inputs_and_nothing_else(poison):
    tensors, table = random_problem(3, 40, 9, 3, 32, B=2, H=2, H_kv=1, D=20, Dv=16, dtype=torch.float32)
    strided = []
    for x in tensors:  # rows are slices of a wider, longer buffer that is NaN elsewhere
        wide = torch.full((x.shape[0], x.shape[2] + 7, x.shape[1], x.shape[3] + 3), math.nan)
        wide[:, : x.shape[2], :, : x.shape[3]] = x.transpose(1, 2)
        strided.append(wide[:, : x.shape[2], :, : x.shape[3]].transpose(1, 2))
    out = check_kernel(strided, table, 0.2)
    assert torch.equal(out, segment_attention_triton(*tensors, table, 0.2)[0])


@given(
    rows=st.integers(0, 70),
    sizes=st.sampled_from([(16, 16), (20, 8), (5, 40)]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_compaction_copies_the_rows(poison, rows, sizes, dtype):
    generator = torch.Generator().manual_seed(rows)
    key, value = (torch.randn(2, 40, 3, size, generator=generator).to(dtype).transpose(1, 2) for size in sizes)
    index = torch.randint(40, (2, 3, rows + 9), generator=generator, dtype=torch.int32)[:, :, 9:]
    for source, copy in zip((key, value), compact_triton(key, value, index), strict=True):
        expected = source.gather(2, index.long()[..., None].expand(-1, -1, -1, source.shape[-1]))
        assert torch.equal(copy, expected)


def test_a_wrong_weight_is_noticed():
    tensors, table = random_problem(4, 20, 30, 2, 16, dtype=torch.float32)
    truth, _ = segment_attention_reference(*(x.double() for x in tensors), table, 0.25)
    reference, _ = segment_attention_reference(*tensors, table, 0.25)
    table.log_weight[:] += 0.01
    wrong, _ = segment_attention_triton(*tensors, table, 0.25)
    assert (wrong - truth).norm() > 2 * (reference - truth).norm()


@pytest.mark.parametrize("Lq, Lk", [(50, 50), (17, 50), (1, 50)])
def test_causal_table_is_exact_attention(Lq, Lk):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, Lq, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, Lk, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    out, _ = segment_attention_reference(q, k, v, k[:, :, :0], v[:, :, :0], causal_table(Lq, Lk, 16), 0.4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10**6), Lq=st.integers(1, 40), past=st.integers(0, 30))
@settings(max_examples=15)
def test_backward_is_autograd_of_the_reference(seed, Lq, past):
    tensors, table = random_problem(seed, Lq, past, 3, 16, B=2, H=4, H_kv=2, D=6, Dv=5)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = segment_attention_reference(*leaves, table, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
    actual = segment_attention_backward(grad, *tensors, out.detach(), lse.detach(), table, 0.3)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_dtypes_without_a_kernel():
    tensors, table = random_problem(0, 4, 0, 1, 16)
    with pytest.raises(TypeError, match="query: dtype torch.float64; the kernel takes float16, bfloat16 or float32"):
        segment_attention_triton(*tensors, table, 1.0)
