"""Plans per KV head in a model: by module paths, by globs and from saved plans, on both routes, with the same rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from express_compile import Policy, SavedPlan, SavedSite, explain, record_sites, restore_attention, rewrite_attention
from express_compile.core.rows import Rows
from express_compile.kernels.heads import PerHead

WINDOW, CORE, BLOCKS, WHOLE = Rows(2, 20), Rows(2, 9, 8, 10), Rows(2, 9, selected=1), Rows(everything=True)
PLAN = {"model.layers.0.self_attn": [WINDOW, CORE], "model.layers.1.self_attn": [BLOCKS, WHOLE]}
OWN = PerHead(PLAN, block=16)
NORMS = {"rtol": 1e-4, "atol": 1e-4}  # the model's norms compute in float32, and Inductor fuses them
IDS = torch.randint(3, 50, (2, 200), generator=torch.Generator().manual_seed(0))


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().double()


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    return model(IDS, use_cache=False, **more).logits


def rewritten(**options: Any) -> torch.Tensor:
    return logits(rewrite_attention(llama(), strict=True, **options))


EXPECTED = rewritten(methods=[OWN])


def test_both_routes_give_every_head_its_rows() -> None:
    exact = logits(llama())
    assert (EXPECTED - exact).norm() > 0.05 * exact.norm()
    torch._dynamo.reset()
    compiled = torch.compile(llama(), backend="express", options={"methods": [OWN], "strict": True})
    torch.testing.assert_close(logits(compiled), EXPECTED, **NORMS)


def test_both_routes_and_a_saved_plan_give_every_query_head_its_rows() -> None:
    rows = {"model.layers.0.self_attn": [WINDOW, CORE, CORE, WINDOW], "model.layers.1.self_attn": [BLOCKS, WHOLE] * 2}
    own = PerHead(rows, block=16)
    model = rewrite_attention(llama(), strict=True, methods=[own])
    with record_sites() as sites:
        found = logits(model)
    assert [list(x.rows) for x in sites] == list(rows.values()) and {x.saved.per for x in sites} == {"query head"}
    assert (found - EXPECTED).norm() > 0.01 * EXPECTED.norm(), "query heads of one KV head differ"
    torch._dynamo.reset()
    compiled = torch.compile(llama(), backend="express", options={"methods": [own], "strict": True})
    torch.testing.assert_close(logits(compiled), found, **NORMS)
    plan = SavedPlan.from_json(SavedPlan(tuple(x.saved for x in sites)).to_json())
    assert torch.equal(rewritten(plan=plan), found)


def test_globs_say_the_same_as_paths() -> None:
    modules = {f"*.{i}.self_attn": PerHead(rows, block=16) for i, rows in enumerate(PLAN.values())}
    assert torch.equal(rewritten(modules=modules), EXPECTED)


def test_heads_that_see_everything_leave_the_model_as_it_is() -> None:
    torch.testing.assert_close(rewritten(methods=[PerHead(WHOLE)]), logits(llama()))


def test_a_padded_batch_gives_what_its_sequences_give_alone() -> None:
    model = rewrite_attention(llama(), methods=[OWN], strict=True)
    mask = torch.ones_like(IDS)
    mask[0, :60] = 0
    padded = logits(model, attention_mask=mask)
    with torch.no_grad():
        alone = model(IDS[:1, 60:], use_cache=False).logits
    # rotary angles, float32 in any model, are those of places 60 further on
    torch.testing.assert_close(padded[:1, 60:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded[1:], EXPECTED[1:])


def test_a_prefill_in_chunks_that_begin_where_blocks_do_gives_what_one_in_a_piece_gives() -> None:
    """Every head has blocks of its own; here all of them begin at multiples of 16, minus 5."""
    rows = [Rows(2, 9, 8), Rows(2, 9, selected=1)]
    model = rewrite_attention(llama(), methods=[PerHead(rows, block=16)], strict=True)
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :139])
        second = model(IDS[:, 139:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)


def test_generate_decodes_from_the_full_cache_after_a_planned_prefill() -> None:
    model = rewrite_attention(llama(), plan=explain(llama(), IDS[:1], methods=[OWN]).plan)
    with record_sites() as sites, torch.no_grad():
        ids = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert [site.method for site in sites] == ["heads"] * 2 + ["exact"] * 4
    assert "decoding 1 token" in sites[-1].reason
    with torch.no_grad():  # the prefill by the plan, and then steps of the model as it is over what it left
        prefill = model(IDS[:1])
        restore_attention(model)
        cache, tokens = prefill.past_key_values, [prefill.logits[:, -1:].argmax(-1)]
        for _ in range(2):
            tokens.append(model(tokens[-1], past_key_values=cache).logits.argmax(-1))
    assert cache.get_seq_length() == 202 and torch.equal(ids[:, 200:], torch.cat(tokens, 1))


def test_a_saved_plan_has_the_rows_of_every_head_and_gives_them_again(tmp_path) -> None:
    report = explain(llama(), IDS, methods=[OWN])
    assert [site.rows for site in report.plan.sites] == [tuple(rows) for rows in PLAN.values()]
    assert all(list(site.options["method_options"]["heads"]["rows"]) == [site.module] for site in report.plan.sites)
    report.plan.save(tmp_path / "plan.json")
    assert SavedPlan.load(tmp_path / "plan.json") == report.plan
    assert torch.equal(rewritten(plan=tmp_path / "plan.json"), EXPECTED)
    torch._dynamo.reset()
    options = {"plan": str(tmp_path / "plan.json"), "strict": True}
    torch.testing.assert_close(logits(torch.compile(llama(), backend="express", options=options)), EXPECTED, **NORMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_plan_is_followed_in_another_dtype(dtype: torch.dtype) -> None:
    plan = explain(llama(), IDS, methods=[OWN]).plan
    found = []
    for options in ({"plan": plan}, {"methods": [OWN]}):
        with record_sites() as sites:
            found.append(logits(rewrite_attention(llama().to(dtype), strict=True, **options)))
        assert [site.rows for site in sites] == [tuple(rows) for rows in PLAN.values()]
    assert found[0].dtype == dtype and torch.equal(*found), "as if it were written for that dtype"
    # near ties are decided otherwise, by few tokens of a coreset
    assert (found[0].double() - EXPECTED).norm() < {torch.float32: 1e-3, torch.bfloat16: 0.2}[dtype] * EXPECTED.norm()


def test_a_saved_plan_stays_with_a_model_that_moves_to_another_device() -> None:
    """Rewritten without memory for its weights, as large models are made, and then filled."""
    plan = SavedPlan.from_json(explain(llama(), IDS, methods=[OWN]).plan.to_json())
    with torch.device("meta"):
        model = llama()
    rewrite_attention(model, plan=plan, strict=True)
    assert {x.device.type for x in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    whole = llama()
    for own, others in ((model.named_parameters, whole.named_parameters), (model.named_buffers, whole.named_buffers)):
        others = dict(others())
        for name, x in own():
            x.data.copy_(others[name])
    assert torch.equal(logits(model), EXPECTED)
    op = torch.ops.express_compile.heads
    sizes = (2, 4, 200, 8), (2, 2, 200, 8), (2, 2, 200, 8)
    given = [torch.empty(size, device="meta") for size in sizes]
    out, lse = op(*given, None, torch.zeros((), dtype=torch.int64), 0.3, 0, **plan.sites[0].params)
    assert (out.device.type, out.shape, lse.shape) == ("meta", sizes[0], sizes[0][:3])


def test_an_entry_of_a_plan_needs_no_options_beside_its_rows() -> None:
    facts = {"mask": "causal", "H": 4, "H_kv": 2, "D": 8, "Dv": 8}
    sites = [SavedSite(path, 0, "heads", "rewritten", facts=facts, rows=tuple(x)) for path, x in PLAN.items()]
    plan = SavedPlan.from_json(SavedPlan(tuple(sites)).to_json())
    assert torch.equal(rewritten(plan=plan), rewritten(methods=[PerHead(PLAN)]))
    data = json.loads(plan.to_json())
    data["sites"][0]["rows"].append({"recent": 3})
    with pytest.raises(ValueError, match="rows lists 3 heads, the site has 2 KV heads and 4 query heads"):
        rewritten(plan=SavedPlan.from_json(json.dumps(data)))


def test_what_a_plan_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"method_options\['heads'\]\['rows'\]\['model.layers.7.self_attn'\] match"):
        rewritten(methods=[PerHead({**PLAN, "model.layers.7.self_attn": [WINDOW]})])
    with pytest.raises(ValueError, match="its rows have no entry for this module"):
        rewritten(methods=[PerHead({"model.layers.0.self_attn": [WINDOW]})])
    with pytest.raises(ValueError, match="rows lists 3 heads, the site has 2 KV heads and 4 query heads"):
        rewritten(methods=[PerHead([WINDOW] * 3)])


def test_a_policy_survives_json_and_a_model_its_restoring() -> None:
    policy = Policy(methods=[OWN], modules={"lm_head": PerHead([WINDOW])})
    assert Policy.from_json(policy.to_json()) == policy
    model = rewrite_attention(llama(), methods=[OWN])
    restore_attention(model)
    assert torch.equal(logits(model), logits(llama()))


def test_training_goes_through_every_head() -> None:
    model = rewrite_attention(llama(), methods=[OWN], strict=True)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "self_attn" in name]
    assert len(grads) == 8 and all(g.isfinite().all() and g.norm() > 0 for g in grads)
