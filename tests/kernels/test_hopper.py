"""The kernel for Hopper without a GPU: which Tritons run it, and what theirs make of it. tests/gpu has its results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from express_compile.kernels.attend import hopper

pytestmark = pytest.mark.skipif(hopper.gluon is None, reason="no Triton with Gluon on this platform")

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, re, sys
from pathlib import Path
import device_code
device_code.use_triton(Path(sys.argv[1]), "3.")
import device_calls, torch
device_calls.TOKENS, device_calls.ROWS, device_calls.EXPRESS["budget"] = 1024, 64, 64
known = {}
with device_calls.recorded() as launches:
    device_calls.CALLS["express, uniform"](torch.bfloat16, 128)
row = device_code.compiled(next(x for x in launches if x.kernel.fn.__module__.endswith(".hopper")), known)
ptx = row.pop("made").asm["ptx"]
for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "wgmma.wait_group.sync.aligned 1;", "setmaxnreg.inc"):
    row[name] = len(re.findall(re.escape(name).replace(r"\\ ", r"\\s+"), ptx))
print(json.dumps(row))
"""


def test_it_compiles_with_the_triton_that_is_installed_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """With its own instructions: two groups of warps have four products of eight steps each, and of those of a tile
    the one with the values goes on while they wait for the one with the keys."""
    installed = Path(hopper.triton.__file__).parents[1]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "examples" / "bench")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPILE, str(installed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert (found["error"], found["warnings"]) == ("", "")
    assert (found["registers"], found["wgmma.mma_async"]) == (168, 2 * 4 * 8)
    assert found["wgmma.wait_group.sync.aligned 1;"] == 2 and found["cp.async.bulk.tensor"] >= 2
    assert found["shared"] < 168 << 10 and found["spilled"] <= 300  # of 276 most by far once in a job


@pytest.fixture
def of_hopper(monkeypatch: pytest.MonkeyPatch) -> tuple[SimpleNamespace, ...]:
    """Query, key and value that are on a Hopper as it seems."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    x = torch.empty(1, 2, 256, 128, dtype=torch.bfloat16)
    given = dict(is_cuda=True, element_size=x.element_size, shape=x.shape, stride=x.stride, device=x.device)
    return (SimpleNamespace(**given),) * 3


@pytest.mark.parametrize("version", ["3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0"])
def test_the_tritons_that_it_was_run_with_run_it_and_others_the_plain_kernel(
    of_hopper: tuple, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper.triton, "__version__", version)
    assert hopper.takes(*of_hopper, 128) == (version in ("3.6.0", "3.9.0")) and not hopper.takes(*of_hopper, 64)


def imported_again() -> ModuleType:
    spec = importlib.util.spec_from_file_location("express_compile.kernels.attend.hopper_again", hopper.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_that_triton_renamed_are_found_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 3.6 and 3.7; with neither name the other kernel runs."""
    tma, rows, shared = hopper.tma, hopper.async_copy, hopper.gl.shared_memory_descriptor
    for module in (tma, rows):
        monkeypatch.setattr(module, "async_copy_global_to_shared", hopper.gl.arange)
        monkeypatch.delattr(module, "async_load")
    monkeypatch.setattr(shared, "_reinterpret", shared.reinterpret, raising=False)
    monkeypatch.delattr(shared, "reinterpret")
    again = imported_again()
    assert again.load_tile is again.load_rows is hopper.gl.arange
    assert again.reinterpret is shared._reinterpret and again.gluon is not None
    monkeypatch.delattr(tma, "async_copy_global_to_shared")
    assert imported_again().gluon is None
