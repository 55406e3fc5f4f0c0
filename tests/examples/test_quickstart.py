"""The main job, end to end on two layers of the real SmolLM2; what it prints is read back as numbers."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"
INSTALLED = any(importlib.metadata.distributions(name="express-compile"))


@pytest.mark.skipif(not INSTALLED, reason="backend='express' by name needs express-compile installed")
def test_the_table_and_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["--tokens", "1400", "--needles", "4", "--layers", "2", "--compile", "--picture", str(picture)]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.compile, plan: first run, which compiles, " in done.stdout  # progress, in a log too
    assert "it/s" not in done.stderr  # no bars of other packages between ours
    assert max(map(len, done.stdout.splitlines())) <= 120 or str(picture) in done.stdout
    lines = [line.strip("│ ") for line in done.stdout.splitlines() if line.startswith("│")]
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s*│\s*", line) for line in lines)}
    runs = ["plan per KV head", "StreamingLLM", "uniform Express", "torch.compile, plan"]
    assert [name for name in rows if name != "torch.compile, inductor"] == ["exact", *runs]
    for name in runs:
        sites, kept, kl, agree, perplexity, seconds, needles = rows[name]
        assert sites == "2/2"
        seen, of = map(int, kept.split(" / "))
        assert of == 1400 and 772 <= seen <= 780, "as many rows as the plan, or hardly fewer"
        assert 1e-6 < float(kl) < 0.1
        assert 0.9 < float(agree) <= 1
        approximate, exact = map(float, re.fullmatch(r"(\S+) \((\S+)\)", perplexity).groups())
        assert approximate == pytest.approx(exact, rel=0.1) and exact > 1
        assert float(seconds) > 0 and needles == "-"  # two layers find no needle
    assert rows["exact"][:2] == ["-", "1400 / 1400"]
    # eager and compiled use the same random numbers, so they forget the same; other policies do not
    kl = {name: float(rows[name][2]) for name in runs}
    assert kl[runs[0]] == pytest.approx(kl[runs[3]], rel=0.1)
    assert len({rows[name][2] for name in runs[:3]}) == 3
    assert 0 <= float(re.search(r"differ from rewrite_attention by (\S+)\.", done.stdout)[1]) < 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_the_committed_outcome_shows_the_plan_beside_streamingllm() -> None:
    text = (SCRIPT.parent / "bench/results/quickstart-cpu.txt").read_text(encoding="utf-8")
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    rows = {cells[0]: cells[1:] for cells in (re.split(r"\s*│\s*", line) for line in lines)}
    plan, stream = rows["plan per KV head"], rows["StreamingLLM"]
    assert plan[0] == stream[0] == "30/30" and int(stream[1].split()[0]) == pytest.approx(int(plan[1].split()[0]), 0.01)
    assert float(plan[2]) < float(stream[2]) / 3
    found, solved = zip(*(map(int, run[-1].split(" of ")) for run in (plan, stream)), strict=True)
    assert len(set(solved)) == 1 and found[0] > found[1]


def main_of(module: ModuleType, *arguments: str) -> None:
    """Its ``main`` with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        module.main()


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("quickstart")


def test_it_fails_early_and_in_one_sentence(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda: ["inductor"])
    with pytest.raises(SystemExit) as end:
        main_of(script)
    (line,) = end.value.code.splitlines()  # Python writes it to stderr and exits with 1
    assert "pip install -e ." in line and "'express'" in line
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "--layers=0: must be 1 or more"),
        (("--tokens", "1023"), "--tokens=1023: must be at least 1024"),
        (("--needles", "25"), "--needles=25: must be in 0..24"),
        (("--picture", "/no/such/picture.png"), "--picture=/no/such/picture.png: there is no such folder"),
    ],
)
def test_bad_arguments_are_named(script, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(script, *arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and message in err and out == ""
