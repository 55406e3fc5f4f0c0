"""What a cache holds: at every length the rows and weights of the streaming form, in memory that does not grow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.rows import Rows
from express_compile.kernels.express import Express
from express_compile.kernels.express_state import ExpressState
from express_compile.kernels.heads import EVERYTHING, PerHead, groups, heads_reference
from express_compile.kernels.held import STEP, Held, HeldRows, weighted_attention
from express_compile.kernels.launch import Random

SEED = torch.tensor(7)
FLOAT = {"rtol": 2e-6, "atol": 1e-8}  # log-weights are float32
MIXED = (Rows(2, 20), Rows(2, 9, 8, 10), EVERYTHING, Rows(2, 9, 8, 10), Rows(3, 40, 16), Rows(1, 5, selected=1))


def tokens(n: int, B: int = 1, H: int = 4, H_kv: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(seed)
    shapes = (B, H, n, 4), (B, H_kv, n, 4), (B, H_kv, n, 3)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)


def held(own: PerHead, k: torch.Tensor, v: torch.Tensor) -> Held:
    return Held(own, k, v, Random(SEED, 3), 0.5)


def rows_of(part: HeldRows, b: int, g: int) -> list[tuple[int, int]]:
    there = part.log_weight[b, g] > -math.inf
    weights = part.log_weight[b, g][there].exp().round().long()
    return sorted(zip(part.token[b, g][there].tolist(), weights.tolist(), strict=True))


def expected(part: HeldRows, k: torch.Tensor, v: torch.Tensor, b: int, g: int, n: int) -> list[tuple[int, int]]:
    """The (token, weight) of a head after n tokens, by the streaming form."""
    if part.config is None or n == 0:
        return [(i, 1) for i in range(n)]
    head = int(part.random.heads[g])
    state = ExpressState(part.config, 0.5, SEED, 3, torch.tensor([head]))
    state.update(k[b : b + 1, head : head + 1, :n], v[b : b + 1, head : head + 1, :n])
    rows, weights = state.coreset()
    return sorted(zip(rows.index[0, 0].tolist(), weights.long().tolist(), strict=True))


def assert_holds(cache: Held, k: torch.Tensor, v: torch.Tensor, n: int) -> None:
    for part in cache.parts:
        for b in range(k.shape[0]):
            for g in range(len(part.random.heads)):
                found = rows_of(part, b, g)
                assert found == expected(part, k, v, b, g, n)
                if part.config is None or not part.config.forgets:
                    assert sum(weight for _, weight in found) == n


@st.composite
def plans(draw) -> PerHead:
    s = draw(st.sampled_from([0, 2, 4, 8, 16]))
    inflation = draw(st.none() | st.integers(0, max(0, s.bit_length()))) if s else None
    rows = Rows(draw(st.integers(0, 5)), draw(st.integers(0, 40)), s, draw(st.sampled_from([0, 0, 3, 20])))
    return PerHead((rows,), draw(st.sampled_from(["balanced", "kernel", "uniform"])), inflation)


@given(own=plans(), pieces=st.lists(st.integers(1, 700), min_size=1, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_after_any_pieces_the_rows_and_weights_are_those_of_the_streaming_form(own, pieces, seed):
    n = sum(pieces)
    q, k, v = tokens(n, B=2, seed=seed)
    cache, first = held(own, k, v), 0
    for i, piece in enumerate(pieces):
        own_rows = slice(first, first + piece)
        if i % 2:
            cache.extend(q[:, :, own_rows], k[:, :, own_rows], v[:, :, own_rows])
        else:
            cache.fill(k[:, :, own_rows], v[:, :, own_rows])
        cache.settle()
        first += piece
        assert_holds(cache, k, v, first)


def test_a_prefill_and_single_updates_end_in_the_same_state() -> None:
    q, k, v = tokens(900, H=6, H_kv=6)
    at_once, one_by_one = held(PerHead(MIXED), k, v), held(PerHead(MIXED), k, v)
    at_once.fill(k, v)
    for i in range(900):
        one_by_one.settle()
        one_by_one.extend(*(x[:, :, i : i + 1] for x in (q, k, v)))
    one_by_one.settle()
    assert_holds(at_once, k, v, 900)
    assert_holds(one_by_one, k, v, 900)
    assert torch.equal(at_once.rows(), one_by_one.rows())


def test_decoding_attends_to_what_the_streaming_form_attends_to() -> None:
    rows = Rows(2, 9, 8, 10)
    q, k, v = tokens(700, B=2)
    cache = held(PerHead((rows,)), k, v)
    config = PerHead((rows,)).config(rows)
    assert isinstance(config, Express)
    state = ExpressState(config, 0.5, SEED, 3)
    cache.fill(k[:, :, :600], v[:, :, :600])
    state.update(k[:, :, :600], v[:, :, :600])
    for i in range(600, 700):
        own = [x[:, :, i : i + 1] for x in (q, k, v)]
        cache.settle()
        torch.testing.assert_close(cache.extend(*own), state.attend(*own), **FLOAT)
        state.update(*own[1:])


def test_a_long_piece_behind_what_is_held_gives_what_a_prefill_in_one_piece_gives() -> None:
    rows = tuple(x for x in MIXED if not x.selected)
    own = PerHead(rows, block=16)
    q, k, v = tokens(640, H=10, H_kv=5)
    whole, _ = heads_reference(q, k, v, own, 0.5, SEED, 3)
    first = 475  # blocks of the heads with thinned rows begin 11, 22 and 43 tokens behind multiples of 16
    cache = held(own, k, v)
    cache.fill(k[:, :, :first], v[:, :, :first])
    out = cache.extend(q[:, :, first:], k[:, :, first:], v[:, :, first:])
    equal = [head for head in range(5) if (first - rows[head].sinks - rows[head].recent) % 16 == 0 or head == 2]
    assert len(equal) >= 2
    for head in equal:
        both = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[:, both], whole[:, both, first:], **FLOAT)


def test_memory_is_constant_from_4_thousand_to_64_thousand_tokens() -> None:
    own = PerHead((Rows(4, 64, 64, 32), Rows(4, 128)))
    _, k, v = tokens(65536, dtype=torch.float32)
    cache = held(own, k, v)
    sizes, addresses, counts = [], [], []
    for stop in (4096, 8192, 16384, 65536):
        first = cache.length[0]
        cache.fill(k[:, :, first:stop], v[:, :, first:stop])
        sizes.append(cache.nbytes)
        addresses.append([part.key.data_ptr() for part in cache.parts])
        counts.append(int(cache.rows().max()))
    # a subsampling group of 64 rows is what 64 thousand tokens thinned to 64 rows need room for at least
    assert sizes[0] == sizes[1] == sizes[2] and sizes[3] - sizes[0] <= 48 * (4 + 3 + 2) * 4
    assert addresses[0] == addresses[2]
    assert max(counts) < 6 * 64 + 4 + 64 + 32 + 255 + 64


def test_padding_takes_no_rows() -> None:
    q, k, v = tokens(500, B=3, H=6, H_kv=6)
    alone = []
    for b, pad in enumerate((0, 123, 77)):
        one = held(PerHead(MIXED), k[:1], v[:1])
        one.fill(k[b : b + 1, :, pad:450], v[b : b + 1, :, pad:450])
        alone.append(one.extend(*(x[b : b + 1, :, 450:] for x in (q, k, v))))
        lengths = one.length
        assert lengths == [500 - pad]
    cache = held(PerHead(MIXED), k, v)
    cache.fill(k[:, :, :450], v[:, :, :450], [tuple(i >= pad for i in range(450)) for pad in (0, 123, 77)])
    assert cache.length == [450, 327, 373]
    out = cache.extend(*(x[:, :, 450:] for x in (q, k, v)))
    torch.testing.assert_close(out, torch.cat(alone))
    hole = [(True,) * 5, (True, False, True, False, True), (False,) * 5]
    out = cache.extend(*(x[:, :, :5] for x in (q, k, v)), hole)
    assert cache.length == [505, 380, 423]
    assert not out[2].any() and not out[1, :, 1].any() and out[1, :, 2].all()


@pytest.mark.parametrize("n", [1, 5, STEP])
def test_a_short_step_that_is_dropped_leaves_the_state_as_it_was(n: int) -> None:
    q, k, v = tokens(600 + n, H=6, H_kv=6)
    cache = held(PerHead(MIXED), k, v)
    cache.fill(k[:, :, :600], v[:, :, :600])
    step = [x[:, :, 600:] for x in (q, k, v)]
    before = [rows_of(part, 0, 0) for part in cache.parts]
    first = cache.extend(*step)
    assert [rows_of(part, 0, 0) for part in cache.parts] != before
    cache.drop(n)
    assert cache.length == [600] and [rows_of(part, 0, 0) for part in cache.parts] == before
    cache.settle()
    assert torch.equal(cache.extend(*step), first)


def test_tokens_that_are_still_recent_can_be_dropped_and_the_state_finds_back() -> None:
    rows = (Rows(2, 20), Rows(2, 30, 8), EVERYTHING, Rows(2, 30, 8), Rows(3, 40, 16, 10), Rows(1, 25, selected=1))
    _, k, v = tokens(1000, H_kv=6)
    cache = held(PerHead(rows), k, v)
    cache.fill(k[:, :, :900], v[:, :, :900])
    assert cache.exact_tail == 20
    cache.drop(17)
    assert cache.length == [883]
    other = k.clone()
    other[:, :, 883:] += 1
    cache.fill(other[:, :, 883:], v[:, :, 883:])
    assert_holds(cache, other, v, 1000)


def test_sequences_can_be_reordered_repeated_and_selected() -> None:
    q, k, v = tokens(700, B=3, H=6, H_kv=6)
    cache = held(PerHead(MIXED), k, v)
    cache.fill(k[:, :, :600], v[:, :, :600])
    places = [part.key.data_ptr() for part in cache.parts]
    order = torch.tensor([2, 0, 2])
    cache.select(order)
    assert [part.key.data_ptr() for part in cache.parts] == places
    assert_holds(cache, k[order], v[order], 600)
    cache.select(torch.tensor([0, 0, 1]).repeat_interleave(2))
    cache.settle()
    order = order[torch.tensor([0, 0, 1])].repeat_interleave(2)
    cache.fill(k[order, :, 600:], v[order, :, 600:])
    assert_holds(cache, k[order], v[order], 700)
    cache.select(torch.tensor([5]))
    assert_holds(cache, k[order[5:]], v[order[5:]], 700)


def test_weighted_attention_is_softmax_over_repeated_rows() -> None:
    q, k, v = tokens(9, B=2)
    counts = torch.tensor([1, 3, 0, 2, 1, 1, 4])
    log_weight = counts.to(torch.float32).log().expand(2, 2, 7)
    out, lse = weighted_attention(q[:, :, :2], k[:, :, :7], v[:, :, :7], log_weight, 0.5)
    for i, seen in enumerate((slice(0, 6), slice(0, 7))):  # the last two rows are those of the queries
        own = counts[seen]
        rows = torch.arange(len(own)).repeat_interleave(own)
        key, value = (x[:, :, rows].repeat_interleave(2, 1) for x in (k, v))
        weights = q[:, :, i : i + 1] @ key.mT * 0.5
        torch.testing.assert_close(out[:, :, i : i + 1], weights.softmax(-1) @ value, **FLOAT)
        torch.testing.assert_close(lse[:, :, i], weights.logsumexp(-1)[..., 0], **FLOAT)


def test_groups_of_heads_are_what_is_held_together() -> None:
    _, k, v = tokens(10, H_kv=6)
    cache = held(PerHead(MIXED), k, v)
    assert [part.group for part in cache.parts] == list(groups(MIXED, 6))
