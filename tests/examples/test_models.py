"""The examples' model, texts and needle prompts; the model is the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from express_compile import record_sites, restore_attention, rewrite_attention


@pytest.fixture(scope="module")
def models() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "bench" / "models.py"
    spec = importlib.util.spec_from_file_location("examples_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2(models: ModuleType):
    return models.load_smollm2("cpu", torch.float32)


def test_the_model_is_the_one_we_say(smollm2) -> None:
    model, _ = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert not model.training and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(135e6, rel=0.01)


def test_long_texts_are_long_enough_and_differ(models: ModuleType, smollm2) -> None:
    _, tokenizer = smollm2
    texts = models.long_texts()
    assert len(texts) >= 4 and len({text[:2000] for text in texts.values()}) == len(texts)
    for name, text in texts.items():
        n = len(tokenizer(text[:60_000]).input_ids)
        assert n >= 8192, name
        assert 3 <= min(len(text), 60_000) / n <= 6, name  # characters per token of prose or code, not of tables


def test_needle_prompts_hold_their_needle_where_they_say(models: ModuleType, smollm2) -> None:
    _, tokenizer = smollm2
    depths = [0.0, 0.5, 1.0]
    cases = models.needle_prompts(tokenizer, 600, depths, n_distractors=3, seed=7)
    assert cases == models.needle_prompts(tokenizer, 600, depths, n_distractors=3, seed=7)
    assert cases != models.needle_prompts(tokenizer, 600, depths, n_distractors=3, seed=8)
    for depth, (prompt, answer) in zip(depths, cases, strict=True):
        assert 600 - 32 <= len(prompt) + len(answer) <= 600 and len(answer) == 7
        number = tokenizer.decode(answer)
        text = tokenizer.decode(prompt)
        assert number.isdigit() and text.count(number) == 1 and text.count("The special magic number for") == 5
        lines = text.splitlines()[1:-1]
        (place,) = [i for i, line in enumerate(lines) if number in line]
        assert place / (len(lines) - 1) == pytest.approx(depth, abs=0.2)
        assert text.endswith("mentioned in the provided text is: ")
    with pytest.raises(ValueError, match=r"depths=\[1.5\]"):
        models.needle_prompts(tokenizer, 600, [1.5], 0, 0)
    with pytest.raises(ValueError, match="n_distractors=-1"):
        models.needle_prompts(tokenizer, 600, [0.5], -1, 0)
    with pytest.raises(ValueError, match="n_tokens=50: the question alone needs"):
        models.needle_prompts(tokenizer, 50, [0.5], 0, 0)


@torch.no_grad()
def test_needles_and_rewriting_on_the_real_model(models: ModuleType, smollm2) -> None:
    """Exact attention finds the needle; Express is exact while the text fits; with tiny parts it forgets it."""
    model, tokenizer = smollm2
    ((prompt, answer),) = models.needle_prompts(tokenizer, 480, [0.4], 0, seed=0)
    ids = torch.tensor([prompt + answer[:-1]])

    def logits() -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=len(answer)).logits[0]

    exact = logits()
    assert exact.argmax(-1).tolist() == answer
    rewrite_attention(model, methods=["express"], budget=128, sinks=4, window=16)  # everything fits into 4 s rows
    with record_sites() as sites:
        fits = logits()
    assert [site.verdict for site in sites] == ["rewritten"] * 30
    assert [site.module for site in sites] == [f"model.layers.{i}.self_attn" for i in range(30)]
    assert (fits - exact).abs().max() < 1e-3
    rewrite_attention(model, methods=["express"], budget=4, sinks=4, window=16, protected=0)
    assert logits().argmax(-1).tolist() != answer
    assert torch.equal(restore_attention(model)(ids, use_cache=False, logits_to_keep=len(answer)).logits[0], exact)


def test_a_missing_model_says_how_to_get_it(models: ModuleType, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("EXPRESS_SMOLLM2", str(tmp_path / "none.gguf"))
    with pytest.raises(FileNotFoundError, match=r"EXPRESS_SMOLLM2='.*none.gguf': must be the path of a .gguf file"):
        models.load_smollm2("cpu", torch.float32)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"")
    monkeypatch.setenv("EXPRESS_SMOLLM2", str(file))
    assert models.smollm2_file() == file
    monkeypatch.delenv("EXPRESS_SMOLLM2")

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match="make models.*EXPRESS_SMOLLM2"):
        models.load_smollm2("cpu", torch.float32)
