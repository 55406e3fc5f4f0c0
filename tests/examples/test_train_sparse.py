"""What examples/train_sparse.py trains: the same text, the same weights, and the pattern in every layer."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_sparse

    return train_sparse


def test_the_text_is_the_same_every_time_and_what_is_held_out_is_not_trained_on(example) -> None:
    data, held_out = example.text(20_000)
    again, _ = example.text(20_000)
    assert torch.equal(data, again) and len(data) == len(held_out) == 20_000
    assert bytes(held_out[:500].tolist()) not in bytes(data.tolist())
    first, second = (next(example.windows(data, 64, 2, "cpu")) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (2, 65)


def test_branches_start_smaller_the_deeper_the_model_and_a_model_that_knows_nothing_needs_eight_bits(example) -> None:
    shallow, deep = (example.Model(32, layers, 2, 64) for layers in (2, 8))
    for name in ("attention.out.weight", "down.weight"):
        ratio = shallow.layers[0].get_parameter(name).std() / deep.layers[0].get_parameter(name).std()
        assert ratio.item() == pytest.approx(2, rel=0.1)
    shallow.head.weight.data.zero_()
    x = torch.randint(256, (1, 33))
    assert example.bits_per_byte(shallow, x).item() == pytest.approx(8)


def test_both_runs_learn_and_the_sparse_one_is_sparse(example) -> None:
    args = argparse.Namespace(
        dim=32, layers=1, heads=2, context=48, batch=1, steps=6, lr=1e-2, windows=2, pattern="fixed", stride=8,
        summary=2, combine="merged",
    )  # fmt: skip
    data, held_out = example.text(2_000)
    last = {run: [*example.train(run, args, data, held_out, "cpu")][-1] for run in ("exact", "sparse")}
    assert all(row["tokens"] == 6 * 48 and row["held_out_bpb"] < 7.8 for row in last.values())
    assert last["sparse"]["params"] == "pattern=fixed stride=8 summary=2 combine=merged" and not last["exact"]["params"]
    assert last["sparse"]["held_out_bpb"] != last["exact"]["held_out_bpb"]
    assert math.isclose(last["sparse"]["held_out_bpb"], last["exact"]["held_out_bpb"], rel_tol=0.1)
