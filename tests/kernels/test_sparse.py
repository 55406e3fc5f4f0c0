"""Sparse attention: the patterns themselves, equality with the mask written out, gradients, refusals, every way in."""

from __future__ import annotations

import copy
import gc
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from express_compile import explain, record_sites, rewrite_attention
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site
from express_compile.kernels import sparse as S
from express_compile.kernels.attend import patterns as K
from express_compile.kernels.sparse import (
    COMBINES,
    KINDS,
    PARTS,
    Pattern,
    default_stride,
    dense_backward,
    dense_forward,
)
from express_compile.planning.choose import plan
from express_compile.routes.compile import express

SEED = torch.tensor(0)
OPTIONS = dict(pattern="fixed", stride=8, summary=3, groups=1, parts="merged")


def tokens(Lq, Lk, B=2, H=4, H_kv=2, D=8, Dv=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def op(q, k, v, padding=None, scale=0.3, **options):
    return METHODS["sparse"].op(q, k, v, padding, SEED, scale, 0, **{**OPTIONS, **options})


def masked(q, k, v, seen, scale=0.3):
    """Attention over the keys that ``seen`` ``[H, Lq, Lk]`` shows, 0 where there is none."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.clamp(min=-1e30)[..., None]) @ v, lse


def pattern_of(kind, stride, summary, groups, parts):
    summary = min(summary, stride)
    return Pattern(kind, stride, summary, min(groups, stride // summary), parts)


patterns = st.builds(
    pattern_of, st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 9), st.integers(1, 3), st.sampled_from(PARTS)
)


# ----------------------------------------------------------------------------------------------------- the patterns


def test_the_masks_are_those_of_the_paper() -> None:
    """Spelled out for one query: l = 8, c = 2, query 21 in block 2."""
    rows = {kind: Pattern(kind, 8, 2, 2).mask(2, 24, 24)[:, 21] for kind in KINDS}
    assert rows["strided"][0].nonzero().flatten().tolist() == [5, 13, *range(14, 22)]
    assert rows["fixed"][0].nonzero().flatten().tolist() == [6, 7, 14, 15, *range(16, 22)]
    assert rows["fixed"][1].nonzero().flatten().tolist() == [4, 5, 12, 13, *range(16, 22)], (
        "the second group of columns"
    )
    alone = {kind: Pattern(kind, 8, 2, 1, "per_head").mask(2, 24, 24)[:, 21] for kind in KINDS}
    assert alone["strided"][0].nonzero().flatten().tolist() == list(range(14, 22))
    assert alone["strided"][1].nonzero().flatten().tolist() == [5, 13, 21]
    assert alone["fixed"][1].nonzero().flatten().tolist() == [6, 7, 14, 15]


@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 150), stride=st.integers(1, 40), c=st.integers(1, 5),
    parts=st.sampled_from(PARTS),
)  # fmt: skip
def test_any_two_positions_are_connected_in_two_steps_and_none_sees_the_future(kind, n, stride, c, parts) -> None:
    """Over the heads of one layer, or the two kinds of layers: a local step, a far one, and a place may stay."""
    pattern = pattern_of(kind, stride, c, 1, parts)
    seen = pattern.mask(2, n, n)
    assert not seen.triu(1).any()
    steps = [Pattern(kind, stride, pattern.summary, 1, part).mask(1, n, n)[0] for part in ("local", "far")]
    local, far = ((step | torch.eye(n, dtype=torch.bool)).double() for step in steps)
    assert ((far @ local > 0) == torch.ones(n, n).tril().bool()).all()
    if parts == "merged":
        assert (seen == (steps[0] | steps[1])).all()
        assert seen[0, :stride, :stride].equal(torch.ones(min(n, stride), min(n, stride)).tril().bool())


@given(n=st.integers(1, 120), stride=st.integers(1, 40), c=st.integers(1, 9))
def test_how_many_keys_a_query_sees(n, stride, c) -> None:
    i, c = torch.arange(n), min(c, stride)
    strided = Pattern("strided", stride, c).mask(1, n, n)[0].sum(1)
    assert strided.equal((i + 1).clamp(max=stride) + i // stride)
    fixed = Pattern("fixed", stride, c).mask(1, n, n)[0].sum(1)
    assert fixed.equal(i // stride * c + i % stride + 1)


def test_the_default_stride_is_the_power_of_two_nearest_the_root() -> None:
    for n in (1, 2, 3, 7, 100, 1000, 12_160, 16_384, 32_768, 131_072):
        nearest = min((1 << k for k in range(12)), key=lambda x: (abs(math.log2(x / math.sqrt(n))), -x))
        assert default_stride(n) == nearest, n


# -------------------------------------------------------------------------------------------------------- the op


@given(
    pattern=patterns, lengths=st.tuples(st.integers(1, 70), st.integers(0, 60)),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_the_mask_written_out(pattern, lengths, heads, seed) -> None:
    """Also where queries continue a cache; ``out``, ``lse`` and gradients."""
    Lq, more = lengths
    leaves = [x.requires_grad_() for x in tokens(Lq, Lq + more, 1, *heads, seed=seed)]
    options = dict(pattern=pattern.kind, stride=pattern.stride, summary=pattern.summary, groups=pattern.groups)
    out, lse = op(*leaves, **options, parts=pattern.parts)
    expected, total = masked(*leaves, pattern.mask(heads[0], Lq, Lq + more))
    torch.testing.assert_close((out, lse), (expected, total))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_tiles_are_cut_where_they_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tokens(90, 90)
    whole = {kind: op(q, k, v, pattern=kind)[0] for kind in KINDS}
    monkeypatch.setattr("express_compile.kernels.sparse._TILE", 1)
    for kind in KINDS:
        torch.testing.assert_close(op(q, k, v, pattern=kind)[0], whole[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_padded_batch_is_its_sequences_each_for_itself(kind, parts) -> None:
    """Positions count real tokens, wherever the padding is; padded rows are never read, and their own results are 0."""
    q, k, v = (x.requires_grad_() for x in tokens(50, 50, 3))
    padding = torch.zeros(3, 50, dtype=torch.bool)
    padding[0, 20:], padding[1, :33] = True, True
    padding[2, torch.randperm(50, generator=torch.Generator().manual_seed(0))[:17]] = True
    bad = [x.masked_fill(~padding[:, None, :, None], math.nan) for x in (q, k, v)]
    out, _ = op(*bad, padding, pattern=kind, parts=parts)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    for b in range(3):
        own = [x[b : b + 1, :, padding[b]] for x in (q, k, v)]
        alone, _ = op(*own, pattern=kind, parts=parts)
        torch.testing.assert_close(out[b : b + 1, :, padding[b]], alone)
        assert (out[b, :, ~padding[b]] == 0).all()
        for x, grad, part in zip((q, k, v), grads, torch.autograd.grad(alone.square().sum(), own), strict=True):
            torch.testing.assert_close(grad[b : b + 1, :, padding[b]], part)
            assert x.shape == grad.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_decoding_continues_the_prefill(kind, parts) -> None:
    """Token by token over a cache, and over one whose places are not filled yet, as the whole sequence at once."""
    q, k, v = tokens(45, 45)
    options = dict(pattern=kind, parts=parts, stride=6)
    whole, _ = op(q, k, v, **options)
    room = [torch.cat([x, torch.full_like(x[:, :, :7], math.nan)], 2) for x in (k, v)]
    for i in (0, 5, 6, 17, 44):
        one, _ = op(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **options)
        torch.testing.assert_close(one, whole[:, :, i : i + 1])
        filled = (torch.arange(52) <= i).expand(2, -1)
        one, _ = op(q[:, :, i : i + 1], *room, filled, **options)
        torch.testing.assert_close(one, whole[:, :, i : i + 1])
    leaves = [x.requires_grad_() for x in (q[:, :, 44:].clone(), k.clone(), v.clone())]
    alone = torch.autograd.grad(op(*leaves, **options)[0].square().sum(), leaves)
    padded = torch.autograd.grad(op(*leaves, torch.ones(2, 45, dtype=torch.bool), **options)[0].square().sum(), leaves)
    torch.testing.assert_close(padded, alone)
    nobody, lse = op(q[:, :, :1], *room, torch.zeros(2, 52, dtype=torch.bool), **options)
    assert (nobody == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_step_reads_nothing_back(kind) -> None:
    """So that it can be part of a CUDA graph: no shape depends on where the padding is."""
    q, k, v = tokens(1, 30)
    padding = torch.ones(2, 30, dtype=torch.bool)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, lse = S._Dense(q, k, v, Pattern(kind, 8, 3), 0.3, S.real_first(padding), padding.sum(1)).forward()
    assert out.shape == (2, 4, 1, 6) and lse.shape == (2, 4, 1)


def test_short_sequences_are_exact() -> None:
    for n, options in ((8, {}), (30, {"stride": 0, "summary": 8})):
        q, k, v = tokens(n, n)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(op(q, k, v, **options)[0], expected)
    q, k, v = tokens(40, 40)
    assert (op(q, k, v)[0] - F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)).abs().max() > 0.1


def test_low_precision_is_computed_in_float32_also_under_autocast() -> None:
    q, k, v = tokens(60, 60, dtype=torch.bfloat16)
    truth, _ = dense_forward(*(x.double() for x in (q, k, v)), Pattern("fixed", 8, 3), 0.3)
    plain = op(q, k, v)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(q, k, v)[0], plain)
    assert (plain.double() - truth).norm() / truth.norm() < 3e-3


def test_opcheck_and_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in tokens(7, 7, 1, 2, 1, D=2, Dv=1)]
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda *x, kind=kind: op(*x, pattern=kind, stride=3, summary=1)[0], leaves)
    q, k, v = (x.requires_grad_() for x in tokens(12, 20, dtype=torch.float32))
    padding = torch.ones(2, 20, dtype=torch.bool)
    torch.library.opcheck(METHODS["sparse"].op, (q, k, v, padding, SEED, 0.5, 3), OPTIONS)
    out, lse = op(q, k, v, padding)
    args = (torch.randn_like(out), *(x.detach() for x in (out, lse, q, k, v)), padding, SEED, 0.3, 0)
    torch.library.opcheck(torch.ops.express_compile.sparse_backward.default, args, OPTIONS)
    with pytest.raises(RuntimeError, match="sparse_backward has no gradient; methods"):
        torch.autograd.grad(out.square().sum(), q, create_graph=True)[0].sum().backward()


# ------------------------------------------------------------------------------------- kernels, in the interpreter


@pytest.mark.parametrize(
    "pattern, Lq, Lk, heads, scale",
    [
        (Pattern("fixed", 8, 3), 40, 40, (2, 1), 0.3),
        (Pattern("fixed", 10, 2, 2, "far"), 20, 61, (2, 1), -0.3),
        (Pattern("fixed", 30, 5, 1, "per_head"), 20, 45, (2, 1), 0.3),
        (Pattern("strided", 5), 30, 30, (2, 1), 0.3),
        (Pattern("strided", 6, 1, 1, "per_head"), 9, 30, (2, 2), 0.0),
        (Pattern("strided", 9, 1, 1, "far"), 1, 50, (2, 1), 0.3),
        (Pattern("strided", 20, 1, 1, "local"), 33, 33, (2, 1), 0.3),
    ],
    ids=lambda x: f"{x.kind}-{x.parts}" if isinstance(x, Pattern) else None,
)
def test_kernels_compute_what_the_reference_does(pattern, Lq, Lk, heads, scale) -> None:
    q, k, v = tokens(Lq, Lk, 1, *heads, D=16, Dv=16, dtype=torch.float32)
    expected = dense_forward(q, k, v, pattern, scale)
    actual = K.sparse_forward_triton(q, k, v, pattern, scale)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn(actual[0].shape, generator=torch.Generator().manual_seed(0))
    grads = K.sparse_backward_triton(grad, *actual, q, k, v, pattern, scale)
    torch.testing.assert_close(grads, dense_backward(grad, *expected, q, k, v, pattern, scale), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the method


def spec(**changes) -> AttentionSpec:
    base = dict(B=1, H=4, H_kv=2, Lq=500, Lk=500, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.3)
    return AttentionSpec(**{**base, "mask": Mask(causal=True), **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(mask=Mask()), "it is not causal"),
        (dict(mask=Mask(unknown="opaque tensor")), "its mask is not proven: opaque tensor"),
        (dict(mask=Mask(causal=True, window=64)), "window of 64 tokens; sparse has a local part of its own"),
        (dict(mask=Mask(causal=True, segments=True)), "packed sequences apart"),
        (dict(Lq=100), "its causal mask has offset 0; needed is Lk - Lq"),
        (dict(dropout_p=0.1), r"dropout_p=0.1\); call model.eval"),
        (dict(softcap=30.0), "a logit soft-cap of 30, which sparse does not compute"),
        (dict(device="cuda", dtype=torch.float64), "no kernel for torch.float64"),
    ],
)
def test_refusals_carry_their_reason(changes, reason) -> None:
    decision = plan(spec(**changes), Policy(methods=("sparse",)))
    assert decision.verdict == "refused"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decision.reason)


def test_it_runs_only_where_the_policy_names_it_and_says_that_it_changes_the_function() -> None:
    assert plan(spec(), Policy()).method != "sparse"
    for methods in (("sparse",), ("sparse", "exact"), ("express", "sparse")):
        decision = plan(spec(), Policy(methods=methods))
        assert decision.method == ("sparse" if methods[0] == "sparse" else "express")
    decision = plan(spec(), Policy(methods=("sparse", "exact")))
    assert decision.reason.startswith("causal attention; it changes the function") and not decision.predicted_ms
    one = spec(Lq=1, mask=Mask(causal=True, offset=499))
    given = {"sparse": {"stride": 64}}
    assert plan(one, Policy(methods=("sparse",), method_options=given)).verdict == "rewritten"
    assert "grows with the cache; give a stride" in plan(one, Policy(methods=("sparse",))).reason
    padded = spec(mask=Mask(causal=True, padding=True))
    assert plan(padded, Policy(methods=("sparse",), method_options=given)).verdict == "rewritten"
    assert "that of a padded batch; give a stride" in plan(padded, Policy(methods=("sparse",))).reason
    asked = Policy(methods=("express",), budget=1 << 30)  # of which SANTA takes no such budget
    assert "sparse" not in (plan(one, asked).nearest or ""), "another function is no substitute"
    alone = Policy(methods=("sparse",), method_options={"sparse": {"combine": "per_head"}})
    assert "it has one head" in plan(spec(H=1, H_kv=1), alone).reason


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pattern": "dilated"}, "pattern='dilated': must be one of strided, fixed"),
        ({"combine": "both"}, "combine='both': must be one of merged, local, far, per_head, interleaved"),
        ({"stride": 0}, "stride=0: must be 1 or more, or None"),
        ({"stride": 2.5}, "stride=2.5: must be of type int or None"),
        ({"summary": 0}, "summary=0: must be an integer, 1 or more"),
        ({"groups": True}, "groups=True: must be of type int"),
        (
            {"stride": 16, "summary": 8, "groups": 3},
            "summary=8, groups=3: 24 columns in all; must be at most stride=16",
        ),
    ],
)
def test_bad_options_are_reported_when_a_model_is_rewritten(options, words) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        rewrite_attention(Decoder(), methods=["sparse"], method_options={"sparse": options})
    assert words in str(error.value)


def test_interleaved_layers_alternate_by_the_numbers_in_their_paths() -> None:
    depths = {"": 0, "layers.7.attention": 7, "stages.1.blocks.3.attn": 4, "block2.attn3": 5, "h.0": 0}
    assert {path: Site(path=path).depth for path in depths} == depths
    assert Site(path="shared", index=3).depth == 3
    policy = Policy(method_options={"sparse": {"combine": "interleaved"}})
    parts = [METHODS["sparse"].params(Site(spec(), f"layers.{i}.attn"), policy)["parts"] for i in range(4)]
    assert parts == ["local", "far", "local", "far"]
    assert set(COMBINES) == {*PARTS, "interleaved"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", PARTS)
def test_cost_counts_the_keys_that_are_seen(kind, parts) -> None:
    params = {**OPTIONS, "pattern": kind, "parts": parts, "stride": 64, "summary": 16}
    site = spec(Lq=4096, Lk=4096, B=2)
    seen = Pattern(kind, 64, 16, 1, parts).mask(4, 4096, 4096).sum().item()
    cost = METHODS["sparse"].cost(site, params).at(site, 4)
    assert cost.flops == pytest.approx(2 * 2 * seen * 16, rel=0.03)


# ---------------------------------------------------------------------------------------------------- the ways in


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Decoder(torch.nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x, recompute=False):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
        return x


def sparse(combine="merged", kind="fixed"):
    return dict(methods=["sparse"], method_options={"sparse": {**LAYER, "pattern": kind, "combine": combine}})


LAYER = {"stride": 8, "summary": 3}


def by_hand(model, x, combine="merged", kind="fixed"):
    """What the decoder computes with every attention masked."""
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        parts = ("local", "far")[i % 2] if combine == "interleaved" else combine
        seen = Pattern(kind, 8, 3, 1, parts).mask(2, x.shape[1], x.shape[1])
        x = x + masked(q, k, v, seen, 8**-0.5)[0].transpose(1, 2).flatten(2)
    return x


@pytest.mark.parametrize("combine", ["merged", "per_head", "interleaved"])
def test_a_rewritten_model_computes_the_pattern_in_every_layer(combine) -> None:
    torch.manual_seed(0)
    model, x = Decoder().double(), torch.randn(2, 50, 16).double()
    expected = by_hand(model, x, combine)
    report = explain(model, x, **sparse(combine))
    assert [(site.verdict, site.method) for site in report.sites] == [("rewritten", "sparse")] * 2
    assert "changes the function" in str(report)
    rewritten = rewrite_attention(copy.deepcopy(model), **sparse(combine))
    with record_sites() as sites:
        out = rewritten(x)
    assert [site.method for site in sites] == ["sparse"] * 2
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(rewritten.layers[0].qkv.weight.grad, model.layers[0].qkv.weight.grad)


def test_checkpointing_compiled_and_not_and_autocast() -> None:
    """Regions that are computed again, in one graph and each by itself; gradients as by hand."""
    torch.manual_seed(0)
    model, x = Decoder().double(), torch.randn(2, 50, 16).double()
    expected = by_hand(model, x)
    expected.square().sum().backward()
    truth = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend=express, options=sparse())
    out = compiled(x, True)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    torch.testing.assert_close(model.layers[0].qkv.weight.grad, truth)
    eager = rewrite_attention(copy.deepcopy(model), **sparse())
    eager.zero_grad()
    eager(x, True).square().sum().backward()
    torch.testing.assert_close(eager.layers[0].qkv.weight.grad, truth)
    with torch.autocast("cpu", torch.bfloat16):
        cast = rewrite_attention(copy.deepcopy(model).float(), **sparse())(x.float())
    assert 1e-4 < (cast - expected).norm() / expected.norm() < 0.02


def test_a_rewritten_transformers_model_generates_by_the_pattern() -> None:
    """Prefill and decoding, padded on the left: greedy tokens are those of the whole sequence at every step."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = rewrite_attention(transformers.LlamaForCausalLM(config).eval(), **sparse("interleaved"))
    ids, real = torch.randint(1, 97, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    real[1, :5] = 0
    with record_sites() as sites:
        out = model.generate(ids, attention_mask=real, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert {site.method for site in sites} == {"sparse"}
    for b, first in enumerate((0, 5)):
        row = out[b, first:][None]
        with torch.no_grad():
            predicted = model(row).logits.argmax(-1)
        assert predicted[0, -7:-1].tolist() == row[0, -6:].tolist()


def test_distributed_data_parallel() -> None:
    """One process: the wrapper's hooks and buckets around a rewritten model, and the same gradients."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model, x = Decoder(), torch.randn(2, 30, 16)
    plain = rewrite_attention(copy.deepcopy(model), **sparse())
    plain(x).square().sum().backward()
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(rewrite_attention(copy.deepcopy(model), **sparse()))
        with record_sites() as sites:
            parallel(x).square().sum().backward()
        assert [site.method for site in sites] == ["sparse"] * 2
        gradient = parallel.module.layers[0].qkv.weight.grad
        torch.testing.assert_close(gradient, plain.layers[0].qkv.weight.grad)
    finally:
        # as the last to hold the group, it would end it holding the interpreter's lock, for which threads may wait
        parallel = None
        gc.collect()
        dist.destroy_process_group()
