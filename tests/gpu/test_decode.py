"""Split decoding attention on a GPU: the reference in float32, rows that are not read, graphs, the same bits."""

from __future__ import annotations

import math

import pytest
import torch

from express_compile.kernels.attend import decode as K


def tokens(B, H, H_kv, n, L, D, Dv=None, dtype=torch.bfloat16):
    generator = torch.Generator(device="cuda").manual_seed(L + n)
    shapes = ((B, H, n, D), (B, H_kv, L, D), (B, H_kv, L, Dv or D))
    q, k, v = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    return (3 * q).to(dtype), k.to(dtype), v.to(dtype)


def rows_of(kind: str, B: int, H_kv: int, L: int, n: int) -> K.Rows:
    generator = torch.Generator(device="cuda").manual_seed(L)
    place = torch.arange(L, device="cuda")
    lengths = torch.randint(n, L + 1, (B,), generator=generator, device="cuda", dtype=torch.int32)
    left = torch.randint(0, L, (B, 1), generator=generator, device="cuda")
    weight = torch.randn(B, H_kv, L, generator=generator, device="cuda")
    weight[torch.rand(weight.shape, generator=generator, device="cuda") < 0.3] = -math.inf
    pages = torch.rand(B, H_kv, -(-L // K.PAGE), generator=generator, device="cuda").argsort(-1)[..., :9].int()
    pages[..., 1:2] = -1
    holes = torch.rand(B, L, generator=generator, device="cuda") < 0.3
    return {
        "all": K.Rows(), "lengths": K.Rows(lengths), "holes": K.Rows(padding=holes),
        "filled": K.Rows(padding=(place < lengths[:, None]) & (place >= left)),
        "weights": K.Rows(lengths, log_weight=weight),
        "pages": K.Rows(lengths, pages=pages), "everything": K.Rows(lengths, holes, weight, pages),
    }[kind]  # fmt: skip


KINDS = ["all", "lengths", "filled", "holes", "weights", "pages", "everything"]
MIXED = ["all", "everything"]
CASES = [
    ((2, 32, 8, 1, 5000, 128, 128), torch.bfloat16, KINDS), ((2, 32, 8, 1, 5000, 128, 128), torch.float16, MIXED),
    ((2, 32, 8, 1, 5000, 128, 128), torch.float32, MIXED), ((1, 8, 2, 16, 3333, 64, 64), torch.bfloat16, MIXED),
    ((3, 6, 1, 4, 700, 96, 96), torch.bfloat16, MIXED), ((3, 6, 1, 4, 700, 40, 96), torch.float32, MIXED),
    ((1, 4, 2, 1, 900, 256, 256), torch.bfloat16, MIXED), ((1, 4, 2, 1, 900, 256, 256), torch.float32, MIXED),
    ((2, 8, 8, 2, 130, 80, 48), torch.bfloat16, MIXED), ((1, 64, 1, 1, 4097, 64, 128), torch.float16, MIXED),
    ((40, 8, 8, 1, 333, 128, 128), torch.bfloat16, MIXED), ((1, 2, 1, 1, 1, 64, 64), torch.bfloat16, MIXED),
    ((2, 32, 8, 64, 5000, 128, 128), torch.bfloat16, KINDS), ((1, 32, 8, 64, 33000, 128, 128), torch.bfloat16, MIXED),
    ((2, 10, 2, 40, 700, 96, 64), torch.float32, MIXED),
]  # fmt: skip


@pytest.mark.parametrize("sizes, dtype, kinds", CASES, ids=str)
def test_the_kernels_give_what_the_reference_gives(sizes, dtype, kinds):
    q, k, v = tokens(*sizes, dtype=dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}[dtype]
    B, _, H_kv, n, L, *_ = sizes
    for kind in kinds:
        rows = rows_of(kind, B, H_kv, L, n)
        out, lse = K.decode_triton(q, k, v, 0.1, rows)
        expected, expected_lse = K.decode_reference(q.float(), k.float(), v.float(), 0.1, rows)
        worst = (out.float() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert worst <= tolerance, f"{kind}: {worst:.1e}"
        seen = expected_lse > -math.inf
        assert torch.equal(seen, lse > -math.inf) and (lse - expected_lse)[seen].abs().amax() <= 1e-3
        again = K.decode_triton(q, k, v, 0.1, rows)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse), f"{kind}: the same bits every time"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_that_there_are_not_are_never_read(kind):
    q, k, v = tokens(2, 8, 2, 1, 3000, 128)
    rows = rows_of(kind, 2, 2, 3000, 1)
    expected = K.decode_triton(q, k, v, 0.1, rows)[0]
    hidden = ~K.visible_rows(q, k, rows).any(2)
    for x in (k, v):
        x[hidden] = math.nan
    out = K.decode_triton(q, k, v, 0.1, rows)[0]
    assert hidden.any() and torch.equal(out, expected) and out.isfinite().all()


def test_a_static_cache_that_is_a_strided_view():
    q, k, v = tokens(2, 8, 2, 1, 3000, 128)
    wide = torch.full((2, 3000, 2, 256), math.nan, device="cuda", dtype=k.dtype)
    for x, at in ((k, 0), (v, 128)):
        wide[..., at : at + 128] = x.transpose(1, 2)
    views = (wide[..., :128].transpose(1, 2), wide[..., 128:].transpose(1, 2))
    for one, other in zip(
        K.decode_triton(q, k, v, 0.1, K.Rows()), K.decode_triton(q, *views, 0.1, K.Rows()), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("by", ["lengths", "padding"])
def test_one_graph_serves_a_cache_at_every_length(by):
    q, k, v = tokens(2, 8, 2, 1, 4096, 128)
    lengths = torch.zeros(2, device="cuda", dtype=torch.int32)
    padding = torch.zeros(2, 4096, device="cuda", dtype=torch.bool)
    rows = K.Rows(lengths) if by == "lengths" else K.Rows(padding=padding)

    def call():
        return K.decode_triton(q, k, v, 0.1, rows)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for n in (1, 63, 64, 1000, 4096):
        lengths.fill_(n)
        padding.copy_(torch.arange(4096, device="cuda") < n)
        graph.replay()
        expected, expected_lse = K.decode_reference(q.float(), k.float(), v.float(), 0.1, rows)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_the_op_of_exact_steps():
    q, k, v = tokens(2, 8, 2, 1, 4096, 128)
    padding = torch.arange(4096, device="cuda")[None] >= torch.tensor([[0], [99]], device="cuda")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, padding[:, None, None], enable_gqa=True)
    out = torch.ops.express_compile.exact_step(q, k, v, padding, 128**-0.5)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)
