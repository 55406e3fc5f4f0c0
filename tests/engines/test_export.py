"""Exported programs hold the approximate attention of the model, and give its bits; so do packages compiled of them."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.export import Dim

from express_compile import record_sites, restore_attention, rewrite_attention
from express_compile.core.rows import Rows
from express_compile.engines.export import decompose
from express_compile.kernels.heads import PerHead

ROOT = Path(__file__).resolve().parents[2]
THIN: dict[str, Any] = {
    "methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0,
    "method_options": {"express": {"block": 16}},
}  # fmt: skip
HEADS = {
    "methods": [
        PerHead(
            {
                "model.layers.0.self_attn": [Rows(2, 20), Rows(2, 9, 8, 10)],
                "model.layers.1.self_attn": Rows(2, 9, selected=1),
            },
            block=16,
        )
    ]
}
IDS = torch.randint(3, 50, (2, 120), generator=torch.Generator().manual_seed(0))
PADDING = (torch.arange(120) >= torch.tensor([[0], [37]])).long()
STATES = torch.randn(1, 80, 16, generator=torch.Generator().manual_seed(0))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights so large that attention matters."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


class Language(nn.Module):
    """Logits of a tiny Llama, or the states of a tiny BERT."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        if causal:
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
            self.model = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
        else:
            self.model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4))

    def forward(self, ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        more = {"use_cache": False} if isinstance(self.model, transformers.LlamaModel) else {}
        return self.model(ids, attention_mask=padding, **more).last_hidden_state


class Plain(nn.Module):
    """Attention that is written out, with its mask in a buffer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("shown", torch.tril(torch.ones(160, 160)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        n = x.shape[1]
        scores = q @ k.transpose(-1, -2) / 8**0.5
        weights = scores.masked_fill(self.shown[:n, :n] == 0, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Plain(), Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x + self.a(x))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[torch.Tensor, ...]]] = {
    "express": (Language, THIN, (IDS,)),
    "express, padded": (Language, THIN, (IDS, PADDING)),
    "heads": (Language, HEADS, (IDS,)),
    "thinformer": (lambda: Language(False), {"methods": ["thinformer"], "budget": 16}, (IDS,)),
    "thinformer, padded": (lambda: Language(False), {"methods": ["thinformer"], "budget": 16}, (IDS, PADDING)),
    "written out": (Written, THIN, (STATES,)),
}


def ops(program: torch.export.ExportedProgram) -> list[str]:
    """The ops of ours in a program, in order."""
    return [x.target.name() for x in program.graph.nodes if getattr(x.target, "namespace", "") == "express_compile"]


def rewritten(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    """A rewritten model, what it is called with, and what that gives; which is not what exact attention gives."""
    make, options, args = CASES[name]
    model = build(make)
    exact = model(*args)
    rewrite_attention(model, strict=True, **options)
    expected = model(*args)
    assert (expected - exact).norm() > 1e-2 * exact.norm()
    return model, args, expected


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_program_gives_the_bits_of_the_model_also_saved_and_loaded_and_at_another_length(name, dynamic) -> None:
    model, args, expected = rewritten(name)
    shapes = tuple({1: Dim("n", min=2, max=128)} for _ in args) if dynamic else None
    with record_sites() as sites:
        program = torch.export.export(model, args, dynamic_shapes=shapes)
    assert ops(program) == [f"express_compile::{name.split(',')[0].replace('written out', 'express')}"] * 2
    assert [site.verdict for site in sites] == ["rewritten"] * 2
    assert torch.equal(program.module()(*args), expected)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(*args), expected)
    if dynamic:
        shorter = [x[:, -70:] for x in args]
        assert torch.equal(loaded(*shorter), model(*shorter))


@torch.no_grad()
def test_exporting_changes_nothing_in_the_model() -> None:
    for name in ("express", "written out"):
        model, args, expected = rewritten(name)
        torch.export.export(model, args)
        assert torch.equal(model(*args), expected)
        assert ops(torch.export.export(restore_attention(model), args)) == []


@torch.no_grad()
def test_what_is_refused_is_exact_in_the_program_and_strict_says_so() -> None:
    model = build(Language)
    exact = model(IDS)
    rewrite_attention(model, methods=["thinformer"], budget=16)
    with record_sites() as sites:
        program = torch.export.export(model, (IDS,))
    assert ops(program) == [] and "it is causal" in sites[0].reason
    torch.testing.assert_close(program.module()(IDS), exact)
    for make, args in ((Language, (IDS,)), (Written, (STATES,))):
        model = rewrite_attention(build(make), methods=["thinformer"], strict=True)
        with pytest.raises(ValueError, match="it is causal; Thinformer"):
            torch.export.export(model, args)


@pytest.mark.parametrize("name", ["express", "written out"])
def test_an_export_by_dynamo_says_which_one_keeps_the_rewriting(name) -> None:
    model, args, _ = rewritten(name)
    with pytest.raises(
        RuntimeError, match=r"strict=True\) would lose the rewriting; strict=False, the default, keeps it"
    ):
        torch.export.export(model, args, strict=True)


@torch.no_grad()
def test_a_sliding_window_counts_unless_no_length_is_longer() -> None:
    config = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for window, expected in ((64, []), (200, ["express_compile::express"])):
        model = build(Language)
        model.model = build(lambda w=window: transformers.MistralModel(
            transformers.MistralConfig(**config, num_attention_heads=4, num_key_value_heads=2, sliding_window=w)
        ))  # fmt: skip
        model.forward = lambda ids, model=model.model: model(ids, use_cache=False).last_hidden_state
        rewrite_attention(model, **THIN)
        program = torch.export.export(model, (IDS,), dynamic_shapes=({1: Dim("n", min=2, max=128)},))
        assert ops(program) == expected
        if not expected:  # a model that is called sees of a shorter one that its window hides nothing
            restore_attention(model)
        for ids in (IDS, IDS[:, :50]):
            torch.testing.assert_close(program.module()(ids), model(ids), rtol=1e-5, atol=1e-5)


class Cached(nn.Module):
    """Keeps what it has seen in an object that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, transformers.DynamicCache() if cache is None else out


@torch.no_grad()
def test_objects_that_may_hold_tensors_are_refused_in_the_words_of_the_user() -> None:
    model = rewrite_attention(build(Cached), **THIN)
    with pytest.raises(RuntimeError, match="Cached: returns a DynamicCache, .* use_cache=False"):
        torch.export.export(model, (STATES,))


# ------------------------------------------------------------------------------------------ in plain PyTorch


SHORT = {**THIN, "budget": 4, "sinks": 2, "window": 2}


@pytest.mark.parametrize(
    ("make", "options", "args"),
    [
        (Plain, SHORT, (STATES[:, :48],)),
        (lambda: Language(False), {"methods": ["thinformer"], "budget": 16}, (IDS[:, 80:], PADDING[:, 20:60])),
    ],
    ids=["express", "thinformer, padded"],
)
@torch.no_grad()
def test_a_decomposed_program_has_no_op_of_ours_and_gives_the_same_numbers(make, options, args) -> None:
    model = build(make)
    exact = model(*args)
    rewrite_attention(model, **options)
    program = torch.export.export(model, args)
    assert ops(program) and ops(plain := decompose(program)) == []
    assert (model(*args) - exact).norm() > 1e-2 * exact.norm()
    torch.testing.assert_close(plain.module()(*args), model(*args), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_decomposed_says_why() -> None:
    model, args, _ = rewritten("written out")
    program = torch.export.export(model, args, dynamic_shapes=({1: Dim("n", min=2, max=128)},))
    with pytest.raises(RuntimeError, match="express_compile.express.default: its sizes are symbols; .* dynamic_shapes"):
        decompose(program)
    step = build(Plain)
    step.forward = lambda x: F.scaled_dot_product_attention(x[:, :, -1:], x, x)
    program = torch.export.export(rewrite_attention(step, methods=["santa"]), (STATES[None],))
    assert ops(program) == ["express_compile::santa"]
    with pytest.raises(RuntimeError, match="express_compile.santa.default: .* is not written in plain PyTorch"):
        decompose(program)


# ------------------------------------------------------------------------------------------------ AOTInductor

RUN = """
import sys, torch
x, expected = torch.load({data!r})
def run():
    return float((torch._inductor.aoti_load_package({package!r})(x) - expected).abs().max())
if {imports!r}:
    try:
        run()
    except RuntimeError as error:
        assert "Could not find schema for express_compile::express" in str(error), error
    else:
        raise AssertionError("it ran without the ops")
{imports}
print(run())
assert ("express_compile" in sys.modules) is bool({imports!r}), "it was imported"
"""
ALONE = {"aot_inductor.precompile_headers": False}  # they take longer than they spare two packages


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("imports", ["import express_compile.engines.export", ""], ids=["ops", "plain"])
@torch.no_grad()
def test_a_compiled_package_runs_in_another_process(imports, tmp_path) -> None:
    """With our ops, for which it imports them, at any length; in plain PyTorch, where it never sees us."""
    model = build(Plain)
    x = STATES[:, :32]
    rewrite_attention(model, **SHORT)
    shapes = ({1: Dim("n", min=2, max=128)},) if imports else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    package, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    program = program if imports else decompose(program)
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=ALONE)
    asked = STATES if imports else x
    torch.save((asked, model(asked)), data)
    code = RUN.format(imports=imports, data=data, package=package)
    folder = ROOT if imports else tmp_path
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=300)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1e-5
