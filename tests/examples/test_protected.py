"""The bench of scores for protected rows: scores are what they say, keep their law, and find what is planted."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from express_compile.core.call import Call
from express_compile.core.rows import Rows
from express_compile.kernels import express as E
from express_compile.kernels import heads
from express_compile.kernels.express import Unthinned
from express_compile.kernels.heads import heads_reference
from express_compile.kernels.launch import Random
from express_compile.kernels.select.contest import CONTEST, compete_reference

BENCH = Path(__file__).resolve().parents[2] / "examples" / "bench"
SINKS, CONTESTS, H_KV, GROUP, D = 5, 3, 2, 3, 8
N = SINKS + CONTESTS * CONTEST + 40


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("protected")
    finally:
        sys.path.remove(str(BENCH))


def tokens(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query, key, value ``[1, heads, N, D]`` with a mean, float64, and an output projection."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = [(1, H_KV * GROUP, N, D), (1, H_KV, N, D), (1, H_KV, N, D), (20, H_KV * GROUP, D)]
    return tuple(torch.randn(shape, generator=drawn, dtype=torch.float64) + 0.3 for shape in shapes)


def left_of(bench: ModuleType, given: tuple[torch.Tensor, ...], contests: int = CONTESTS):
    query, key, value, projection = given
    return bench.Left.of(key, value, SINKS, contests, query, projection)


@pytest.mark.parametrize("protected", [40, 300])
def test_places_by_key_are_those_of_the_house(bench, protected) -> None:
    _, key, value, _ = given = tokens()
    left = left_of(bench, given)
    expected = compete_reference(key, SINKS, CONTESTS, protected)[1]
    assert torch.equal(bench.compete_by(bench.SCORES["key"](left), SINKS, protected), expected)
    assert not torch.equal(bench.compete_by(bench.SCORES["value"](left), SINKS, protected), expected)


def test_a_policy_follows_the_score(bench) -> None:
    query, key, value, _ = tokens()
    rows = [Rows(SINKS, 16, protected=40)]

    def attend() -> torch.Tensor:
        return heads_reference(query, key, value, rows, 0.5, torch.tensor(0), block=16)[0]

    house = attend()
    with bench.protecting("key"):
        assert torch.equal(attend(), house)
    with bench.protecting("value"):
        assert float((attend() - house).abs().max()) > 1e-3
    assert torch.equal(attend(), house)


def test_on_a_gpu_places_follow_the_score_too(bench) -> None:
    """What the kernels of a mixture call to choose rows gives the places of the score, of the heads that they name."""
    query, key, value, _ = given = tokens()
    layout, own = E.make_layout(Unthinned(2, SINKS, 16, 40, block=16), 1, N), torch.tensor([1], dtype=torch.int32)
    kept, alone = torch.zeros(1, 1, layout.size, dtype=torch.int32), torch.zeros(3 + layout.size, dtype=torch.int32)
    call = Call(query, key, value, None, torch.tensor(0), 0.5, 0)
    with bench.protecting("value"):
        E.select_into((kept,), key, value, layout, 0.5, Random(torch.tensor(0), 0, own))
        heads._thin(call, (heads.Thinned((1,), layout, 0, 3),), alone, None)
    expected = bench.compete_by(bench.SCORES["value"](left_of(bench, given)), SINKS, 40)
    assert layout.contests == CONTESTS and torch.equal(kept, expected[:, 1:].flatten(2))
    assert torch.equal(alone[3:], expected[0, 1].flatten()) and not alone[:3].any()


def test_what_comes_later_changes_no_score(bench) -> None:
    given = tokens()
    early, late = left_of(bench, given, CONTESTS - 1), left_of(bench, given)
    for name, score in bench.SCORES.items():
        if name != "random":
            torch.testing.assert_close(score(late)[:, :, :-1], score(early), rtol=1e-12, atol=1e-12, msg=name)


def test_scores_are_what_they_say(bench) -> None:
    """One row of one head, written out."""
    query, key, value, projection = given = tokens()
    left, head, i, c = left_of(bench, given), 1, 1, 70
    end, row = SINKS + (i + 1) * CONTEST, SINKS + i * CONTEST + c
    k, v = key[0, head], value[0, head]

    def by_cosine(x: torch.Tensor, row: int) -> torch.Tensor:
        return -torch.dot(x[row], x[:end].mean(0)) / x[row].norm() / x[:end].mean(0).norm()

    def both(row: int) -> torch.Tensor:
        return by_cosine(k, row) + by_cosine(v, row)

    means = [k[SINKS + j * CONTEST : SINKS + (j + 1) * CONTEST].mean(0) for j in range(i + 1)]
    spread = v[:end].T.cov(correction=0)
    spread += 1e-3 * spread.diagonal().mean() * torch.eye(D)
    off = v[row] - v[:end].mean(0)
    queries = range(head * GROUP, (head + 1) * GROUP)
    attention = []
    for h in queries:
        q = query[0, h, :end]
        attention.append((k[row] @ q.mean(0) / D**0.5 + k[row] @ q.T.cov(correction=0) @ k[row] / D / 2).exp())
    expected = {
        "key": by_cosine(k, row),
        "value": by_cosine(v, row),
        "key + value": both(row),
        "key + value, mean of 5": torch.stack([both(row + x) for x in range(-2, 3)]).mean(),
        "clusters": -max(torch.cosine_similarity(k[row], mean, dim=0) for mean in means),
        "leverage": off @ spread.inverse() @ off,
        "output": sum((projection[:, h] @ v[row]).square().sum() for h in queries),
        "expected": sum(attention).log(),
    }
    for name, x in expected.items():
        torch.testing.assert_close(bench.SCORES[name](left)[0, head, i, c], x, msg=name)
    edge = bench.SCORES["key + value, mean of 5"](left)[0, head, i, -1]
    torch.testing.assert_close(edge, torch.stack([both(end - 1 - x) for x in range(3)]).mean())


def test_the_mass_given_is_that_of_attention(bench) -> None:
    query, key, _, _ = tokens()
    weights = (query @ key.repeat_interleave(GROUP, 1).mT / D**0.5).float()
    weights = weights.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    at = [100, 500, N - 1]
    summed = weights[0, :, at].unflatten(0, (H_KV, GROUP)).sum((1, 2))
    torch.testing.assert_close(bench.given(query, key, at), summed)


def test_a_planted_row_is_caught_by_the_scores_that_see_it(bench) -> None:
    from needles import Case

    query, key, value, projection = tokens()
    key, value = key + 3, value + 3
    at = SINKS + CONTEST + 17
    prompt = [0] * (N - 2)
    prompt[at : at + 2] = 7, 8
    case = Case("single", "made up", "word", 0.4, tuple(prompt), (7, 8))
    assert bench.run_of_answer(case) == range(at, at + 2)
    value[:, :, at : at + 2] *= -1  # distinctive values, keys like all others
    layer = left_of(bench, (query, key, value, projection))
    mass = torch.rand(2, H_KV, N, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)

    def shares(places: int) -> dict:
        return bench.shares_of(case, [layer, layer], [tuple(mass)] * 2, [*bench.SCORES], [places])

    few = shares(8)
    for name in ("value", "key + value", "key + value, mean of 3", "leverage"):
        assert few[name, 8, "needle"] == pytest.approx(1), name
    assert few["key", 8, "needle"] < 0.5 and few["random", 8, "needle"] < 0.5
    length = CONTESTS * CONTEST
    assert all(few[name, 8, "queries"] < 16 / length for name in bench.SCORES), "8 of the rows, of equal mass"
    half = shares(length // 2)
    assert half["random", length // 2, "queries"] == pytest.approx(0.5, abs=0.05)
    assert list(shares(length).values()) == pytest.approx([1] * (2 * len(bench.SCORES)))
    with pytest.raises(ValueError, match="single, made up: the answer stands in the prompt 0 times"):
        bench.run_of_answer(Case("single", "made up", "word", 0.4, tuple(prompt), (8, 7)))


def test_the_table_has_the_mean_of_the_haystacks_and_what_was_judged(bench, monkeypatch) -> None:
    tables = importlib.import_module("tables")
    run = {"date": "2026-12-01", "gpu": "CPU", "model": "M", "n": "4096", "low": "0", "high": "1"}
    rows = []
    for name, places, base in (("key", "64", 0.1), ("key", "8", 0.0), ("value", "64", 0.5), ("value", "8", 0.3)):
        for i, hay in enumerate(tables.HAYSTACKS):
            own = {**run, "method": name, "rows": places, "task": f"mass: {hay}", "params": f"sinks=32 cases={i + 2}"}
            rows += [{**own, "metric": "needle", "value": f"{base + i / 10}"}]
            rows += [{**own, "metric": "queries", "value": f"{base}"}]
    for name, kl in (("key", "0.2"), ("value", "0.1")):
        own = {**run, "method": name, "rows": "900.0", "params": "such rows", "task": "texts: some"}
        rows += [{**own, "metric": x, "value": kl} for x in ("kl", "top1", "kl_median", "kl_p99")]
        rows += [{**own, "task": "single, noise", "metric": "recalled", "value": "2", "high": "3"}]
    monkeypatch.setattr(tables, "read", lambda name: rows)
    said, _, header, _, key, value = tables.protected_table().splitlines()
    assert said.endswith("needles that exact attention finds: 2 in noise, 3 in prose, 4 in code.")
    assert header.startswith("| score | 8 places: noise | prose | code | mean | other queries | 64 places: noise |")
    assert key == "| key | 0.00 | 0.10 | 0.20 | **0.10** | 0.00 | 0.10 | 0.20 | 0.30 | **0.20** | 0.10 |"
    assert value.startswith("| value | 0.30 | 0.40 | 0.50 | **0.40** | 0.30 |")
    judged = tables.protected_judged_table().splitlines()
    assert judged[0] == "**M, 4,096 tokens, CPU**, 2026-12-01: such rows; texts: some."
    assert judged[-1] == "| value | 900 | 0.1000 (0.0000–1.0000) | 0.50 | 0.1000 | 0.10 | 0.100 | 2 of 3 |"
