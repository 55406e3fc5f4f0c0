"""Express in whole models: eager and compiled agree, the seed decides, and exact comes back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from express_compile import Policy, explain, restore_attention, rewrite_attention

OPTIONS = dict(methods=["express"], budget=8, sinks=2, window=9, protected=0, method_options={"express": {"block": 16}})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # larger logits than at initialisation, so that attention matters
        parameter.data.mul_(3)
    return model


def inputs(padding: str | None = None) -> dict[str, torch.Tensor]:
    ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :80] = 0
    elif padding == "right":
        mask[0, -80:] = 0
    return {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if padding else {})


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("extra", [{}, {"protected": 20}, {"seed": 5, "halving": "kernel"}])
@torch.no_grad()
def test_eager_and_compiled_agree(padding, extra):
    model, batch = llama(), inputs(padding)
    real = batch.get("attention_mask", torch.ones(2, 300)).bool()
    exact = model(**batch).logits
    compiled = torch.compile(model, backend="express", options={**OPTIONS, **extra}, fullgraph=True)
    from_graph = compiled(**batch).logits
    rewrite_attention(model, **{**OPTIONS, **extra})
    eager = model(**batch).logits
    torch.testing.assert_close(eager[real], from_graph[real], rtol=1e-4, atol=1e-4)
    assert (eager - exact)[real].abs().mean() > 1e-2, "and neither is exact attention"
    restore_attention(model)
    assert torch.equal(model(**batch).logits, exact)


@torch.no_grad()
def test_the_seed_decides():
    model, batch = llama(), inputs()
    rewrite_attention(model, **OPTIONS, seed=1)
    first, again = model(**batch).logits, model(**batch).logits
    assert torch.equal(first, again)
    rewrite_attention(model, **OPTIONS, seed=2)
    assert not torch.equal(model(**batch).logits, first)
    rewrite_attention(model, **OPTIONS, seed=None)
    torch.manual_seed(3)
    drawn, other = model(**batch).logits, model(**batch).logits
    torch.manual_seed(3)
    assert torch.equal(model(**batch).logits, drawn) and not torch.equal(other, drawn)


@torch.no_grad()
def test_drawn_seeds_in_a_graph():
    model, batch = llama(), inputs()
    compiled = torch.compile(model, backend="express", options={**OPTIONS, "seed": None}, fullgraph=True)
    torch.manual_seed(3)
    drawn, other = compiled(**batch).logits, compiled(**batch).logits
    torch.manual_seed(3)
    assert torch.equal(compiled(**batch).logits, drawn) and not torch.equal(other, drawn)


def test_training_through_a_rewritten_model():
    model, batch = llama(), inputs()
    rewrite_attention(model, **OPTIONS)
    eager = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, model.model.embed_tokens.weight)[0]
    restore_attention(model)
    exact = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, model.model.embed_tokens.weight)[0]
    compiled = torch.compile(model, backend="express", options=OPTIONS)
    graph = torch.autograd.grad(compiled(**batch, labels=batch["input_ids"]).loss, model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(eager, graph, rtol=1e-3, atol=1e-5)
    assert (eager - exact).norm() > 1e-2 * exact.norm()


@torch.no_grad()
def test_without_named_methods_short_sequences_stay_exact():
    """Where Express is not predicted to win, or nothing is known of this machine, nobody gets it without asking."""
    model, batch = llama(), inputs()
    exact = model(**batch).logits
    report = explain(model, example_kwargs=batch)
    assert {site.verdict for site in report.sites} == {"exact"}
    assert all("exact attention" in site.reason or "is not known" in site.reason for site in report.sites)
    compiled = torch.compile(model, backend="express")
    torch.testing.assert_close(compiled(**batch).logits, exact, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_explain_says_the_same_of_both_ways():
    model, batch = llama(), inputs("left")
    compiled = explain(model, example_kwargs=batch, **OPTIONS)
    eager = explain(rewrite_attention(model, **OPTIONS), example_kwargs=batch)
    for report in (compiled, eager):
        assert [site.module for site in report.sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
        assert {(site.method, site.verdict, site.mask) for site in report.sites} == {
            ("express", "rewritten", "causal, key padding")
        }


def test_what_a_policy_may_say():
    assert Policy().of("express").protected == 256
    with pytest.raises(ValueError, match="methods=.*unknown method 'expres'; allowed are express, thinformer"):
        rewrite_attention(llama(), methods=["expres"])
    with pytest.raises(ValueError, match="halving='best': allowed are kernel, balanced, uniform"):
        rewrite_attention(llama(), methods=["express"], halving="best")(**inputs())
