"""What the processes of these tests have in common: ``python work_x.py RANK RANKS FOLDER`` runs one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.update(TRITON_INTERPRET="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


def run(work: Callable[[int, int, str], dict[str, Any]]) -> None:
    """Initialise gloo by a file, run ``work(rank, ranks, folder)`` and leave what it returns to the test."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    torch.save(work(rank, ranks, str(folder)), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Parts(nn.Linear):
    """A linear layer that one process computes as N would: by parts of its outputs, or as a sum over its inputs."""

    def __init__(self, linear: nn.Linear, parts: int, by_row: bool) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.parts, self.by_row = linear.weight, linear.bias, parts, by_row
        self.out_features, self.in_features = linear.out_features, linear.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.weight.chunk(self.parts, int(self.by_row))
        if not self.by_row:
            biases = [None] * self.parts if self.bias is None else self.bias.chunk(self.parts)
            return torch.cat([nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
        pieces = [nn.functional.linear(part, w) for part, w in zip(x.chunk(self.parts, -1), weights, strict=True)]
        out = pieces[0]
        for piece in pieces[1:]:
            out = out + piece
        return out if self.bias is None else out + self.bias


def in_parts(model: nn.Module, parts: int, by_row: tuple[str, ...], whole: tuple[str, ...] = ()) -> nn.Module:
    """``model`` with its linear layers computed by parts; those named ``by_row`` as sums."""
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name not in whole:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, Parts(module, parts, name in by_row))
    return model
