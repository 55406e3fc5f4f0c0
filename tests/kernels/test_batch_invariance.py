"""What a sequence gives does not depend on its place in a batch, on its neighbours, or on how it is padded."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile import rewrite_attention
from express_compile.core.call import Call
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows, to_numbers
from express_compile.kernels import express as E
from express_compile.kernels import heads as P
from express_compile.kernels import thinformer as T
from express_compile.kernels.attend import sampled as K
from express_compile.kernels.padding import Packing
from express_compile.kernels.select.halving import get_rule
from express_compile.passes.pipeline import rewrite_graph

SEED = torch.tensor(5)
EXPRESS = dict(
    s=8, inflation=-1, sinks=2, recent=9, protected=0, halving="balanced", flatten=0.0, block=16, min_length=0
)
THINFORMER = dict(s=16, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0)
SANTA = dict(draws=[16], fraction=0.0, sampler="sys", shared=True, min_length=0)
WINDOW, CORE, KEPT, BLOCKS, WHOLE = (
    Rows(2, 9),
    Rows(2, 9, 8),
    Rows(1, 5, 8, 10),
    Rows(2, 9, selected=1),
    Rows(everything=True),
)
HEADS = dict(inflation=-1, halving="balanced", flatten=0.0, block=16, min_length=0)
TABLE = [4, 4, 16, 8, 32]  # from 16, 32, 64, 128 and 256 keys on
CASES = [
    ("express", EXPRESS),
    ("express", {**EXPRESS, "protected": 10, "block": 32}),
    ("express", {**EXPRESS, "min_length": 120}),
    ("express", {**EXPRESS, "sinks": 0, "recent": 0, "halving": "kernel", "inflation": 3}),
    ("express", {**EXPRESS, "halving": "uniform", "inflation": 0}),
    ("thinformer", THINFORMER),
    ("thinformer", {**THINFORMER, "s": 0, "fraction": 0.1}),
    ("thinformer", {**THINFORMER, "s": 0, "table": TABLE, "halving": "kernel"}),
    ("thinformer", {**THINFORMER, "g": 0, "min_length": 90}),
    ("santa", SANTA),
    ("santa", {**SANTA, "draws": [0], "fraction": 0.1, "sampler": "strat"}),
    ("santa", {**SANTA, "draws": [0], "table": TABLE, "shared": False}),
    ("santa", {**SANTA, "sampler": "iid", "shared": False, "min_length": 90}),
    ("santa", {**SANTA, "bernoulli": 4, "softcap": 3.0}),
    ("santa", {**SANTA, "window": 70}),
    *(
        ("heads", {**HEADS, "rows": to_numbers([rows])})
        for rows in (WINDOW, CORE, KEPT, Rows(protected=4), BLOCKS, WHOLE)
    ),
    ("heads", {**HEADS, "rows": to_numbers([BLOCKS]), "min_length": 110}),
]
MIXED = [
    ("heads", {**HEADS, "rows": to_numbers(rows), "min_length": least})
    for rows, least in (([CORE, BLOCKS], 90), ([WHOLE, KEPT], 0), ([BLOCKS], 0))
]


def sequence(n, Lq, H, H_kv, D, Dv, number: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Query, key and value of one sequence of ``n`` tokens, ``[H, L, .]``."""
    generator = torch.Generator().manual_seed(number)
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((H, Lq, D), (H_kv, n, D), (H_kv, n, Dv))
    )


def places_of(n: int, total: int, side: str, number: int) -> torch.Tensor:
    """Where ``n`` tokens lie among ``total`` places."""
    first = {"left": total - n, "right": 0, "both": (total - n) // 2}
    if side in first:
        return torch.arange(first[side], first[side] + n)
    return torch.randperm(total, generator=torch.Generator().manual_seed(number))[:n].sort().values


def batch_of(parts: list, places: list[torch.Tensor], total: int, own: bool) -> tuple[torch.Tensor, ...]:
    """A padded batch; what is padding is NaN in keys and values. ``own``: the queries are tokens as well."""
    tensors = []
    for i, fill in enumerate((0.5, math.nan, math.nan)):
        shape = list(parts[0][i].shape)
        shape[1] = total if i or own else shape[1]
        x = torch.full((len(parts), *shape), fill, dtype=parts[0][i].dtype)
        for b, (part, place) in enumerate(zip(parts, places, strict=True)):
            x[b][:, place if i or own else slice(None)] = part[i]
        tensors.append(x)
    padding = torch.zeros(len(parts), total, dtype=torch.bool)
    for b, place in enumerate(places):
        padding[b, place] = True
    return *tensors, padding


def run(method: str, options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding=None):
    return METHODS[method].op(q, k, v, padding, SEED, 0.4, 3, **options)


def check(
    method: str, options: dict[str, Any], lengths: list[int], extra: int, sides: list[str], heads, sizes, Lq: int
):
    """Of every sequence alone and in the batch, and in the batch turned round: the same bits."""
    own = method in ("express", "heads")
    parts = [sequence(n, n if own else Lq, *heads, *sizes, number=n) for n in lengths]  # equal lengths are duplicates
    total = max(lengths) + extra
    places = [places_of(n, total, side, b) for b, (n, side) in enumerate(zip(lengths, sides, strict=True))]
    *tensors, padding = batch_of(parts, places, total, own)
    out, lse = run(method, options, *tensors, padding)
    turned = run(method, options, *(x.flip(0) for x in tensors), padding.flip(0))
    assert torch.equal(turned[0].flip(0), out) and torch.equal(turned[1].flip(0), lse)
    assert out.isfinite().all()
    for b, (part, place) in enumerate(zip(parts, places, strict=True)):
        alone, alone_lse = run(method, options, *(x[None] for x in part))
        place = place if own else slice(None)
        assert torch.equal(out[b][:, place], alone[0]) and torch.equal(lse[b][:, place], alone_lse[0])
    return out


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{i}")
@given(
    lengths=st.lists(st.sampled_from([1, 3, 17, 43, 60, 100, 101, 130]), min_size=1, max_size=3),
    extra=st.sampled_from([0, 1, 7, 64, 200]),
    sides=st.lists(st.sampled_from(["left", "right", "both", "anywhere"]), min_size=3, max_size=3),
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 8), (20, 12)]),
    Lq=st.sampled_from([1, 5, 40]),
)
@settings(max_examples=4)
def test_the_op_gives_every_sequence_the_bits_that_it_has_alone(case, lengths, extra, sides, heads, sizes, Lq):
    method, options = CASES[case]
    if "window" in options and method == "santa":  # its window counts places of the cache: none between real tokens
        sides = ["left" for _ in sides]
    check(method, options, lengths, extra, sides[: len(lengths)], heads, sizes, 1 if method == "santa" else Lq)


def test_it_would_be_noticed_if_the_place_in_the_batch_counted(monkeypatch):
    """With the old counter of random numbers, which named the sequence."""
    original, options = E.philox_uniform, {**EXPRESS, "inflation": 4}
    parts = [x.expand(3, -1, -1, -1) for x in sequence(100, 100, 4, 2, 8, 8, number=0)]
    first, second, _ = run("express", options, *parts)[0]
    assert torch.equal(first, second)

    def by_place(seed, layer, draw, bucket, stage, head):
        return original(seed, layer, draw, bucket, stage, head + 65536 * torch.arange(3).view(3, 1, 1))

    monkeypatch.setattr(E, "philox_uniform", by_place)
    again, other, _ = run("express", options, *parts)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "method, options",
    [
        (m, c)
        for m, c in CASES
        if m in ("express", "heads") and not c["min_length"] and c.get("rows") != to_numbers([WHOLE])
    ],
)
def test_what_comes_after_a_query_changes_no_bit_of_it(method, options):
    """As an encoder of fewer tokens: in the last block of a shorter sequence, and where all is exact. (Heads that see
    everything run PyTorch's kernel, whose rounding may depend on lengths.)"""
    whole = sequence(300, 300, 4, 2, 8, 8, number=1)
    out, lse = run(method, options, *(x[None] for x in whole))
    for n in (1, 20, 63, 150, 299):
        first, first_lse = run(method, options, *(x[None, :, :n] for x in whole))
        assert torch.equal(first, out[:, :, :n]) and torch.equal(first_lse, lse[:, :, :n])


@pytest.mark.parametrize(
    "method, options", [("express", {**EXPRESS, "min_length": 90}), ("thinformer", THINFORMER), *MIXED]
)
def test_gradients_are_those_of_every_sequence_alone(method, options):
    own, lengths = method in ("express", "heads"), [100, 60, 140, 60]
    parts = [sequence(n, n if own else 30, 4, 2, 8, 8, number=n) for n in lengths]
    places = [
        places_of(n, 150, side, 0) for n, side in zip(lengths, ("left", "right", "anywhere", "both"), strict=True)
    ]
    *tensors, padding = batch_of(parts, places, 150, own)
    tensors = [x.nan_to_num(0.5).requires_grad_() for x in tensors]
    grad = torch.randn(4, 4, 150 if own else 30, 8, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(run(method, options, *tensors, padding)[0], tensors, grad)
    for b, (part, place) in enumerate(zip(parts, places, strict=True)):
        asking = place if own else slice(None)
        leaves = [x[None].requires_grad_() for x in part]
        result = run(method, options, *leaves)[0]
        expected = torch.autograd.grad(result, leaves, grad[b][:, asking][None])
        for x, e, at in zip(found, expected, (asking, place, place), strict=True):
            assert torch.equal(x[b][:, at], e[0])
    assert all((x[0][:, :50] == 0).all() for x in found[1:]), "padding has no gradient"


# -- the form that a GPU runs: the batch as it is, real tokens in front ---------------------------------------------


@pytest.mark.parametrize("protected", [0, 10])
@pytest.mark.parametrize("min_length", [0, 150])
def test_the_packed_form_of_express_gives_what_the_sequences_give_alone(protected, min_length):
    options, lengths = {**EXPRESS, "protected": protected, "min_length": min_length}, [330, 149, 150, 30]
    parts = [sequence(n, n, 4, 2, 8, 8, number=n, dtype=torch.float64) for n in lengths]
    places = [places_of(n, 340, "anywhere", n) for n in lengths]
    *tensors, padding = batch_of(parts, places, 340, own=True)
    tensors = [x.nan_to_num(0.5) for x in tensors]
    given = (*tensors, padding, SEED, 0.4, 3)
    packed, expected = E._express_body(Call(*given, options=options)), run("express", options, *tensors, padding)
    for x, e in zip(packed, expected, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-10, atol=1e-12)
    grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = E._express_backward_body(Call(*given, options=options), grad, *packed)
    own = torch.ops.express_compile.express_backward.default(grad, *expected, *given, **options)
    for x, e in zip(grads, own, strict=True):
        torch.testing.assert_close(x, e, rtol=1e-9, atol=1e-11)
    short = run("express", {**options, "min_length": 0}, *tensors, padding)[0]
    assert torch.allclose(short[2], packed[0][2])
    if not protected:  # with a place to win the first 256 tokens are exact as it is
        assert torch.allclose(short[1], packed[0][1]) != bool(min_length)


@pytest.mark.parametrize("min_length", [0, 150])
@pytest.mark.parametrize("rows", [[CORE, BLOCKS], [WHOLE, KEPT], [BLOCKS], [WINDOW, Rows(2, 9, selected=2)]], ids=str)
def test_the_packed_form_of_heads_gives_what_the_sequences_give_alone(rows, min_length):
    options, lengths = {**HEADS, "rows": to_numbers(rows), "min_length": min_length}, [330, 149, 150, 30]
    for Lq in (340, 40):
        parts = [sequence(n, n, 4, 2, 8, 8, number=n, dtype=torch.float64) for n in lengths]
        places = [places_of(n, 340, "anywhere" if Lq == 340 else "left", n) for n in lengths]
        q, *tensors, padding = batch_of(parts, places, 340, own=True)
        tensors = [x.nan_to_num(0.5) for x in (q[:, :, 340 - Lq :], *tensors)]
        given = (*tensors, padding, SEED, 0.4, 3)
        packed, expected = P._body(Call(*given, options=options)), run("heads", options, *tensors, padding)
        for x, e in zip(packed, expected, strict=True):
            torch.testing.assert_close(x, e, rtol=1e-10, atol=1e-12)
        grad = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grads = P._backward_body(Call(*given, options=options), grad, *packed)
        own = torch.ops.express_compile.heads_backward.default(grad, *expected, *given, **options)
        for x, e in zip(grads, own, strict=True):
            torch.testing.assert_close(x, e, rtol=1e-9, atol=1e-11)


def test_the_kernels_keep_of_a_packed_sequence_what_it_keeps_alone():
    """In the interpreter, beside a longer sequence: every row that a query of it sees."""
    n, left = 110, 40
    _, k, v = (x[None] for x in sequence(n, 1, 2, 2, 8, 8, number=0))
    pad = Packing(torch.arange(n) >= torch.tensor([[0], [left]]))
    config = E.Express(4, inflation=2, sinks=2, recent=5, block=16, protected=0)
    layout, own = E.make_layout(config, n, n), E.make_layout(config, n - left, n - left)
    index, *_ = E.thin_triton(*(pad.pack(x.expand(2, -1, -1, -1)) for x in (k, v)), layout, 0.3, SEED, 1)
    alone = E.thin_reference(k[:, :, left:], v[:, :, left:], own, 0.3, SEED, 1)
    seen = 0
    for block in range(len(own.table.tail)):
        for (source, a, length), (_, b, same) in zip(
            own.table.segments[block], layout.table.segments[block], strict=False
        ):
            assert length == same
            if source:
                assert torch.equal(alone[0, :, a : a + length], index[1, :, b : b + length])
                seen += length
    assert seen > 20 and not torch.equal(index[0, :, :8], index[1, :, :8])


@given(
    budget=st.sampled_from([16, 0.1, 0.6, 1.0, "root", "table"]),
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=3),
    extra=st.sampled_from([0, 1, 30]),
    min_length=st.sampled_from([0, 60]),
)
@settings(max_examples=12)
def test_the_packed_form_of_thinformer_keeps_the_rows_that_the_sequences_keep_alone(budget, lengths, extra, min_length):
    root = T.Thinformer(g=1) if budget == "root" else T.Thinformer(TABLE if budget == "table" else budget)
    s = partial(T.rows_kept, **root.pack(), min_length=min_length)
    total = max(1, *lengths) + extra
    k, v = (torch.randn(len(lengths), 2, total, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    padding = torch.zeros(len(lengths), total, dtype=torch.bool)
    for b, n in enumerate(lengths):
        padding[b, places_of(n, total, "anywhere", b)] = True
    decider = T.Decider(get_rule("balanced"), 0.5, T.Random(SEED, 3))
    index, keys, _, counts = T.select(k, v, padding, s, decider)
    for b, n in enumerate(lengths):
        place = padding[b].nonzero()[:, 0]
        if n:
            alone, *_ = T.select(k[b : b + 1, :, place], v[b : b + 1, :, place], None, s, decider)
            assert counts[b] == alone.shape[2] == min(n, s(n))
            assert torch.equal(index[b, :, : counts[b]], place[alone[0]])
        assert counts[b] <= n and (keys[b, :, counts[b] :] == 0).all()


@pytest.mark.parametrize(
    "budget, bernoulli, counted",
    [
        ({"draws": [12] * 4}, 0, "padding"),
        ({"draws": [12] * 4}, 6, "lengths"),
        ({"draws": [0] * 4, "fraction": 0.2}, 6, "padding"),
        ({"draws": [0] * 4, "table": TABLE}, 0, "lengths"),
    ],
)
def test_santas_kernels_draw_for_a_sequence_what_they_draw_for_it_alone(budget, bernoulli, counted):
    """In the interpreter: a sequence in a cache that has room for more, and one of fewer keys than draws."""
    total, lengths = 80, (80, 47, 9)
    parts = [sequence(n, 1, 4, 2, 16, 16, number=n) for n in lengths]
    *tensors, padding = batch_of(parts, [places_of(n, total, "right", 0) for n in lengths], total, own=False)
    q, k, v = (x.nan_to_num(0.25) for x in tensors)
    padding, counts = (padding, None) if counted == "padding" else (None, torch.tensor(lengths))
    options = {**SANTA, **budget, "bernoulli": bernoulli}
    draws = options["draws"]
    call = Call(q, k, v, padding, SEED, 0.4, 3, counts, options=options)
    out, lse = K.santa_triton(call, draws, exact_below=min(draws) + 1)
    for b, part in enumerate(parts):
        expected, expected_lse = run("santa", options, *(x[None] for x in part))
        torch.testing.assert_close(out[b], expected[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[b], expected_lse[0], rtol=1e-4, atol=1e-4)


# -- models ----------------------------------------------------------------------------------------------------------

OPTIONS = dict(
    budget=16, sinks=4, window=16, protected=8, methods=["express"], method_options={"express": {"block": 16}}
)


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return rewrite_attention(transformers.LlamaForCausalLM(config).eval(), **OPTIONS)


def ids_of(n: int) -> torch.Tensor:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(n))


def padded_ids(lengths: list[int], total: int, sides: list[str]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    ids, mask, positions = (torch.zeros(len(lengths), total, dtype=torch.long) for _ in range(3))
    places = [places_of(n, total, side, 0) for n, side in zip(lengths, sides, strict=True)]
    for b, (n, place) in enumerate(zip(lengths, places, strict=True)):
        ids[b, place], mask[b, place], positions[b, place] = ids_of(n), 1, torch.arange(n)
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions), places


@given(
    lengths=st.lists(st.sampled_from([40, 150, 200]), min_size=2, max_size=3),
    extra=st.sampled_from([1, 60]),
    sides=st.lists(st.sampled_from(["left", "right"]), min_size=3, max_size=3),
)
@settings(max_examples=5)
@torch.no_grad()
def test_a_rewritten_llama_gives_every_sequence_the_bits_that_it_has_alone(llama, lengths, extra, sides):
    inputs, places = padded_ids(lengths, max(lengths) + extra, sides[: len(lengths)])
    logits = llama(**inputs).logits
    for b, place in enumerate(places):
        alone = llama(ids_of(lengths[b])[None]).logits[0]
        assert torch.equal(logits[b, place], alone)


class Block(torch.nn.Module):
    """Attention with a padding mask, causal or not, as a graph that the backend rewrites."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.causal = torch.nn.Linear(16, 48), causal

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        mask = real[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        if self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_graph_that_the_backend_rewrote_gives_every_sequence_the_bits_that_it_has_alone(causal):
    options = OPTIONS if causal else dict(budget=16, methods=["thinformer"])
    plans: list = []

    def backend(gm, _):
        plans.extend(rewrite_graph(gm, Policy(**options)))
        return gm

    model, x = torch.compile(Block(causal), backend=backend, dynamic=True), torch.randn(3, 190, 16)
    real = torch.zeros(3, 190, dtype=torch.bool)
    lengths, places = (190, 120, 50), []
    for b, (n, side) in enumerate(zip(lengths, ("left", "left", "right"), strict=True)):
        places.append(places_of(n, 190, side, 0))
        real[b, places[b]] = True
    out = model(x, real)
    assert {plan.verdict for _, plan in plans} == {"rewritten"}
    assert not torch.equal(out, Block(causal)(x, real))
    for b, place in enumerate(places):
        alone = model(x[b : b + 1, place], real[b : b + 1, place])[0]
        assert torch.equal(out[b][:, place], alone)
