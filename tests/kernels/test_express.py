"""Express: the streaming and the prefill form hold the same rows, keep what they claim, and run as an op."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site
from express_compile.kernels import express as E
from express_compile.kernels.express_state import ExpressState
from express_compile.kernels.select.contest import CONTEST, compete, compete_reference
from express_compile.planning.choose import plan

SEED = torch.tensor(11)


def tokens(n, B=1, H=2, H_kv=1, D=4, Dv=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, n, D), (B, H_kv, n, D), (B, H_kv, n, Dv))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def exact(q, k, v, scale):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@st.composite
def configs(draw, protected=True):
    s = 2 ** draw(st.integers(1, 5))
    return E.Express(
        s,
        inflation=draw(st.integers(0, s.bit_length())),
        sinks=draw(st.integers(0, 6)),
        recent=draw(st.integers(0, 40)),
        protected=draw(st.sampled_from([0, 0, 7, 300])) if protected else 0,
        halving=draw(st.sampled_from(["kernel", "balanced", "uniform"])),
        block=16,
    )


def rows_of_block(layout, arena, block):
    """Token index and weight of every row that a block of queries sees before its own tokens, head 0 of sequence 0."""
    begin = max(0, block * layout.table.block + layout.table.q_offset - layout.table.shift)
    rows = []
    segments, weights = layout.table.segments[block].tolist(), layout.table.log_weight[block]
    for (source, first, length), weight in zip(segments, weights, strict=True):
        at = range(first, first + length)
        index = at if source == 0 else arena[0, 0, list(at)].tolist()
        rows += [(i, round(math.exp(weight))) for i in index]
    return sorted(rows + [(i, 1) for i in range(layout.table.tail[block], begin)])


# -- the two forms -----------------------------------------------------------------------------------------------


@given(config=configs(), n=st.integers(1, 1500), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_streaming_and_prefill_hold_the_same_rows(config, n, seed):
    _, k, v = tokens(n, seed=seed % 1000)
    layout = E.make_layout(config, n, n)
    arena = E.thin_reference(k, v, layout, 0.5, torch.tensor(seed), 5)
    state = ExpressState(config, 0.5, torch.tensor(seed), 5)
    for block in range(len(layout.table.tail)):
        if block:
            rows, weights = state.coreset()
            held = sorted(zip(rows.index[0, 0].tolist(), weights.tolist(), strict=True))
            assert held == rows_of_block(layout, arena, block)
            assert weights.sum() == state.length
            assert state.thinned < 6 * config.s
        own = slice(max(0, block * 16 - layout.table.shift), (block + 1) * 16 - layout.table.shift)
        state.update(k[:, :, own], v[:, :, own])
    assert state.coreset()[1].sum() == n


@given(config=configs(), n=st.integers(1, 900))
@settings(max_examples=60)
def test_streaming_and_prefill_compute_the_same(config, n):
    q, k, v = tokens(n, B=2, H=4, H_kv=2)
    out, _ = E.express_reference(q, k, v, config, 0.5, SEED, 3)
    streamed = ExpressState(config, 0.5, SEED, 3).extend(q, k, v)
    torch.testing.assert_close(out, streamed, rtol=1e-10, atol=1e-10)


@given(config=configs(), data=st.data())
@settings(max_examples=100)
def test_exact_up_to_4s(config, data):
    n = data.draw(st.integers(1, 4 * config.s + config.sinks + config.recent))
    q, k, v = tokens(n)
    out, _ = E.express_reference(q, k, v, config, 0.5, SEED)
    torch.testing.assert_close(out, exact(q, k, v, 0.5), rtol=1e-11, atol=1e-11)
    state = ExpressState(config, 0.5, SEED)
    for i in range(n):  # one token at a time, as in decoding
        streamed = state.attend(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1])
        torch.testing.assert_close(streamed, exact(q, k, v, 0.5)[:, :, i : i + 1], rtol=1e-11, atol=1e-11)
        state.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
        if i > 20:
            break


def test_protected_rows_that_a_text_does_not_have_take_no_memory():
    q, k, v = tokens(700)
    few, many = (E.Express(4, sinks=1, recent=1, block=16, protected=rows) for rows in (700, 2**40))
    for x, y in zip(*(E.express_reference(q, k, v, config, 0.5, SEED) for config in (few, many)), strict=True):
        assert torch.equal(x, y)
    assert E.make_layout(many, 700, 700).size == E.make_layout(few, 700, 700).size < 700 * 4


def test_not_exact_beyond_4s():
    config = E.Express(8, inflation=1, sinks=0, recent=0, block=16, protected=0)
    q, k, v = tokens(200)
    out, _ = E.express_reference(q, k, v, config, 0.5, SEED)
    error = (out - exact(q, k, v, 0.5)).norm(dim=-1)
    assert error[..., :32].max() < 1e-12
    assert error[..., 48:].min() > 1e-6


def test_state_may_be_fed_in_any_pieces():
    _, k, v = tokens(700, H_kv=2)
    config = E.Express(8, inflation=1, sinks=3, recent=10, protected=20, block=16)
    whole, pieces = ExpressState(config, 0.5, SEED), ExpressState(config, 0.5, SEED)
    whole.update(k, v)
    for a, b in zip([0, 1, 2, 60, 61, 400], [1, 2, 60, 61, 400, 700], strict=True):
        pieces.update(k[:, :, a:b], v[:, :, a:b])
    for x, y in zip(whole.coreset()[0].parts(), pieces.coreset()[0].parts(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rule", ["kernel", "balanced", "uniform"])
@pytest.mark.parametrize("M", [0, 1, 3])
def test_tokens_are_kept_with_the_probability_that_their_weight_claims(rule, M):
    n, seeds = 330, 3000
    config = E.Express(4, inflation=M, sinks=2, recent=5, halving=rule, block=16, protected=0)
    _, k, v = tokens(n, dtype=torch.float32)
    # the heads of one sequence draw independently: 3000 copies of one head are 3000 seeds
    k, v = k.expand(1, seeds, n, 4), v.expand(1, seeds, n, 3)
    layout = E.make_layout(config, n, n)
    arena = E.thin_reference(k, v, layout, 0.5, SEED, 0)[0]
    segments, weights = layout.table.segments[-1], layout.table.log_weight[-1]
    worst = 0.0
    for (source, first, length), log_weight in zip(segments, weights, strict=True):
        if source == 0 or not length:
            continue
        kept = arena[:, first : first + length].long()
        p = math.exp(-log_weight)
        count = torch.zeros(n, dtype=torch.float64).index_add_(0, kept.flatten(), torch.ones(kept.numel()).double())
        assert count.sum() == seeds * length
        seen = torch.arange(int(kept.min()), int(kept.max()) + 1)
        assert len(seen) == round(length / p), "the rows of a segment stand for a contiguous stretch"
        worst = max(worst, ((count[seen] - seeds * p) / math.sqrt(seeds * p * (1 - p))).abs().max().item())
    # about 300 tokens, each beyond 5 standard deviations with probability < 1e-5 (binomial, right tail)
    assert 0.5 < worst < 5.0


# -- the op ------------------------------------------------------------------------------------------------------

OPTIONS = dict(
    s=8, inflation=-1, sinks=2, recent=9, protected=0, halving="balanced", flatten=0.0, block=16,
    min_length=0,
)  # fmt: skip


def op(q, k, v, padding=None, seed=SEED, scale=0.5, layer=3, **options):
    return METHODS["express"].op(q, k, v, padding, seed, scale, layer, **{**OPTIONS, **options})


@pytest.mark.parametrize("Lq, Lk", [(200, 200), (40, 200), (20, 21)])
@pytest.mark.parametrize("protected", [0, 10])
def test_op_is_the_reference(poison, Lq, Lk, protected):
    q, k, v = tokens(Lk, B=2, H=4, H_kv=2)
    q = q[:, :, Lk - Lq :]
    out, lse = op(q, k, v, protected=protected)
    config = E.Express(8, inflation=1, sinks=2, recent=9, protected=protected, block=16)
    expected, expected_lse = E.express_reference(q, k, v, config, 0.5, SEED, 3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_same_seed_same_bits_and_every_part_of_the_key_counts():
    q, k, v = tokens(300, B=2, H_kv=2, dtype=torch.float32)
    base = op(q, k, v)[0]
    assert torch.equal(base, op(q, k, v)[0])
    assert not torch.equal(base, op(q, k, v, seed=SEED + 1)[0])
    assert not torch.equal(base, op(q, k, v, layer=4)[0])
    same = op(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1))[0]
    assert torch.equal(same[0], same[1]), "sequences of a batch draw the same"
    alike = op(*(x[:, :1].expand(-1, 2, -1, -1) for x in (q, k, v)))[0]
    assert not torch.equal(alike[:, 0], alike[:, 1]), "heads draw for themselves"


@pytest.mark.parametrize("options", [{}, {"min_length": 10**6}, {"protected": 10}])
def test_padding_on_any_side(poison, options):
    n, length = 260, 180
    q, k, v = tokens(n, B=3, H=4, H_kv=2)
    padding = torch.zeros(3, n, dtype=torch.bool)
    padding[0, -length:] = True  # left
    padding[1, :length] = True  # right
    padding[2, ::2] = padding[2, 1:100:2] = True  # holes: 130 + 50 tokens
    for x in (k, v):
        x.masked_fill_(~padding[:, None, :, None], math.nan)
    out, lse = op(q, k, v, padding, **options)
    rows = [padding[b].nonzero()[:, 0] for b in range(3)]
    # the same three sequences without their padding
    q, k, v = (torch.stack([x[b][:, rows[b]] for b in range(3)]) for x in (q, k, v))
    expected, expected_lse = op(q, k, v, **options)
    for b in range(3):
        torch.testing.assert_close(out[b][:, rows[b]], expected[b], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b][:, rows[b]], expected_lse[b], rtol=1e-12, atol=1e-12)
        assert (out[b][:, ~padding[b]] == 0).all() and (lse[b][:, ~padding[b]] == -math.inf).all()


def test_each_sequence_of_a_padded_batch_has_a_state_of_its_own():
    n, lengths = 220, (220, 150)
    q, k, v = tokens(n, B=2, H=4, H_kv=2)
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[1, : n - lengths[1]] = False
    out, _ = op(q, k, v, padding)
    config = E.Express(8, inflation=1, sinks=2, recent=9, block=16, protected=0)
    for b, length in enumerate(lengths):
        state = ExpressState(config, 0.5, SEED, 3)
        parts = (x[b : b + 1, :, n - length :] for x in (q, k, v))
        torch.testing.assert_close(state.extend(*parts), out[b : b + 1, :, n - length :], rtol=1e-10, atol=1e-10)


def test_padding_of_a_continued_prefill():
    n, Lq = 260, 50
    q, k, v = tokens(n, B=2)
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[0, :60] = False
    padding[1, -7:] = False
    out, _ = op(q[:, :, -Lq:], k, v, padding)
    whole, _ = op(q, k, v, padding)
    torch.testing.assert_close(out, whole[:, :, -Lq:], rtol=1e-12, atol=1e-12)


def test_short_sequences_are_exact():
    short, longer = tokens(43), tokens(300)
    torch.testing.assert_close(op(*short)[0], exact(*short, 0.5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op(*longer, min_length=301)[0], exact(*longer, 0.5), rtol=1e-12, atol=1e-12)
    assert (op(*longer, min_length=300)[0] - exact(*longer, 0.5)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "budget, words",
    [(0.05, "the fraction 0.05 of the keys"), (lambda n: n // 8, "a table of rows"), ([16, 32], "a table of rows")],
)
def test_a_budget_that_follows_the_length_is_refused(budget, words):
    policy = Policy(budget=budget, methods=("express",))
    decision = plan(spec(), policy)
    assert decision.verdict == "refused"
    assert f"its budget is {words}, so that how long the text becomes would decide" in decision.reason
    assert "give a number of rows, such as budget=512" in decision.reason
    assert "not causal" in plan(spec(mask=Mask()), policy).reason
    with pytest.raises(ValueError, match=r"budget=.*: its budget is .*give a number of rows"):
        METHODS["express"].params(Site(spec()), policy.tabled())


@given(
    n=st.integers(60, 110),
    D=st.sampled_from([8, 20]),
    Dv=st.sampled_from([8, 12]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_end_to_end(poison, n, D, Dv, dtype):
    _, k, v = tokens(n, 1, 2, 1, D, Dv, dtype)
    layout = E.make_layout(E.Express(8, inflation=2, sinks=2, recent=5, block=32, protected=0), n, n)
    index, *copies = E.thin_triton(k, v, layout, 0.3, SEED, 1)
    assert torch.equal(index, E.thin_reference(k, v, layout, 0.3, SEED, 1))
    for x, copy in zip((k, v), copies, strict=True):
        assert torch.equal(copy, E.gather_rows(x, index))


# -- protected rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protected, contests", [(5, 0), (5, 1), (200, 3), (300, 1), (300, 3), (256, 2)])
def test_contest_kernel(poison, protected, contests):
    sinks = 3
    _, k, _ = tokens(sinks + contests * CONTEST, H_kv=2, D=20, dtype=torch.float32)
    k = k + torch.randn(20, generator=torch.Generator().manual_seed(1))
    stream, places = compete(k, sinks, contests, protected)
    expected_stream, expected_places = compete_reference(k, sinks, contests, protected)
    assert torch.equal(stream, expected_stream)
    assert torch.equal(places.sort(-1).values, expected_places.sort(-1).values)


def test_protected_rows_are_the_most_distinctive_so_far():
    protected, contests, sinks = 100, 4, 7
    _, k, _ = tokens(sinks + contests * CONTEST, D=6)
    k = k + 0.5
    stream, places = compete_reference(k, sinks, contests, protected)
    score = torch.empty(contests * CONTEST)
    for i in range(contests):  # frozen when the row leaves: the mean of all keys up to the end of its contest
        rows = slice(sinks + i * CONTEST, sinks + (i + 1) * CONTEST)
        mean = k[0, 0, : rows.stop].mean(0)
        score[i * CONTEST : (i + 1) * CONTEST] = -torch.cosine_similarity(k[0, 0, rows], mean[None], dim=-1)
    for i in range(contests):
        best = score[: (i + 1) * CONTEST].topk(protected).indices + sinks
        assert torch.equal(places[0, 0, i].sort().values.long(), best.sort().values)
    everything = torch.cat([stream[0, 0], places[0, 0, -1]]).sort().values
    assert torch.equal(everything.long(), torch.arange(sinks, sinks + contests * CONTEST)), "protected or streamed"


@pytest.mark.parametrize("kv_heads, protected, padded", [(2, 0, False), (1, 5, True)])
def test_opcheck(kv_heads, protected, padded):
    q, k, v = tokens(120, 2, 2, kv_heads, 8, 4, torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # not contiguous, as models produce it
    k, v = k.requires_grad_(), v.requires_grad_()
    padding = torch.ones(2, 120, dtype=torch.bool) if padded else None
    if padded:
        padding[0, :11] = False
    options = {**OPTIONS, "protected": protected}
    torch.library.opcheck(METHODS["express"].op, (q, k, v, padding, SEED, 0.5, 3), options)
    q, k, v = (x.detach() for x in (q, k, v))
    forward = METHODS["express"].op(q, k, v, padding, SEED, 0.5, 3, **options)
    args = (torch.randn(2, 2, 120, 4), *forward, q, k, v, padding, SEED, 0.5, 3)
    torch.library.opcheck(torch.ops.express_compile.express_backward.default, args, options)


def test_compiled_op_is_the_eager_op():
    q, k, v = tokens(200, 2, 4, 2, 8, 8, torch.float32)
    compiled = torch.compile(lambda q, k, v: op(q * 1.0, k, v)[0] + 1.0, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), op(q, k, v)[0] + 1.0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("protected", [0, 10])
def test_gradients_with_the_selection_held_fixed(protected, padded):
    n, B = 300 if protected else 120, 2
    leaves = [x.requires_grad_() for x in tokens(n, B, 4, 2)]
    padding = torch.ones(B, n, dtype=torch.bool)
    if padded:
        padding[0, :17] = False
    out, _ = op(*leaves, padding if padded else None, protected=protected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    actual = torch.autograd.grad(out, leaves, grad)
    config = E.Express(8, inflation=1, sinks=2, recent=9, protected=protected, block=16)
    expected = [torch.zeros_like(x) for x in leaves]
    for b in range(B):  # one sequence at a time
        rows = padding[b].nonzero()[:, 0]
        parts = [x[:, :, rows].detach().requires_grad_() for x in leaves]
        result = E.express_reference(*parts, config, 0.5, SEED, 3)[0]
        for e, g in zip(expected, torch.autograd.grad(result[b], parts, grad[b][:, rows]), strict=True):
            e[b][:, rows] = g[b]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in tokens(40, 1, 2, 1, 2, 2)]
    # within the finite differences no decision flips: the smallest margin is far above 1e-6 for this seed
    assert torch.autograd.gradcheck(lambda *x: op(*x, s=4, sinks=1, recent=3)[0], leaves, atol=1e-6)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.randn(2, 2, 9)), ValueError, r"query: shape \(2, 2, 9\); must be \[batch, heads"),
        (
            dict(k=torch.randn(2, 3, 9, 4), v=torch.randn(2, 3, 9, 4)),
            ValueError,
            "key: 3 heads; must divide the 4 heads",
        ),
        (dict(k=torch.randn(2, 2, 9, 5)), ValueError, "key: shape .* batch and head size must be those of query"),
        (dict(v=torch.randn(2, 2, 8, 4)), ValueError, "value: shape .* must begin like key's"),
        (dict(q=torch.randn(2, 4, 10, 4)), ValueError, "query: 10 rows; must be at most the number of keys, 9"),
        (dict(v=torch.randn(2, 2, 9, 4).half()), TypeError, "value: dtype torch.float16; .* must share one of"),
        (dict(padding=torch.ones(2, 9)), TypeError, "padding: dtype torch.float32; must be torch.bool"),
        (dict(padding=torch.ones(2, 8).bool()), ValueError, r"padding: shape \(2, 8\).*must be \(2, 9\)"),
        (dict(s=12), ValueError, "s=12: must be a power of two"),
        (dict(inflation=9), ValueError, "inflation=9: must be an integer from 0 to 4 for s=8"),
        (dict(recent=-1), ValueError, "recent=-1: must be a number of rows, 0 or more"),
        (dict(halving="best"), ValueError, "halving='best': allowed are kernel, balanced, uniform"),
        (dict(block=20), ValueError, "block=20: must be 16, 32, 64 or 128"),
        (dict(flatten=-1.0), ValueError, "flatten=-1.0: must be above 0"),
    ],
)
def test_bad_arguments(change, error, message):
    q, k, v = torch.randn(2, 4, 9, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    with pytest.raises(error, match=message):
        op(**{"q": q, "k": k, "v": v, **change})


def test_bad_state_arguments():
    config = E.Express(8, inflation=1, protected=0)
    state = ExpressState(config, 0.5, SEED)
    with pytest.raises(ValueError, match="the state is empty"):
        state.attend(torch.randn(1, 2, 1, 4))
    state.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"key: shape \(1, 1, 3, 4\); this state holds \[1, 2, \*, 4\]"):
        state.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match="key, value: give both"):
        state.attend(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))


# -- the method --------------------------------------------------------------------------------------------------


def spec(**changes):
    base = dict(B=1, H=4, H_kv=2, Lq=100, Lk=100, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.3)
    return AttentionSpec(**{**base, "mask": Mask(causal=True), **changes})


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(mask=Mask()), "not causal"),
        (dict(mask=Mask(unknown="opaque tensor")), "its mask is not proven: opaque tensor"),
        (dict(mask=Mask(causal=True, window=64)), "sliding window of 64"),
        (dict(mask=Mask(causal=True, offset=3)), "offset 3; needed is Lk - Lq"),
        (dict(Lq=50), "offset 0; needed is Lk - Lq"),
        (dict(Lq=1, mask=Mask(causal=True, offset=99)), "decoding 1 token"),
        (dict(dropout_p=0.1), r"dropout_p=0.1\); call model.eval"),
        (dict(dtype=torch.float64, device="cuda"), "no kernel for torch.float64"),
        (dict(device="mps"), "no kernel for device mps"),
    ],
)
def test_refusals_carry_their_reason(changes, reason):
    refusal = METHODS["express"].refuse(spec(**changes), Policy())
    assert refusal.method == "express"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal.reason)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(Lq=50, mask=Mask(causal=True, offset=50)), dict(mask=Mask(causal=True, padding=True)), dict(Dv=16)],
)
def test_what_is_taken(changes):
    assert METHODS["express"].refuse(spec(**changes), Policy()) is None


def test_parameters_come_from_the_policy():
    policy = Policy(budget=700, window=7, inflation=3, method_options={"express": {"block": 64}})
    params = METHODS["express"].params(Site(spec()), policy)
    assert (params["s"], params["recent"], params["inflation"], params["block"]) == (512, 7, 3, 64)
    for bad, message in [
        (Policy(inflation=12), "inflation=12"),
        (Policy(halving="best"), "halving='best'"),
        (Policy(method_options={"express": {"block": 7}}), "block=7"),
    ]:
        with pytest.raises(ValueError, match=message):
            METHODS["express"].params(Site(spec()), bad)
    with pytest.raises(TypeError, match="unknown option 'blok'; allowed are block, budget, flatten"):
        METHODS["express"].params(Site(spec()), Policy(method_options={"express": {"blok": 7}}))
