"""The committed results: the README says what they say, and the bars of the first milestone hold in them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["genesis", "python-data-model", "python-statements", "python-types", "argparse"]


def kl(params: str, task: str = "natural texts") -> float:
    with (ROOT / "examples/results/quality.csv").open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["metric"] == "kl" and row["task"] == task and row["params"] == params and row["n"] == "8192"
        ]
    return float(rows[-1]["value"])


def policy(sinks: int, window: int, halving: str = "balanced", seed: str = "") -> str:
    return f"s=256 sinks={sinks} window={window} protected=0 halving={halving}{seed}"


def test_readme_is_what_the_result_files_say():
    command = [sys.executable, str(ROOT / "examples/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kl_on_natural_texts():
    assert kl(policy(32, 512)) <= 0.16
    for name in TEXTS:
        assert kl(policy(32, 512), f"text:{name}") <= 0.16, name


@pytest.mark.parametrize("task", ["natural texts", "repetitive texts", *(f"text:{name}" for name in TEXTS)])
@pytest.mark.parametrize("halving", ["balanced", "kernel", "uniform"])
def test_a_longer_window_is_better(task, halving):
    none, short, long = (kl(policy(*sizes, halving), task) for sizes in ((0, 0), (32, 32), (32, 512)))
    assert none > short > long


@pytest.mark.parametrize("seed", ["", " seed=1"])
@pytest.mark.parametrize("window", [32, 512])
@pytest.mark.parametrize("task", ["natural texts", "repetitive texts"])
def test_balanced_is_not_worse_than_uniform(window, task, seed):
    assert kl(policy(32, window, seed=seed), task) <= kl(policy(32, window, "uniform", seed), task)
