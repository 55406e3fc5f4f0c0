"""Bernoulli score sampling on a GPU: the reference's law, features that are not read, same bits, graphs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from express_compile.core.call import Call
from express_compile.core.method import METHODS
from express_compile.kernels import santa as S
from express_compile.kernels.attend import bernoulli as Be
from express_compile.kernels.attend import sampled as K
from express_compile.kernels.launch import Random

OPTIONS = dict(draws=[64], fraction=0.0, sampler="sys", shared=True, min_length=0)


def tensors(n, Lq=1, B=2, H=8, H_kv=2, D=64, dtype=torch.bfloat16):
    """Queries, keys that lie feature by feature, values."""
    generator = torch.Generator(device="cuda").manual_seed(n)
    shapes = ((B, H, Lq, D), (B, H_kv, D, n), (B, H_kv, n, D))
    q, k, v = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return (2 * q).to(dtype), k.to(dtype).mT, v.to(dtype)


def seed_of(number):
    return torch.tensor(number, device="cuda")


def op(q, k, v, padding=None, seed=None, layer=1, **options):
    seed = seed_of(0) if seed is None else seed
    return METHODS["santa"].op(q, k, v, padding, seed, q.shape[-1] ** -0.5, layer, **{**OPTIONS, **options})


def whole(q, k, v, levels, padding=None):
    call = Call(q, k, v, padding, seed_of(0), q.shape[-1] ** -0.5, 1, options=dict(bernoulli=levels))
    return K.santa_triton(call, None)


def rounded(q, k, levels, padding=None, layer=1):
    step = S.visible_keys(q.shape[0], q.shape[2], k.shape[2], padding, None, q.device).sum(-1)
    return Be.round_query(q, levels, seed_of(0), layer, step)


def relative(x, truth):
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("levels", [1, 4, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_rounds_as_the_reference(dtype, levels, masked):
    """The same integers: both divide in float64."""
    q, k, _ = tensors(300, 5, D=96, dtype=dtype)
    generator = torch.Generator(device="cuda").manual_seed(0)
    padding = torch.rand(2, 300, generator=generator, device="cuda") < 0.9 if masked else None
    step = S.visible_keys(2, 5, 300, padding, None, q.device).sum(-1)
    own = None if padding is None else padding.view(torch.uint8)
    counts, unit = Be.round_query_triton(q, 300, levels, Random(seed_of(0), 1), step[:, -1].contiguous(), own, None)
    found = (counts.double() * unit[..., None]).float()
    torch.testing.assert_close(found, rounded(q, k, levels, padding), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "n, Lq, B, H, H_kv, D, levels",
    [(5000, 1, 2, 32, 8, 128, 4), (4999, 1, 1, 8, 8, 128, 8), (700, 4, 1, 6, 1, 96, 4), (1000, 1, 1, 4, 2, 256, 2),
     (3336, 16, 1, 16, 1, 64, 64)],
)  # fmt: skip
def test_all_rows_are_exact_attention_of_the_rounded_query(poison, dtype, n, Lq, B, H, H_kv, D, levels):
    """Keys that are aligned and such that are not; and those of a query that is not rounded."""
    q, k, v = tensors(n, Lq, B, H, H_kv, D, dtype)
    mask = torch.ones(Lq, n, dtype=torch.bool, device="cuda").tril(n - Lq)
    truth, plain = (
        F.scaled_dot_product_attention(x.double(), k.double(), v.double(), mask, enable_gqa=True)
        for x in (rounded(q, k, levels), q)
    )
    reference = F.scaled_dot_product_attention(q, k.contiguous(), v, mask, enable_gqa=True)
    allowed = 2 * relative(reference, plain) + 1e-6
    assert relative(whole(q, k, v, levels)[0], truth) <= allowed
    assert relative(whole(q, k, v, 0)[0], plain) <= allowed
    assert relative(plain, truth) > 2 * allowed or levels > 8, "the control"


@pytest.mark.parametrize("n, Lq, H, H_kv", [(2048, 1, 8, 2), (600, 1, 4, 4), (900, 5, 6, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_those_of_the_reference(n, Lq, H, H_kv, masked):
    """For one chunk of keys, as in test_santa.py."""
    q, k, v = tensors(n, Lq, 2, H, H_kv, dtype=torch.float32)
    generator = torch.Generator(device="cuda").manual_seed(n)
    padding = torch.rand(2, n, generator=generator, device="cuda") < 0.9 if masked else None
    draws = torch.full((H,), 64, device="cuda")
    more = dict(padding=padding, bernoulli=4)
    expected, _ = S.santa_reference(Call.of(S.OP, (q, k, v, None, seed_of(0), 64**-0.5, 1), dict(**more)), draws)
    out, _ = op(q, k, v, padding, bernoulli=4)
    assert relative(expected, whole(q, k, v, 4, padding)[0]) > 0.05 and relative(out, expected) < 0.02


@pytest.mark.parametrize("H_kv", [2, 8])
def test_features_that_no_query_needs_are_not_read(H_kv):
    q, k, v = tensors(9000, H_kv=H_kv, D=128)
    expected = op(q, k, v, bernoulli=2)
    needed = (rounded(q, k, 2) != 0).unflatten(1, (H_kv, -1)).any(2).any(2)
    assert 0.2 < needed.double().mean() < 0.99
    rest = k.mT.masked_fill(~needed[..., None], math.nan).mT
    assert all(torch.equal(x, y) for x, y in zip(op(q, rest, v, bernoulli=2), expected, strict=True))
    b, h, d = needed.nonzero()[0].tolist()
    rest[b, h, 17, d] = math.nan
    assert not torch.equal(op(q, rest, v, bernoulli=2)[1], expected[1])


def test_scores_have_no_bias():
    """The log-sum-exp of a single key is its score. 4,000 heads round for themselves, and their mean is within 4.5
    standard errors with probability 0.99999."""
    R, D = 4000, 64
    q = tensors(2, B=1, H=1, H_kv=1)[0][..., :D].expand(1, R, -1, -1)
    k = tensors(2, B=1, H=1, H_kv=1)[1].clone().expand(1, R, -1, -1)
    lengths = torch.ones(1, dtype=torch.int64, device="cuda")
    call = Call(q, k, k, None, seed_of(0), 0.01, 1, lengths, options=dict(bernoulli=4))
    out = K.santa_triton(call, None)[1]
    truth = 0.01 * (q[0, 0, 0].double() @ k[0, 0, 0].double())
    z = (out.double().mean() - truth) / (out.double().std() / R**0.5)
    assert z.abs() < 4.5 and out.std() > 0


def test_same_seed_same_bits_and_every_part_of_the_key_counts():
    q, k, v = tensors(9000)
    base, _ = op(q, k, v, bernoulli=4)
    for _ in range(20):
        assert torch.equal(base, op(q, k, v, bernoulli=4)[0])
    rows = whole(q, k, v, 4)[0]
    assert torch.equal(rows, whole(q, k, v, 4)[0]) and not torch.equal(rows, whole(q, k, v, 5)[0])
    assert not torch.equal(base, op(q, k, v, seed=seed_of(1), bernoulli=4)[0])
    assert not torch.equal(base, op(q, k, v, layer=2, bernoulli=4)[0])


def test_cuda_graph_rounds_anew():
    q, k, v = tensors(4096)
    seed = seed_of(0)
    op(q, k, v, seed=seed, bernoulli=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = op(q, k, v, seed=seed, bernoulli=4)
    graph.replay()
    first = lse.clone()
    assert torch.equal(first, op(q, k, v, seed=seed, bernoulli=4)[1])
    seed += 1
    graph.replay()
    assert not torch.equal(lse, first) and torch.equal(lse, op(q, k, v, seed=seed, bernoulli=4)[1])


def test_refusals():
    q, k, v = tensors(3000)
    with pytest.raises(ValueError, match="bernoulli=4: needs keys that lie feature by feature on CUDA"):
        op(q, k.contiguous(), v, bernoulli=4)
