"""Express of a sequence in chunks: its laws, and its error beside that of one piece at equal rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from express_compile.kernels.exact import exact_attention
from express_compile.kernels.express import Express, express_reference, make_layout
from express_compile.kernels.express_chunks import attend_chunk, express_in_chunks, make_chunk, merge
from express_compile.kernels.launch import Random

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


def test_short_chunks_are_exact() -> None:
    config, (query, key, value) = Express(64, 16, 32, 8), inputs(1200)
    out, lse = express_in_chunks(query, key, value, config, 0.25, Random(SEED, 1), 4)
    exact, exact_lse = exact_attention(query, key, value, 0.25)
    assert make_chunk(config, 300).rows == 300 <= config.exact_up_to
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_a_coreset_holds_rows_of_its_chunk_in_number_independent_of_the_length() -> None:
    config, (query, key, value) = Express(64, 4, 32, 0), inputs(1024)
    # and the tokens of a group, of 64 at this length, that is not complete
    assert max(make_chunk(config, n).rows for n in range(200, 70_000, 997)) < 6 * 64 + 4 + 32 + config.block + 64
    _, (keys, values) = attend_chunk(query, key, value, config, 0.25, Random(SEED, 1), 0)
    place = (keys[0, 0][:, None] == key[0, 0]).all(-1).int()
    assert (place.sum(1) == 1).all() and torch.equal(values[0, 0], value[0, 0][place.argmax(1)])
    assert place[:4].argmax(1).tolist() == [0, 1, 2, 3]
    assert place[-32:].argmax(1).tolist() == list(range(992, 1024))


def test_chunks_draw_different_random_numbers() -> None:
    config, (query, key, value) = Express(16, 4, 32, 0), inputs(1024)
    coresets = [attend_chunk(query, key, value, config, 0.25, Random(SEED, 1), i)[1][0] for i in (0, 1, 1, 2)]
    assert torch.equal(coresets[1], coresets[2])
    for i, j in ((0, 1), (1, 3), (0, 3)):
        assert not torch.equal(coresets[i], coresets[j])


def test_merging_is_attention_to_both() -> None:
    query, key, value = inputs(300)
    parts = [exact_attention(query[:, :, 200:], key[:, :, a:b], value[:, :, a:b], 0.25, causal=False)
             for a, b in ((0, 120), (120, 300))]  # fmt: skip
    out, lse = merge(*parts)
    exact, exact_lse = exact_attention(query[:, :, 200:], key, value, 0.25, causal=False)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-6)


def test_the_error_is_at_most_a_fifth_more_than_that_of_one_piece_at_equal_rows() -> None:
    """Of the queries of the last chunk, which see most rows: the mean over 12 inputs and seeds, with 95% confidence."""
    n, chunks, config, last = 4096, 2, Express(32, 4, 64, 0), 2048
    rows = make_chunk(config, last).table.rows_seen(last).mean() + make_chunk(config, last).rows
    one = Express(128, 4, 112, 0)
    seen = make_layout(one, n, n).table.rows_seen(n)[-last:].mean()
    assert seen == pytest.approx(rows, rel=0.03)
    ratios, same_budget = [], []
    for seed in range(12):
        tensors = inputs(n, seed)
        exact = exact_attention(*tensors, 0.25)[0]

        def error(out: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return (out - exact)[:, :, -last:].norm().item()

        draws = Random(torch.tensor(seed), 1)
        chunked = error(express_in_chunks(*tensors, config, 0.25, draws, chunks)[0])
        ratios.append(chunked / error(express_reference(*tensors, one, 0.25, *draws[:2])[0]))
        same_budget.append(chunked / error(express_reference(*tensors, config, 0.25, *draws[:2])[0]))
    mean, margin = np.mean(ratios), 2.2 * np.std(ratios, ddof=1) / math.sqrt(len(ratios))  # Student, 11 degrees
    assert mean + margin < 1.2, (mean, margin)
    assert np.mean(same_budget) < 0.7


def test_chunks_have_to_divide_the_sequence() -> None:
    query, key, value = inputs(100)
    with pytest.raises(ValueError, match="chunks=3: must divide 100 keys"):
        express_in_chunks(query, key, value, Express(16), 0.25, Random(SEED, 1), 3)
