"""The examples of one screen: each runs, and what it prints is true."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Runs an example in this process, after ``change(module)``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = []

    def main(name: str, *arguments: str, change: Callable[[ModuleType], None] = lambda module: None) -> None:
        names.append(name)
        module = importlib.import_module(name)
        change(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    yield main
    for name in names:
        sys.modules.pop(name, None)


def test_embeddings_are_nearer_than_truncated_ones_and_the_more_keys_the_nearer(run, capsys) -> None:
    means = {}
    for budget in (64, 256):
        run("encoder", "--budget", str(budget), "--passages", "7")
        out = capsys.readouterr().out
        assert "6 attention sites: 6 rewritten, 0 exact, 0 refused" in out and "(6 sites)" in out
        found = re.findall(r"^(Thinformer|first).*?(\d\.\d{3})  (\d\.\d{3})$", out, re.MULTILINE)
        for name, mean, smallest in found:
            assert 0.3 < float(smallest) <= float(mean) < 1
            means[name, budget] = float(mean)
    assert means["Thinformer", 256] > means["first", 256] and means["Thinformer", 64] > means["first", 64]
    assert means["Thinformer", 256] > means["Thinformer", 64] + 0.1


def test_generation_samples_every_step_and_with_enough_draws_the_text_is_exact(run, capsys) -> None:
    def two_layers(module: ModuleType) -> None:
        model, tokenizer = module.load_smollm2("cpu", torch.float32)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        module.load_smollm2 = lambda *_: (model, tokenizer)

    run("generate", "--prompt", "200", "--tokens", "6", "--draws", "16", change=two_layers)
    out = capsys.readouterr().out
    assert "exact:" in out and "SANTA, 16 draws:" in out and out.count(" s)") == 2
    # two layers: a prefill that stays exact, then a step for each of the other 5 tokens
    assert "10 of 12 calls of attention sampled" in out
    run("generate", "--prompt", "200", "--tokens", "6", "--draws", "512")  # the same model; more draws than keys
    assert "the same text for 6 of 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("encoder", ("--budget", "512"), "--budget=512: must be from 4 to 511"),
        ("encoder", ("--passages", "0"), "--passages=0: must be from 1 to 42"),
        ("generate", ("--tokens", "0"), "--tokens=0: must be from 1 to 7400"),
        ("generate", ("--draws", "5000"), "--draws=5000: must be from 1 to 4096"),
    ],
)
def test_bad_arguments_are_named(run, capsys, name: str, arguments: tuple[str, str], words: str) -> None:
    with pytest.raises(SystemExit):
        run(name, *arguments)
    assert words in capsys.readouterr().err
