"""examples/bench/decoding.py without a compiler: what it times is the same attention, and SANTA where it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from express_compile import SavedPlan
from express_compile.kernels import santa

EXAMPLES = Path(__file__).parents[2] / "examples" / "bench"


def test_the_three_attentions_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import decoding

    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    sampled, reference = [], santa.santa_reference

    def spy(call, draws):
        sampled.append(draws is not None)
        return reference(call, draws)

    monkeypatch.setattr(santa, "santa_reference", spy)
    clock = decoding.Clock("cpu")
    with torch.no_grad():
        model = decoding.random_llama("cpu", torch.float32, decoding.TINY)
    logits = []
    for attention in ("sdpa", "unmasked"):
        transformers.AttentionInterface.register("unmasked", decoding.unmasked)
        model.set_attn_implementation(attention)
        torch.manual_seed(1)
        times, out = decoding.step_times(model, 2, 64, clock, "default")
        assert len(times) == decoding.STEPS and out.shape == (2, 1, 97) and out.isfinite().all()
        logits.append(out)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert not sampled
    model.set_attn_implementation("sdpa")
    exact, row = decoding.rows_of(model, 2, 64, 8, clock, "default")
    assert row["opponent"] == "transformers" and row["error"] > 0.01
    assert exact["opponent"] == "transformers" and exact["error"] <= 1e-5 and exact["method"] == "exact"
    assert sampled == [True] * (model.config.num_hidden_layers * (2 * decoding.STEPS + 2))


def test_attention_alone_is_checked_before_it_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import decoding

    rows = decoding.attention_rows(1, 256, "cpu", torch.float32)
    rows += decoding.attention_rows(2, 64, "cpu", torch.float32, weighted=True)
    assert [row["job"] for row in rows] == ["decode_exact", "decode_exact", "decode_pages", "decode_cache"]
    assert all(row["error"] <= 1e-5 and row["ms_p50"] > 0 for row in rows)
    monkeypatch.setattr(decoding, "decode_attention", lambda q, k, v, *_, **rows: (v[:, :1, :1].expand_as(q), None))
    with pytest.raises(SystemExit, match="lengths at B=1, n=64: off by"):
        decoding.attention_rows(1, 64, "cpu", torch.float32)


def test_what_is_timed_of_thinning_is_what_a_text_thins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that thin on the way hold what a longer prompt does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import decoding

    draw = torch.Generator().manual_seed(0)
    q, *kv = (torch.randn(1, 1, 1, 16, generator=draw) for _ in range(3))
    own, random = decoding.PerHead((decoding.HeadRows(2, 40, 16),)), decoding.Random(torch.tensor(0), 3)
    one, other = (decoding.Held(own, *kv, random, 0.25, 5) for _ in range(2))
    past = [torch.randn(1, 1, 600, 16, generator=draw) for _ in range(2)]
    one.fill(*past)
    other.fill(*(torch.cat([x, new.expand(-1, -1, 80, -1)], 2) for x, new in zip(past, kv, strict=True)))
    one.settle(single=True)
    one.prepare_step(end := torch.empty(1, dtype=torch.int32))
    assert decoding.thinning([one], (q, *kv), end, 80) > 0
    one.settle()
    assert one.length == other.length == [680] and torch.equal(one.rows(), other.rows())
    masses = [x.parts[0].log_weight.exp().sum() for x in (one, other)]
    torch.testing.assert_close(*masses)


def test_whole_steps_and_a_cache_alone_have_a_row_for_each_method(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import decoding
    from records import params_of

    monkeypatch.setattr(decoding, "UNIFORM", decoding.HeadRows(2, 40, 16, 20))
    monkeypatch.setattr(decoding, "H", 2)
    monkeypatch.setattr(decoding, "H_KV", 1)
    attended, updated = decoding.cache_rows(1, 400, "cpu", torch.float32)
    assert attended["job"] == "decode_cache" and attended["error"] <= 1e-5
    assert updated["job"] == "cache_update" and updated["ms_p50"] > 0
    append, share, thinned = (float(params_of(updated)[name]) for name in ("append_us", "share", "thinning_us"))
    assert updated["opponent_ms_p50"] == attended["ms_p50"] and thinned >= 0
    assert append == pytest.approx(1e3 * (updated["ms_p50"] - attended["ms_p50"]), abs=0.01)
    assert share == pytest.approx(updated["ms_p50"] / attended["ms_p50"] - 1, abs=1e-3)
    with torch.no_grad():
        model = decoding.random_llama("cpu", torch.float32, decoding.TINY)
    plans = decoding.planned_rows(model)
    assert [len(heads) for heads in plans.values()] == [2, 2] and len({str(x) for x in sum(plans.values(), ())}) > 1
    sites = [replace(site, facts={**site.facts, "H": len(site.rows)}) for site in SavedPlan.load(decoding.PLAN).sites]
    SavedPlan((*sites[1:], replace(sites[0], facts={"H": 3, "H_kv": 1}))).save(tmp_path / "by_query_head.json")
    with pytest.raises(SystemExit, match="an ExpressCache takes a plan that was fitted without them"):
        decoding.planned_rows(model, tmp_path / "by_query_head.json")
    rows = list(decoding.whole_rows(model, 1, 500, 8, 2))
    assert [row["method"] for row in rows] == ["transformers", "exact", "santa", "selected", "cache", "planned"]
    held = {row["method"]: params_of(row).get("rows") for row in rows}
    assert held["transformers"] is None and float(held["cache"]) < 400 < float(held["planned"])
    assert all(row["ms_p50"] > 0 for row in rows)
