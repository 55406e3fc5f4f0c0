"""Budgets per layer: what is measured on a tiny model, and what is made of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from express_compile.core.sites import record_sites
from express_compile.core.spec import layer_key
from express_compile.kernels import santa as S
from express_compile.quality.draws import allocate, measure_layers
from express_compile.routes.eager import is_rewritten, restore_attention, rewrite_attention

PATHS = [f"model.layers.{i}.self_attn" for i in range(3)]


@pytest.fixture(scope="module")
def model(listening_model):
    return listening_model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(97, (1, 120), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured(model, ids):
    return measure_layers(model, [ids], draws=16, steps=4, seeds=4)


def test_what_is_measured(model, ids, measured):
    assert list(measured["layers"]) == PATHS and not is_rewritten(model)
    found = [measured["layers"][path] for path in PATHS]
    assert 0 < 5 * found[0]["kl"] < found[1]["kl"] and abs(found[2]["kl"]) < 1e-9, "nobody listens to the last layer"
    assert all(0.8 < x["slope"] < 2.5 for x in found), "variance falls about as 1/S"
    assert all(x["variance"] > 0 for x in found)


def test_the_measured_variance_is_that_of_decoding(model, ids, measured):
    """By 200 draws of the first layer's own tensors, one query at a time: within 10%."""
    seen = []
    original = S.santa_reference
    rewrite_attention(model, methods=["santa"], budget=16)
    try:
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            cache = model(ids[:, :116]).past_key_values
            patch.setattr(S, "santa_reference", lambda *a: seen.append(a[0]) or original(*a))
            model(ids[:, 116:117], past_key_values=cache)
    finally:
        restore_attention(model)
    call, draws, errors = replace(seen[0], layer=layer_key(PATHS[0])), torch.full((4,), 16), []
    q, k, v, scale = call.query, call.key, call.value, call.scale
    truth, _ = original(call, None)
    for seed in range(200):
        out, _ = original(replace(call, seed=torch.tensor(seed)), draws)
        errors.append((out - truth).square().sum(-1).mean())
    p, _ = S.probabilities(q, k, S.visible_keys(1, 1, 117, None, None, q.device), scale)
    first_step = S.variance(p, v, draws, "sys", True).mean()
    assert torch.stack(errors).mean() / first_step == pytest.approx(1, abs=0.1)
    assert measured["layers"][PATHS[0]]["variance"] == pytest.approx(
        first_step.item(), rel=0.3
    )  # the mean of four steps


def test_allocation(measured):
    draws = allocate(measured, 96)
    assert sum(draws.values()) == 96 and draws[PATHS[2]] <= 2 < draws[PATHS[0]] < draws[PATHS[1]]
    assert draws == allocate(json.loads(json.dumps(measured)), 96)
    layers = {name: {"kl": kl, "slope": 1.0, "variance": 1.0} for name, kl in (("a", 4.0), ("b", 1.0), ("c", 0.0))}
    assert allocate({"draws": 8, "layers": layers}, 33) == {"a": 21, "b": 11, "c": 1}  # sqrt(4) : sqrt(1)
    loss = lambda S: sum(layers[x]["kl"] / n for x, n in S.items())  # noqa: E731
    best = allocate({"draws": 8, "layers": layers}, 60)
    assert loss(best) < 0.8 * loss(dict.fromkeys("abc", 20))
    with pytest.raises(ValueError, match="total=2: must be at least one draw for each of 3 layers"):
        allocate(measured, 2)
    with pytest.raises(ValueError, match=r"beta=-1.5: must be above -1"):
        allocate(measured, 96, beta=-1.5)


def test_the_budgets_are_used(model, ids, measured):
    """KL of a step over 40 seeds: the allocation beats the same number of draws spread evenly."""
    draws = allocate(measured, 48)
    with torch.no_grad():
        truth = model(ids).logits[0, -1].double().log_softmax(-1)
        cache = model(ids[:, :-1]).past_key_values

        def kl(**options):
            total = 0.0
            for seed in range(40):
                rewrite_attention(model, methods=["santa"], seed=seed, method_options={"santa": options})
                with record_sites() as sites:
                    logits = model(ids[:, -1:], past_key_values=cache).logits[0, -1].double().log_softmax(-1)
                assert {site.method for site in sites} == {"santa"}
                cache.crop(-1)
                total += (truth.exp() * (truth - logits)).sum().item() / 40
            restore_attention(model)
            return total

        assert 0 < kl(draws=draws) < 0.9 * kl(draws=16)


def test_wrong_arguments(model, ids):
    with pytest.raises(ValueError, match=r"texts: ids of shape \(1, 120\); must be \[1, n\] with n at least 136"):
        measure_layers(model, [ids], draws=64)
    assert not is_rewritten(model)
    with pytest.raises(ValueError, match="steps=17: must be from 1 to 16"):
        measure_layers(model, [ids], steps=17)
    for words, changes in (
        ("texts: a Tensor; must be several texts", {"texts": ids}),
        ("texts: a int; must be tensors", {"texts": [5]}),
        ("draws=1.0: must be of type int", {"draws": 1.0}),
        ("seeds=None: must be of type int", {"seeds": None}),
    ):
        with pytest.raises(TypeError, match=words):
            measure_layers(model, **{"texts": [ids], **changes})
    for name in ("draws", "seeds", "steps"):
        with pytest.raises(ValueError, match=f"{name}=0: must be from 1"):
            measure_layers(model, [ids], **{name: 0})
    with pytest.raises(TypeError, match="measured=5: must be what measure_layers returned"):
        allocate(5, 8)
    with pytest.raises(ValueError, match="texts: must hold at least one text"):
        measure_layers(model, [])
    rewrite_attention(model, methods=["santa"])
    with pytest.raises(ValueError, match=r"restore_attention\(model\) first"):
        measure_layers(model, [ids])
    restore_attention(model)
