"""The plan that is shipped in examples/plans: what it was fitted to, and that it is followed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from express_compile import Policy, SavedPlan, record_sites, restore_attention, rewrite_attention

BENCH = Path(__file__).resolve().parents[2] / "examples" / "bench"
PATH = BENCH.parent / "plans" / "smollm2-135m.json"


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, by name."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in ("models", "plans")}
    finally:
        sys.path.remove(str(BENCH))


def test_it_names_every_layer_and_kv_head_of_smollm2() -> None:
    assert sorted(PATH.parent.iterdir()) == [PATH], "the plans that the pages and these tests know"
    plan = SavedPlan.load(PATH)
    assert [site.module for site in plan.sites] == [f"model.layers.{i}.self_attn" for i in range(30)]
    assert {(site.index, site.method, site.verdict, len(site.rows)) for site in plan.sites} == {
        (0, "heads", "rewritten", 3)
    }
    facts = {"mask": "causal", "H": 9, "H_kv": 3, "D": 64, "Dv": 64}
    assert all(site.facts == facts for site in plan.sites)
    assert len({site.rows for site in plan.sites}) > 20, "heads differ"


def test_it_says_what_it_was_fitted_to_and_keeps_its_budget(bench) -> None:
    plan, plans = SavedPlan.load(PATH), bench["plans"]
    fitted = plan.fitted
    assert fitted["asked"] == {"rows": 1350.0}
    assert fitted["rows"] == pytest.approx(plans.average_rows(plan, 8192)) and fitted["rows"] <= 1350
    assert (fitted["length"], list(fitted["tokens"]), list(fitted["held_out"])) == (8192, [8192] * 3, [8192])
    assert 0 < fitted["kl"] < 0.02 and fitted["price"] > 0
    options = [plans.Rows(**x) for x in fitted["options"]]
    assert options == list(plans.OPTIONS) and set(plans.rows_by_head(plan)) <= set(options)


def test_it_comes_back_from_a_file_as_it_was(tmp_path) -> None:
    plan = SavedPlan.load(PATH)
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == PATH.read_bytes()
    again = SavedPlan.load(tmp_path / "plan.json")
    assert again == plan and again.fitted == plan.fitted
    assert Policy.from_json(Policy(plan=PATH).to_json()).plan == plan


@torch.no_grad()
def test_it_is_followed_at_another_length(bench) -> None:
    model, tokenizer = bench["models"].load_smollm2("cpu", torch.float32)
    ids = tokenizer(bench["models"].judged_texts()["acts"][:4000], return_tensors="pt").input_ids[:, :512]
    exact, found = model(ids).logits, []
    for options in ({"plan": str(PATH), "strict": True}, {"policy": Policy(plan=PATH, strict=True)}):
        rewrite_attention(model, **options)
        with record_sites() as sites:
            found.append(model(ids).logits)
        restore_attention(model)
        assert [(x.module, x.method, x.rows) for x in sites] == [
            (x.module, "heads", x.rows) for x in SavedPlan.load(PATH).sites
        ]
    assert torch.equal(*found), "the same plan, the same rows"
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - found[0].log_softmax(-1))).sum(-1)
    assert kl[:, :96].max() < 1e-5, "everything is still in the shortest window"
    assert 1e-6 < kl.mean() < 0.1, "and later not"
    assert torch.equal(model(ids).logits, exact)
