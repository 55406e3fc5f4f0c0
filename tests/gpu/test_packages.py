"""A package that AOTInductor made for a GPU, of attention that is rewritten: what it gives here, and in a process of
its own that imports nothing but the ops."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import express_compile.engines.export  # noqa: F401 (registers the ops)
from express_compile import record_sites, rewrite_attention

ROOT = Path(__file__).resolve().parents[2]
# a compiler with its own static libstdc++ (the GPU machine's) makes packages that torch cannot load, of any model
LINKED = {"aot_inductor.custom_op_libs": [":libstdc++.so.6"]}
RUN = """
import sys, torch
import express_compile.engines.export
states, expected = torch.load({data!r})
run = torch._inductor.aoti_load_package({package!r})
assert "transformers" not in sys.modules
print(bool(torch.equal(run(states), expected)))
"""


class Attend(nn.Module):
    """Attention alone: nothing around it that a compiler could round otherwise."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = states.split([8, 2, 2], 1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def states(n: int, device: str = "cuda") -> torch.Tensor:
    return torch.randn(1, 12, n, 64, generator=torch.Generator().manual_seed(n)).to(device, torch.bfloat16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_a_package_gives_the_bits_of_the_model_here_and_in_another_process(dynamic: bool, tmp_path: Path) -> None:
    model = rewrite_attention(Attend().eval(), methods=["express"], budget=128, strict=True)
    shapes = ({2: Dim("n", min=2, max=8192)},) if dynamic else None
    with record_sites() as sites:
        program = torch.export.export(model, (states(4096),), dynamic_shapes=shapes)
    assert [site.method for site in sites] == ["express"]
    package, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=LINKED)
    asked = states(2048 if dynamic else 4096)
    expected = model(asked)
    assert (expected - Attend()(asked)).abs().max() > 1e-3
    assert torch.equal(torch._inductor.aoti_load_package(package)(asked), expected)
    torch.save((asked, expected), data)
    code = RUN.format(data=data, package=package)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "True"
