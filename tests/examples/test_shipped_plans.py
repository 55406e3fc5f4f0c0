"""The plans that are shipped in examples/plans: what they were fitted to, and that they are followed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from express_compile import Policy, SavedPlan, record_sites, restore_attention, rewrite_attention

BENCH = Path(__file__).resolve().parents[2] / "examples" / "bench"
PATH = BENCH.parent / "plans" / "smollm2-135m.json"
QWEN, QWEN_32K = (PATH.with_name(f"qwen2.5-coder-0.5b{x}.json") for x in ("", "-32k"))
FINER = {path: path.with_stem(f"{path.stem}-query-heads") for path in (PATH, QWEN, QWEN_32K)}
"""Those by query head, beside those by KV head."""
SMALL = 30, {"mask": "causal", "H": 9, "H_kv": 3, "D": 64, "Dv": 64}
LARGE = 24, {"mask": "causal", "H": 14, "H_kv": 2, "D": 64, "Dv": 64}
SHAPES = {
    **dict.fromkeys((PATH, FINER[PATH]), SMALL),
    **dict.fromkeys((QWEN, QWEN_32K, FINER[QWEN], FINER[QWEN_32K]), LARGE),
}


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, by name."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in ("models", "plans")}
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_it_names_every_layer_and_head_of_its_model(path) -> None:
    assert sorted(PATH.parent.iterdir()) == sorted(SHAPES), "the plans that the pages and these tests know"
    plan, (layers, facts) = SavedPlan.load(path), SHAPES[path]
    assert [site.module for site in plan.sites] == [f"model.layers.{i}.self_attn" for i in range(layers)]
    assert {(site.index, site.method, site.verdict, len(site.rows)) for site in plan.sites} == {
        (0, "heads", "rewritten", facts["H" if path in FINER.values() else "H_kv"])
    }
    assert all(site.facts == facts for site in plan.sites)
    assert len({site.rows for site in plan.sites}) > 2 * layers / 3, "heads differ"
    assert {site.params["last"] for site in plan.sites} == {64}


@pytest.mark.parametrize(
    ("path", "asked", "n", "kl"),
    [
        (PATH, 1350.0, 8192, 0.02),
        (QWEN, 1600.0, 16384, 0.2),
        (QWEN_32K, 1600.0, 32768, 0.2),
        (FINER[PATH], 1350.0, 8192, 0.01),
        (FINER[QWEN], 1600.0, 16384, 0.05),
        (FINER[QWEN_32K], 1600.0, 32768, 0.15),
    ],
    ids=str,
)
def test_it_says_what_it_was_fitted_to_and_keeps_its_budget(bench, path, asked, n, kl) -> None:
    plan, plans = SavedPlan.load(path), bench["plans"]
    fitted = plan.fitted
    assert fitted["asked"] == {"rows": asked}
    assert fitted["rows"] == pytest.approx(plans.average_rows(plan, n)) and fitted["rows"] <= asked
    samples = 6 if path in (FINER[PATH], FINER[QWEN]) else 3  # with haystacks that end with questions
    assert (fitted["length"], list(fitted["tokens"]), list(fitted["held_out"])) == (n, [n] * samples, [n])
    assert 0 < fitted["kl"] < kl and fitted["price"] > 0
    options = [plans.Rows(**x) for x in fitted["options"]]
    allowed = (*plans.OPTIONS, *plans.MORE * (n > plans.LONG))
    assert options == list(allowed) and set(plans.rows_by_head(plan)) <= set(options)


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_it_comes_back_from_a_file_as_it_was(path, tmp_path) -> None:
    plan = SavedPlan.load(path)
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == path.read_bytes()
    again = SavedPlan.load(tmp_path / "plan.json")
    assert again == plan and again.fitted == plan.fitted
    assert Policy.from_json(Policy(plan=path).to_json()).plan == plan


@torch.no_grad()
def test_it_is_followed_at_another_length(bench) -> None:
    model, tokenizer = bench["models"].load_smollm2("cpu", torch.float32)
    ids = tokenizer(bench["models"].judged_texts()["acts"][:8000], return_tensors="pt").input_ids[:, :900]
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
