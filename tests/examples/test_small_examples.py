"""The examples of one screen: each runs, and what it prints is true."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs an example in this process; names of its module can be replaced."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = []

    def main(name: str, *arguments: str, **replaced: object) -> None:
        names.append(name)
        module = importlib.import_module(name)
        for key, value in replaced.items():
            monkeypatch.setattr(module, key, value)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    yield main
    for name in names:
        sys.modules.pop(name, None)


def test_embeddings_are_nearer_than_truncated_ones_and_the_more_keys_the_nearer(run, capsys) -> None:
    means = {}
    for budget in (64, 256):
        run("encoder", "--budget", str(budget), "--passages", "3")
        out = capsys.readouterr().out
        assert "6 attention sites: 6 rewritten, 0 exact, 0 refused" in out and "(6 sites)" in out
        found = re.findall(r"^(Thinformer|first).*?(\d\.\d{3})  (\d\.\d{3})$", out, re.MULTILINE)
        for name, mean, smallest in found:
            assert 0.3 < float(smallest) <= float(mean) < 1
            means[name, budget] = float(mean)
    assert means["Thinformer", 256] > means["first", 256] and means["Thinformer", 64] > means["first", 64]
    assert means["Thinformer", 256] > means["Thinformer", 64] + 0.1


class Tokenizer:
    """A token per letter, in place of SmolLM2's, which takes a quarter of a minute to load."""

    eos_token_id = 0

    def __call__(self, text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[ord(x) % 97 for x in text[:5000]]]))

    def decode(self, ids: torch.Tensor, **_: object) -> str:
        return "".join(chr(97 + int(x) % 26) for x in ids)


@pytest.fixture
def load(listening_model: torch.nn.Module) -> Callable[..., tuple[torch.nn.Module, Tokenizer]]:
    return lambda device, dtype: (listening_model, Tokenizer())


def test_generation_samples_every_step_and_with_enough_draws_the_text_is_exact(run, capsys, load) -> None:
    run("generate", "--prompt", "200", "--tokens", "6", "--draws", "4", load_smollm2=load)
    few = capsys.readouterr().out
    assert few.index("exact:") < few.index("ExpressCache(") < few.index("SANTA, 4 draws:")
    assert few.count(" s to read, ") == 3
    # three layers: a prefill that stays exact, then a step for each of the other 5 tokens
    assert "15 of 18 calls of attention sampled" in few
    run("generate", "--prompt", "200", "--tokens", "6", "--draws", "512", load_smollm2=load)  # more draws than keys
    assert capsys.readouterr().out.count("the same text for 6 of 6 tokens") == 2
    assert int(re.findall(r"the same text for (\d) of 6", few)[1]) < 6


def test_generation_from_the_rows_of_a_plan_says_what_it_holds(run, capsys, load) -> None:
    found = {}
    for recent in (160, 300):
        arguments = ("--prompt", "500", "--tokens", "12", "--budget", "16", "--recent", str(recent))
        run("generate", *arguments, load_smollm2=load)
        out = capsys.readouterr().out
        rows = [int(x) for x in re.findall(r"tokens/s, (\d+) rows per KV head, \d+\.\d MB\)", out)]
        found[recent] = rows, int(re.search(r"the same text for (\d+) of 12", out)[1])
        assert f"3 layers: 16 sinks + {recent} recent + 16 thinned" in out
        assert rows[0] == 511 and 16 + recent < rows[1] < 16 + recent + 6 * 16 + 2
    assert found[300][0][1] > found[160][0][1] and found[300][1] >= found[160][1]


def test_generation_reads_the_end_of_a_file(run, capsys, load, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 50 + "abcdefghijklmnopqrstuvwxyz")
    run("generate", "--file", str(tmp_path / "text"), "--prompt", "30", "--tokens", "2", load_smollm2=load)
    out = capsys.readouterr().out
    # Tokenizer counts letters from the a of ASCII, modulo 97
    assert out.startswith("... abcdefghijklmnopqrstuvwxyz"[:4] + "ghijklmnopqrstuvwxyz")
    assert "the same text for 2 of 2 tokens" in out and out.count("31 rows per KV head") == 2


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("encoder", ("--budget", "512"), "--budget=512: must be from 4 to 511"),
        ("encoder", ("--passages", "0"), "--passages=0: must be from 1 to 42"),
        ("generate", ("--tokens", "0"), "--tokens=0: must be from 1 to 6992"),
        ("generate", ("--draws", "5000"), "--draws=5000: must be from 0 to 4096"),
    ],
)
def test_bad_arguments_are_named(run, capsys, name: str, arguments: tuple[str, str], words: str) -> None:
    with pytest.raises(SystemExit):
        run(name, *arguments)
    assert words in capsys.readouterr().err
