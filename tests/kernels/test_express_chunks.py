"""Express of a sequence in chunks: its laws, and its error beside that of one piece at equal rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from express_compile.kernels.exact import exact_attention
from express_compile.kernels.express import Express, express_reference, gather_rows, halve_all_reference, make_layout
from express_compile.kernels.express_chunks import Chunk, _thinned_again, express_in_chunks, make_coreset
from express_compile.kernels.launch import Random
from express_compile.kernels.select.halving import Decider
from express_compile.kernels.select.thinning import thin

SEED = torch.tensor(3)


def inputs(n: int, seed: int = 0, D: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values that come in runs of 16 about one of 32 topics, so that attention is not all noise."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, h, n, D, generator=generator) for h in (2, 1, 1))
    topic = torch.randint(32, (-(-n // 16),), generator=generator).repeat_interleave(16)[:n]
    topics, told = (torch.randn(1, 1, 32, D, generator=generator)[:, :, topic] for _ in range(2))
    return query, 0.7 * key + topics, 0.5 * value + told


@given(
    tokens=st.integers(1, 700), chunks=st.integers(1, 4), s=st.sampled_from([4, 16]), sinks=st.integers(0, 40),
    recent=st.integers(0, 70), protected=st.sampled_from([0, 3, 64]), block=st.sampled_from([16, 64]),
)  # fmt: skip
def test_the_weights_that_a_query_sees_sum_to_its_past_tokens(
    tokens: int, chunks: int, s: int, sinks: int, recent: int, protected: int, block: int
) -> None:
    config, n = Express(s, sinks, recent, protected, block=block), tokens * chunks
    query, key, value = inputs(n)
    _, lse = express_in_chunks(query * 0, key, value, config, 0.25, Random(SEED, 1), chunks)
    seen = torch.arange(1, n + 1)
    assert ((lse.exp() - seen).abs() / seen).max() < 1e-5


def test_the_first_chunk_is_a_prefill_by_itself_and_one_chunk_is_express() -> None:
    config, (query, key, value) = Express(16, 4, 32, 8), inputs(2048)
    two, lse = express_in_chunks(query, key, value, config, 0.25, Random(SEED, 1), 2)
    half = [x[:, :, :1024] for x in (query, key, value)]
    alone, alone_lse = express_reference(*half, config, 0.25, SEED, 1)
    assert torch.equal(two[:, :, :1024], alone) and torch.equal(lse[:, :, :1024], alone_lse)
    one, _ = express_in_chunks(query, key, value, config, 0.25, Random(SEED, 1), 1)
    assert torch.equal(one, express_reference(query, key, value, config, 0.25, SEED, 1)[0])
    assert not torch.equal(one[:, :, 1024:], two[:, :, 1024:])


@pytest.mark.parametrize("changed", [700, 1300])
def test_nothing_sees_what_comes_later(changed: int) -> None:
    config, (query, key, value) = Express(16, 4, 32, 8), inputs(2048)
    before, _ = express_in_chunks(query, key, value, config, 0.25, Random(SEED, 1), 4)
    for x in (key, value):
        x[:, :, changed:] += 1.0
    after, _ = express_in_chunks(query, key, value, config, 0.25, Random(SEED, 1), 4)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed], after[:, :, changed])


@pytest.mark.parametrize(("recent", "chunks"), [(32, 4), (200, 4), (32, 2)])
def test_what_is_exact_in_one_piece_is_exact_in_chunks(recent: int, chunks: int) -> None:
    config = Express(64, 16, recent, 8)
    n = config.exact_up_to // 4 * 4
    tensors = inputs(n)
    exact, exact_lse = exact_attention(*tensors, 0.25)
    out, lse = express_in_chunks(*tensors, config, 0.25, Random(SEED, 1), chunks)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)
    longer = express_in_chunks(*inputs(2 * n), config, 0.25, Random(SEED, 1), chunks)[0]
    assert (longer - exact_attention(*inputs(2 * n), 0.25)[0]).norm() > 0.1


@given(tokens=st.integers(1, 5000), number=st.integers(0, 7), recent=st.integers(0, 300))
def test_every_token_is_in_the_halo_or_in_one_coreset(tokens: int, number: int, recent: int) -> None:
    every = [Chunk(Express(16, 4, recent, 8), tokens, i, 8) for i in range(number + 1)]
    assert sum(chunk.told for chunk in every[:-1]) + every[-1].halo == number * tokens
    for chunk in every[1:]:
        told = sum(rows * math.exp(weight) for parts in chunk.parts for *_, rows, weight in parts)
        assert told == pytest.approx(chunk.told)


def coreset(chunk: Chunk, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return make_coreset((key, value), chunk, 0.25, Random(SEED, 1))


def test_a_coreset_holds_rows_of_its_chunk_in_number_independent_of_the_length() -> None:
    config, (_, key, value) = Express(64, 4, 32, 0), inputs(1024)
    # and the tokens of a group, of 64 at this length, that is not complete
    assert max(Chunk(config, n, 1, 2).rows for n in range(200, 70_000, 997)) < 6 * 64 + 4 + config.block + 64
    keys, values = coreset(Chunk(config, 1024, 0, 2), key, value)
    place = (keys[0, 0][:, None] == key[0, 0]).all(-1).int()
    there = place.sum(1)
    assert there.max() == 1 and torch.equal(there, there.sort(descending=True).values)  # zeros behind what there is
    at = place[there > 0].argmax(1)
    assert torch.equal(values[0, 0, there > 0], value[0, 0][at]) and at.max() < 1024 - 32
    assert at[:4].tolist() == [0, 1, 2, 3]


def test_chunks_draw_different_random_numbers() -> None:
    config, (_, key, value) = Express(16, 0, 0, 0), inputs(1024)
    coresets = [coreset(Chunk(config, 1024, i, 4), key, value)[0] for i in (0, 1, 1, 2)]
    assert torch.equal(coresets[1], coresets[2])
    for i, j in ((0, 1), (1, 3), (0, 3)):
        assert not torch.equal(coresets[i], coresets[j])


@pytest.mark.parametrize("chunks", [4, 64])
def test_the_first_tokens_are_held_as_they_are_whatever_is_thinned_again(chunks: int) -> None:
    """Also where the first chunk is so short that it is told whole."""
    config, (query, key, value) = Express(16, 4, 32, 0), inputs(4096)
    value[:] = 0
    value[:, :, :4, :4] = torch.eye(4)
    out, lse = express_in_chunks(query * 0, key, value, config, 0.25, Random(SEED, 1), chunks)
    mass = (out * lse.exp()[..., None])[:, :, 4:, :4]
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-4, atol=1e-4)


def test_later_chunks_see_as_many_rows_as_one_piece_whatever_their_number() -> None:
    config = Express(512)
    one = make_layout(config, 1 << 17, 1 << 17).table.rows_seen(1 << 17)[1 << 14 :]
    for chunks in (2, 3, 8, 16):
        tokens = (1 << 17) // chunks // 128 * 128
        rows = [Chunk(config, tokens, i, chunks).rows_seen() for i in range(chunks)]
        assert max(x.mean() for x in rows) < 2 * one.mean()
        assert np.concatenate(rows).mean() == pytest.approx(one.mean(), rel=0.3)


@pytest.mark.parametrize(("pools", "rounds"), [([32], 3), ([16, 0, 48], 3), ([296, 24, 100], 2), ([608], 2)])
def test_pools_are_halved_by_themselves_and_by_the_kernel_alike(pools: list[int], rounds: int) -> None:
    schedule, starts = _thinned_again(pools, rounds)
    assert schedule.size == sum(pools) + sum(rows >> i for rows in pools for i in range(1, rounds + 1))
    key, value = (x[:, :, : sum(pools)].contiguous() for x in inputs(640)[1:])
    decider = Decider(Express(16).rule, 0.25, Random(SEED, 1))
    arena = torch.arange(schedule.size, dtype=torch.int32).repeat(1, 1, 1)
    halve_all_reference(arena, key, value, schedule, decider)
    first = 0
    for rows, start in zip(pools, starts, strict=True):
        kept = arena[0, 0, start : start + (rows >> rounds)]
        assert len(set(kept.tolist())) == rows >> rounds and ((first <= kept) & (kept < first + rows)).all()
        first += rows
    index = torch.empty(1, 1, schedule.size - schedule.tokens, dtype=torch.int32)
    keys, values = thin(key, value, index, schedule, 0, decider)
    assert torch.equal(index, arena[:, :, schedule.tokens :])
    assert torch.equal(keys, gather_rows(key, index)) and torch.equal(values, gather_rows(value, index))


@pytest.mark.parametrize("chunks", [2, 4])
def test_the_error_is_at_most_a_fifth_more_than_that_of_one_piece_at_equal_rows(chunks: int) -> None:
    """Over all queries, at the same mean number of rows: the mean over 8 inputs and seeds, with 95% confidence."""
    n, config, seeds = 4096, Express(64, 4, 64, 0), 8
    rows = np.concatenate([Chunk(config, n // chunks, i, chunks).rows_seen() for i in range(chunks)]).mean()
    ones = [Express(s, 4, 64, 0) for s in (32, 64, 128)]
    seen = [math.log(make_layout(one, n, n).table.rows_seen(n).mean()) for one in ones]
    assert seen[0] < math.log(rows) < seen[2]
    errors, ratios = [], []
    for seed in range(seeds):
        tensors, draws = inputs(n, seed), Random(torch.tensor(seed), 1)
        exact = exact_attention(*tensors, 0.25)[0]
        every = [express_reference(*tensors, one, 0.25, *draws[:2])[0] for one in ones]
        every.append(express_in_chunks(*tensors, config, 0.25, draws, chunks)[0])
        errors.append([(out - exact).norm().item() for out in every])
    one = math.exp(np.interp(math.log(rows), seen, np.log(np.mean(errors, 0)[:3])))
    ratios = [chunked / one for *_, chunked in errors]
    mean, margin = np.mean(ratios), 2.37 * np.std(ratios, ddof=1) / math.sqrt(seeds)  # Student, 7 degrees
    assert mean + margin < 1.2, (mean, margin)


def test_chunks_have_to_divide_the_sequence() -> None:
    query, key, value = inputs(100)
    with pytest.raises(ValueError, match="chunks=3: must divide 100 keys"):
        express_in_chunks(query, key, value, Express(16), 0.25, Random(SEED, 1), 3)
