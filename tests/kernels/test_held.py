"""What a cache holds: at every length the rows and weights of the streaming form, in memory that does not grow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.rows import Rows
from express_compile.kernels import held as K
from express_compile.kernels.attend import decode
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.express import Express
from express_compile.kernels.express_state import ExpressState
from express_compile.kernels.heads import EVERYTHING, PerHead, groups, heads_reference
from express_compile.kernels.held import STEP, Held, HeldRows
from express_compile.kernels.launch import Random
from express_compile.kernels.select import pages

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


@given(own=plans(), pieces=st.lists(st.integers(1, 500), min_size=1, max_size=6), seed=st.integers(0, 999))
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


@pytest.mark.parametrize("rows", [Rows(2, 9, protected=10), Rows(2, 9, 8, 10)], ids=str)
def test_the_places_of_a_prompt_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch, rows: Rows) -> None:
    """A kernel leaves them by score, and the contests behind the prompt take them by position."""
    select = K.select_rows

    def by_another_order(key, value, layout, *others):
        sources, index = select(key, value, layout, *others)
        _, first, count = layout.table.segments[0, 1]
        assert count == 10
        index[..., first : first + count] = index[..., first : first + count].flip(-1)
        return sources, index

    monkeypatch.setattr(K, "select_rows", by_another_order)
    _, k, v = tokens(1500)
    cache = held(PerHead((rows,)), k, v)
    for first, stop in ((0, 700), (700, 1100), (1100, 1500)):
        cache.fill(k[:, :, first:stop], v[:, :, first:stop])
        assert_holds(cache, k, v, stop)


@pytest.mark.parametrize("rows", [Rows(2, 9, protected=10), Rows(2, 9, 8, 10), Rows(2, 9, 8)], ids=str)
@pytest.mark.parametrize("n", [300, 1024, 2777])
def test_a_prompt_is_thinned_at_once_and_not_contest_by_contest(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, n: int
) -> None:
    """A contest is some eighty operators: one after the other they took five of six seconds to the first token."""
    compete, contests = HeldRows._compete, []
    monkeypatch.setattr(HeldRows, "_compete", lambda self, *args: (contests.append(1), compete(self, *args))[1])
    _, k, v = tokens(n, B=2)
    cache = held(PerHead((rows,)), k, v)
    cache.fill(k, v)
    assert_holds(cache, k, v, n)
    assert len(contests) <= 1, "what leaves behind the last block of queries alone"


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


def test_memory_is_the_same_bytes_at_the_same_addresses_from_8_thousand_to_256_thousand_tokens() -> None:
    own = PerHead((Rows(4, 64, 256, 32), Rows(4, 128)), "uniform")
    q, k, v = tokens(262144, dtype=torch.float32)
    cache = held(own, k, v)
    sizes, addresses = set(), set()
    for stop in (8192, 16384, 65536, 262144):
        first = cache.length[0]
        cache.fill(k[:, :, first : stop - 3], v[:, :, first : stop - 3])
        for i in range(stop - 3, stop):
            cache.settle()
            cache.extend(*(x[:, :, i : i + 1] for x in (q, k, v)))
        sizes.add(cache.nbytes)
        addresses.add(tuple(getattr(part, name).data_ptr() for part in cache.parts for name in HeldRows.TENSORS))
        assert cache.length == [stop] and 128 <= int(cache.rows().min()) <= int(cache.rows().max()) < 6 * 256 + 420
    assert len(sizes) == len(addresses) == 1 and max(sizes) < 100_000


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
    out, lse = decode_attention(q[:, :, :2], k[:, :, :7], v[:, :, :7], 0.5, log_weight=log_weight)
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


@pytest.mark.parametrize("n", [1, 5])
def test_the_kernel_gives_what_the_reference_gives_over_the_rows_that_are_held(poison, n: int) -> None:
    q, k, v = tokens(700, B=2, H=24, H_kv=6, dtype=torch.float32)
    cache = held(PerHead(MIXED), k, v)
    cache.fill(k[:, :, :650], v[:, :, :650], [(True,) * 650, tuple(i >= 90 for i in range(650))])
    cache.extend(*(x[:, :, 650:690] for x in (q, k, v)))
    cache.settle()
    for part in cache.parts:
        mine = [part.group.take(x[:, :, 690 : 690 + n], 6) for x in (q, k, v)]
        key, value = (torch.cat(pair, 2) for pair in zip((part.key, part.value), mine[1:], strict=True))
        log_weight = torch.nn.functional.pad(part.log_weight, (0, n))
        assert (log_weight == -math.inf).any() and (log_weight > 0).any() == bool(part.group.rows.thinned)
        rows = decode.Rows(log_weight=log_weight)
        out, lse = decode.decode_triton(mine[0], key, value, 0.5, rows)
        expected, expected_lse = decode.decode_reference(mine[0], key, value, 0.5, rows)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


# ---- selected blocks ------------------------------------------------------------------------------------------------

SELECTING = (Rows(3, 70, selected=2), EVERYTHING, Rows(3, 70, selected=2), Rows(0, 0, selected=1))


def pages_seen(q: torch.Tensor, k: torch.Tensor, rows: Rows, scale: float) -> set[int]:
    """The pages that queries ``[R, D]`` of a head read of keys ``[n, D]``: kept ones, and the heaviest by 8 bits."""
    n = len(k)
    means = torch.stack([k[i : i + 8].mean(0) for i in range(0, n, 8)])
    mass = (q @ means.T * scale).softmax(-1).sum(0)
    worth = [int(mass[i : i + 8].sum().float().view(torch.int32)) >> 16 for i in range(0, len(mass), 8)]
    kept = {p for p in range(len(worth)) if 64 * p < rows.sinks or 64 * (p + 1) > n - max(1, rows.recent)}
    count = rows.selected + -(-rows.sinks // 64) + -(-max(1, rows.recent) // 64) + 1
    others = sorted(set(range(len(worth))) - kept, key=lambda p: -worth[p])
    return kept | set(others[: count - len(kept)])


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, scale: float) -> torch.Tensor:
    """Dense attention of queries ``[R, D]``, with a mask of the rows on the pages that are read."""
    seen = pages_seen(q, k, rows, scale) if rows.selected else set(range(len(k)))
    hidden = torch.tensor([i // 64 not in seen for i in range(len(k))]) if rows.selected else torch.zeros(len(k)).bool()
    return (q @ k.T * scale).masked_fill(hidden, -math.inf).softmax(-1) @ v


def assert_means(cache: Held) -> None:
    for part in cache.parts:
        for b, length in enumerate(cache.length):
            if part.group.rows.selected:
                key, count = part.key[b : b + 1, :, :length], -(-length // 8)
                expected = pages.means_reference(key, torch.ones(1, length, dtype=torch.bool))
                torch.testing.assert_close(part.means[b : b + 1, :, :count], expected)


def test_selecting_heads_decode_over_the_pages_that_a_dense_mask_shows() -> None:
    n = 64 * 12 + 5
    q, k, v = tokens(n, B=2, H=8, H_kv=4)
    cache, rows, loses = held(PerHead(SELECTING), k, v), SELECTING, 0.0
    cache.fill(k[:, :, :700], v[:, :, :700])
    for i in range(700, n):
        cache.settle()
        out = cache.extend(*(x[:, :, i : i + 1] for x in (q, k, v)))
        for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            own = q[b, 2 * h : 2 * h + 2, i], k[b, h, : i + 1], v[b, h, : i + 1]
            expected = masked_attention(*own, rows[h], 0.5)
            torch.testing.assert_close(out[b, 2 * h : 2 * h + 2, 0], expected)
            loses = max(loses, float((expected - masked_attention(*own, EVERYTHING, 0.5)).norm() / expected.norm()))
    assert loses > 0.1 and cache.length == [n, n]
    assert_means(cache)


def test_queries_of_a_short_step_select_together_and_each_sees_its_recent_tokens_and_none_behind_it() -> None:
    q, k, v = tokens(64 * 10, B=1, H=2, H_kv=1)
    row = Rows(3, 70, selected=2)
    cache = held(PerHead((row,)), k, v)
    cache.fill(k[:, :, :620], v[:, :, :620])
    out = cache.extend(*(x[:, :, 620:636] for x in (q, k, v)))
    seen = pages_seen(q[0, :, 620:636].flatten(0, 1), k[0, 0, :636], Rows(3, 85, selected=2), 0.5)
    assert len(seen) < 10 and all((i - 69) // 64 in seen for i in range(620, 636))
    for i in range(16):
        hidden = torch.tensor([j // 64 not in seen or j > 620 + i for j in range(636)])
        scores = (q[0, :, 620 + i] @ k[0, 0, :636].T * 0.5).masked_fill(hidden, -math.inf)
        torch.testing.assert_close(out[0, :, i], scores.softmax(-1) @ v[0, 0, :636])


def test_selecting_heads_are_exact_while_there_are_no_more_pages_than_they_read_and_in_long_steps() -> None:
    row = Rows(4, 60, selected=3)  # a page of sinks, two of recent tokens and three
    q, k, v = tokens(640)
    everything, selecting = (held(PerHead((x,)), k, v) for x in (EVERYTHING, row))
    for cache in (everything, selecting):
        cache.fill(k[:, :, :300], v[:, :, :300])
    for i in range(300, 64 * 6):
        step = [x[:, :, i : i + 1] for x in (q, k, v)]
        assert torch.equal(everything.extend(*step), selecting.extend(*step))
    long = [x[:, :, 64 * 6 : 639] for x in (q, k, v)]
    assert torch.equal(everything.extend(*long), selecting.extend(*long))
    step = [x[:, :, 639:] for x in (q, k, v)]
    assert (everything.extend(*step) - selecting.extend(*step)).norm() > 0.1


def test_crop_reorder_reset_and_padding_keep_the_means_those_of_the_tokens() -> None:
    q, k, v = tokens(1000, B=3, H=8, H_kv=4)
    cache = held(PerHead(SELECTING), k, v)
    real = [tuple(i >= pad for i in range(500)) for pad in (0, 123, 77)]
    cache.fill(k[:, :, :500], v[:, :, :500], real)
    assert_means(cache)
    for count in (1, 3, 8, 45):
        before = cache.length
        cache.extend(*(x[:, :, 500 : 500 + count] for x in (q, k, v)))
        assert_means(cache)
        cache.drop(count)
        assert cache.length == before
        cache.fill(k[:, :, 600:611], v[:, :, 600:611])  # others in their places
        assert_means(cache)
        cache.drop(7)
        cache.select(torch.tensor([2, 0, 1]))
        hole = [(True, False, True), (False,) * 3, (True,) * 3]
        cache.extend(*(x[:, :, 700:703] for x in (q, k, v)), hole)
        cache.extend(*(x[:, :, 703:704] for x in (q, k, v)))  # means are those of the tokens at the latest with one
        assert_means(cache)
    assert sum(cache.length) == 3 * 500 - 123 - 77 + 4 * (3 * 4 + 5 + 3)


@pytest.mark.parametrize("n", [1, 3])
def test_selecting_by_the_kernels_is_selecting_by_the_reference(monkeypatch, poison, n: int) -> None:
    q, k, v = tokens(710, B=2, H=8, H_kv=4, dtype=torch.float32)
    q = 3 * q  # masses of pages that rounding does not make change places
    outs, caches = [], []
    for is_fast in (False, True):
        cache = held(PerHead(SELECTING), k, v)
        if is_fast:
            monkeypatch.setattr(K, "update_means", pages.means_triton)
            monkeypatch.setattr(K, "choose_pages", pages.choose_triton)
            monkeypatch.setattr(K, "decode_attention", lambda *x, **rows: decode.decode_triton(*x, decode.Rows(**rows)))
        cache.fill(k[:, :, :700], v[:, :, :700], [(True,) * 700, tuple(i >= 90 for i in range(700))])
        outs.append([cache.extend(*(x[:, :, i : i + n] for x in (q, k, v))) for i in range(700, 700 + 3 * n, n)])
        caches.append(cache)
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for cache in caches:
        assert_means(cache)
