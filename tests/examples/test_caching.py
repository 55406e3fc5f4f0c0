"""examples/bench/caching.py on a small model: what follows an exact prompt, and the caches of few rows beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from express_compile import Rows, rewrite_attention
from express_compile.kernels.heads import EVERYTHING, PerHead

EXAMPLES = Path(__file__).parents[2] / "examples" / "bench"
N, NEW = 300, 40


@pytest.fixture
def caching(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import caching

    return caching


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def given(caching):
    """A model, and three prompts that it has read."""
    model = llama()
    rewrite_attention(model, methods=["exact"])
    ids = torch.randint(3, 50, (3, N + NEW), generator=torch.Generator().manual_seed(0))
    parts = [caching.read(model, x, N, 0) for x in ids.split(2)]
    return model, caching.joined(parts)


def off(caching, model, read, make, piece: int = 8) -> tuple[float, float]:
    """How far the hidden states of a policy are from the exact ones at most, and the rows held."""
    hidden, held = caching.follow(model, read.ids, read.n, make(read), piece)
    return float((hidden - read.exact).abs().max()), held


def test_what_follows_is_exact_where_all_tokens_are_held_and_is_not_where_few_are(caching, given) -> None:
    model, read = given
    assert read.exact.shape == (3, NEW, 32) and read.layers[0][0].shape == (3, 2, N, 8)
    everything = PerHead(EVERYTHING)
    for make in (caching.by_plan(model, everything), caching.read_by_plan(model, everything)):
        error, held = off(caching, model, read, make)
        assert error < 1e-4 and held == (N + 8 + N + NEW) / 2
    error, held = off(caching, model, read, caching.by_plan(model, PerHead(Rows(4, 28))))
    assert error > 1e-2 and held == 4 + 28 + 8  # and those of the step


def test_snapkv_and_chance_keep_so_many_tokens_and_all_of_them_lose_nothing(caching, given) -> None:
    model, read = given
    for name in ("snapkv", "random"):
        error, held = off(caching, model, read, getattr(caching.Kept(model, N + (NEW + 8) / 2, 8), name))
        assert error < 1e-4 and held == (N + 8 + N + NEW) / 2
        error, held = off(caching, model, read, getattr(caching.Kept(model, 100, 8), name))
        assert error > 1e-3 and held == 100


def test_snapkv_keeps_what_the_last_queries_attend_to(caching, given) -> None:
    """The mass by attention written out, of the queries before the prompt ends and of some behind it."""
    model, read = given
    restored = llama()  # the same weights
    restored.set_attn_implementation("eager")
    for observed, stop in ((0, N), (8, N + NEW - 8)):
        read.observed = observed
        weights = restored(read.ids[:, :stop], output_attentions=True).attentions
        masses = [x[:, :, -caching.OBSERVED :, :N].unflatten(1, (2, 2)).mean((2, 3)) for x in weights]
        pooled = [torch.nn.functional.avg_pool1d(x, caching.POOL, 1, caching.POOL // 2) for x in masses]
        cache = caching.Kept(model, 100, 8).snapkv(read)
        for layer, (keys, _), mass in zip(cache.layers, read.layers, pooled, strict=True):
            at = caching.best(mass, 0, caching.OBSERVED, 76).sort(-1).values
            own = keys.gather(2, at[..., None].expand(-1, -1, -1, 8))
            assert float((layer.keys == own).all(-1).float().mean()) > 0.98  # ties of rounding aside


def test_picking_and_joining_prompts_keeps_them_apart(caching, given) -> None:
    _, read = given
    again = caching.joined([read.pick([2]), read.pick([0, 1])])
    assert torch.equal(again.ids, read.ids[[2, 0, 1]]) and torch.equal(again.exact, read.exact[[2, 0, 1]])
    for (k, v), (k2, v2) in zip(again.layers, read.layers, strict=True):
        assert torch.equal(k, k2[[2, 0, 1]]) and torch.equal(v, v2[[2, 0, 1]])


@torch.no_grad()
def test_a_continuation_is_sampled_by_the_exact_model(caching) -> None:
    model, drawn = llama(), torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 50, (1, 6), generator=drawn).expand(400, 6)
    ids = caching.continued(model, prompt, 3)
    assert ids.shape == (400, 9) and torch.equal(ids[:, :6], prompt) and not (ids[:, 6:] == 2).any()
    p = model(prompt[:1]).logits[0, -1].index_fill(-1, torch.tensor([2]), -torch.inf).softmax(-1)
    seen = torch.bincount(ids[:, 6], minlength=50) / 400
    assert float((seen - p).abs().sum() / 2) < 0.2  # of 400 draws; by chance .03 to .12
    greedy = torch.rand_like
    torch.rand_like = lambda x: torch.full_like(x, 0.5)  # no noise: the first in rank
    try:
        ids = caching.continued(model, prompt[:1], 12)
    finally:
        torch.rand_like = greedy
    expected = model.generate(prompt[:1], attention_mask=torch.ones_like(prompt[:1]), do_sample=False,
                              min_new_tokens=12, max_new_tokens=12)  # fmt: skip
    assert torch.equal(ids, expected)


def test_rows_held_are_those_that_a_cache_holds(caching, given) -> None:
    model, read = given
    count = caching.Counted(NEW, 8)
    for rows in (Rows(4, 28), Rows(4, 28, protected=16), Rows(4, 28, 8, 16), EVERYTHING):
        (predicted,) = count([rows], N)
        _, held = off(caching, model, read, caching.by_plan(model, PerHead(rows)))
        assert held == pytest.approx(predicted, rel=0.1 if rows.protected else 0.02)
    pages = Rows(4, 28, selected=1)
    assert count([pages], N) == [N + (NEW + 8) / 2] and caching.Counted(NEW, 1, True)([pages], N) == [64 * 4]


def test_policies_have_the_rows_that_they_may_hold(caching) -> None:
    from express_compile.quality.profile import Profile, SiteProfile, rows_of

    n, options = 4096, caching.Caching.options
    random = np.random.default_rng(0)
    rows = tuple(rows_of(options, n, caching.base()))
    errors = random.exponential(size=(4, 3, 1)) ** 3 / np.array(rows)
    sites = [SiteProfile(f"layers.{i}", 0, None, tuple(map(tuple, x))) for i, x in enumerate(errors.tolist())]
    found = Profile(options, n, 1, rows, tuple(sites), 16)
    for is_read in (False, True):
        count = caching.Counted(128, 16, is_read)
        plans = caching.policies(found, 1000, n, count)
        held = {name: np.mean(count(caching.rows_by_head(plan), n)) for name, plan in plans.items()}
        assert all(x <= 1000 for x in held.values())
        assert all(held[name] > 900 for name in ("streaming", "protected", "express", "selected") if name in held)
        names = {x.selected > 0 for plan in plans.values() for x in caching.rows_by_head(plan)}
        assert names == {False, True} if is_read else names == {False}


def test_bands_are_eighths_of_the_tokens(caching) -> None:
    bands = caching.band_rows([np.arange(64.0), np.arange(64.0)], "task")
    assert [x["metric"] for x in bands] == [f"kl {i + 1}-{i + 8}" for i in range(0, 64, 8)]
    assert [x["value"] for x in bands] == [i + 3.5 for i in range(0, 64, 8)]
