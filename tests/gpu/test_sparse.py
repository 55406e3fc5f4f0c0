"""Sparse attention at real sizes on a GPU: against the mask in float64, against FlexAttention, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from express_compile.core.method import METHODS
from express_compile.kernels.attend.patterns import sparse_backward_triton, sparse_forward_triton
from express_compile.kernels.sparse import KINDS, PARTS, Pattern, dense_backward, dense_forward
from express_compile.routes.compile import express

OPTIONS = dict(pattern="fixed", stride=64, summary=8, groups=1, parts="merged")


def tensors(Lq, Lk, B=1, H=8, H_kv=2, D=128, Dv=None, dtype=torch.bfloat16, seed=0):
    """As a projection gives them: heads side by side in memory."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((B, Lk, H, D), (B, Lk, H_kv, D), (B, Lk, H_kv, Dv or D))
    q, k, v = (torch.randn(s, generator=generator, device="cuda").to(dtype).transpose(1, 2) for s in shapes)
    return q[:, :, Lk - Lq :], k, v


def masked(q, k, v, pattern, scale):
    """The definition: the mask in full, 0 where a query sees no key."""
    mask = pattern.mask(q.shape[1], q.shape[2], k.shape[2]).to(q.device)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.clamp(min=-1e300)[..., None]) @ v, lse


def error(x, truth, instead=0.0):
    """Relative to ``truth``, to ``instead`` where that is 0; 0 where all are."""
    return ((x.double() - truth).norm() / max(truth.norm().item() or instead, 1e-30)).item()


def check(q, k, v, pattern, scale):
    """At most twice the error of the reference in the same dtype, forward and backward; the same bits twice."""
    out, lse = sparse_forward_triton(q, k, v, pattern, scale)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    truth, true_lse = masked(*leaves, pattern, scale)
    reference, kept = dense_forward(q, k, v, pattern, scale)
    assert torch.equal(out, sparse_forward_triton(q, k, v, pattern, scale)[0])
    assert error(out, truth.detach()) <= 2 * error(reference, truth.detach()) + 1e-6
    torch.testing.assert_close(lse.double(), true_lse.detach(), rtol=1e-3, atol=1e-3)
    grad = torch.randn_like(out)
    actual = sparse_backward_triton(grad, out, lse, q, k, v, pattern, scale)
    again = sparse_backward_triton(grad, out, lse, q, k, v, pattern, scale)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    true = torch.autograd.grad(truth, leaves, grad.double())
    by_reference = dense_backward(grad, reference, kept, q, k, v, pattern, scale)
    size = true[2].norm().item()  # a query with one key has gradients of 0 but for rounding, and so has that key
    for a, r, t in zip(actual, by_reference, true, strict=True):
        assert error(a.to(q.dtype), t, size) <= 2 * error(r.to(q.dtype), t, size) + 1e-6


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride, summary, groups", [(64, 8, 1), (128, 32, 4), (100, 13, 3), (33, 33, 1), (513, 16, 2)])
def test_patterns(kind, parts, stride, summary, groups):
    """Also with more queries than a block and fewer, and where the end of the sequence cuts one."""
    pattern = Pattern(kind, stride, summary, groups, parts)
    check(*tensors(1100, 1100, 2), pattern, 0.1)
    check(*tensors(300, 1027), pattern, 0.1)


@pytest.mark.parametrize(
    "dtype, D, Dv, H, H_kv",
    [
        (torch.float16, 64, 64, 6, 2),
        (torch.bfloat16, 96, 96, 4, 4),
        (torch.bfloat16, 256, 256, 2, 1),
        (torch.float16, 128, 64, 3, 1),
        (torch.float32, 64, 64, 4, 2),
        (torch.float32, 128, 128, 2, 1),
        (torch.float32, 16, 24, 4, 1),
        (torch.float32, 64, 32, 4, 1),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_dtypes(kind, dtype, D, Dv, H, H_kv):
    check(*tensors(700, 700, 1, H, H_kv, D, Dv, dtype), Pattern(kind, 96, 16), D**-0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("Lq, Lk", [(1, 1), (1, 500), (17, 500), (40, 40), (2000, 2000)])
def test_lengths(kind, Lq, Lk):
    """In float32, where a single key too many would show; also with a scale below and of zero."""
    for stride in (16, 200):
        check(*tensors(Lq, Lk, dtype=torch.float32), Pattern(kind, stride, 8), 0.1)
    for scale in (-0.1, 0.0):
        check(*tensors(Lq, Lk, dtype=torch.float32), Pattern(kind, 16, 8, 1, "far"), scale)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_flex_attention(kind):
    """Both patterns, all combinations, forward and backward; where a query sees no key both give 0."""
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.contiguous().requires_grad_() for x in tensors(1024, 1024, 2))
    grad = torch.randn_like(q)
    for parts in PARTS:
        for groups in (1, 3):
            pattern = Pattern(kind, 128, 32, groups, parts)
            dense = pattern.mask(8, 1024, 1024).cuda()

            def seen(b, h, i, j, dense=dense):
                return dense[h, i, j]

            mask = create_block_mask(seen, None, 8, 1024, 1024, device="cuda")
            expected = compiled(q, k, v, block_mask=mask, enable_gqa=True)
            options = {**OPTIONS, "pattern": kind, "stride": 128, "summary": 32, "groups": groups, "parts": parts}
            seed = torch.zeros((), dtype=torch.int64, device="cuda")
            out, _ = METHODS["sparse"].op(q, k, v, None, seed, 128**-0.5, 0, **options)
            assert error(out, expected.double()) < 5e-3
            pairs = zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected)), strict=True)
            for a, b in pairs:
                assert error(a, b.double()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind):
    """A padded batch is its sequences each for itself, wherever the padding is; a lone query is the last real token."""
    q, k, v = tensors(600, 600, 3)
    real = torch.arange(600, device="cuda") >= torch.tensor([0, 250, 599], device="cuda")[:, None]
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    for padding in (real, real.flip(1)):
        out, _ = METHODS["sparse"].op(q, k, v, padding, seed, 0.1, 0, **{**OPTIONS, "pattern": kind})
        for b in range(3):
            own = [x[b : b + 1, :, padding[b]] for x in (q, k, v)]
            alone, _ = METHODS["sparse"].op(*own, None, seed, 0.1, 0, **{**OPTIONS, "pattern": kind})
            torch.testing.assert_close(out[b : b + 1, :, padding[b]], alone, rtol=2e-2, atol=2e-3)
            assert (out[b, :, ~padding[b]] == 0).all()
            one, _ = METHODS["sparse"].op(q[:, :, :1], k, v, padding, seed, 0.1, 0, **{**OPTIONS, "pattern": kind})
            last, _ = METHODS["sparse"].op(
                q[b : b + 1, :, :1], *own[1:], None, seed, 0.1, 0, **{**OPTIONS, "pattern": kind}
            )
            torch.testing.assert_close(one[b : b + 1], last, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_need_memory_for_their_rows_only(kind):
    """131,072 tokens: right at both ends and in the middle, and no more than eight times the inputs at any time."""
    n = 131_072
    q, k, v = (x.requires_grad_() for x in tensors(n, n))
    pattern = Pattern(kind, 512, 32)
    options = {**OPTIONS, "pattern": kind, "stride": 512, "summary": 32}
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = METHODS["sparse"].op(q, k, v, None, seed, 0.1, 0, **options)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    size = sum(x.numel() * x.element_size() for x in (q, k, v))
    assert torch.cuda.max_memory_allocated() - before < 8 * size
    with torch.no_grad():
        for stop in (300, n // 2 + 77, n):
            part = q[:, :, max(0, stop - 64) : stop], k[:, :, :stop], v[:, :, :stop]
            truth, _ = dense_forward(*(x.double() for x in part), pattern, 0.1)
            reference, _ = dense_forward(*part, pattern, 0.1)
            assert error(out[:, :, max(0, stop - 64) : stop], truth) <= 2 * error(reference, truth)


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(128, 384)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_under_autocast_with_gradients(kind):
    torch.manual_seed(0)
    model = Decoder().cuda()
    options = {"methods": ["sparse"], "method_options": {"sparse": {"pattern": kind, "stride": 64, "summary": 8}}}
    compiled = torch.compile(model, backend=express, options=options)
    x = torch.randn(2, 1000, 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = compiled(x)
        q, k, v = model.qkv(x).unflatten(-1, (3, 2, 64)).transpose(1, 3).unbind(2)
    out.float().square().sum().backward()
    truth, _ = masked(*(x.double() for x in (q, k, v)), Pattern(kind, 64, 8), 64**-0.5)
    assert out.dtype == torch.bfloat16 and error(out, truth) < 1e-2
    assert model.qkv.weight.grad.isfinite().all()
