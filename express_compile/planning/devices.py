"""The devices whose speed is known: measured on this machine, else shipped."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from ..core.cost import Device
from ..core.plain import from_json, write_whole

# Data sheets (NVIDIA, dense float16): matrix products in TFLOP/s, memory in TB/s, clock in GHz times multiprocessors,
# clock, and MB of L2 as its driver reports it
_SHEETS = {
    "NVIDIA H200": (989, 4.8, 1.98 * 132, 1.98, 60),
    "NVIDIA H100 80GB HBM3": (989, 3.35, 1.98 * 132, 1.98, 50),
    "NVIDIA H100 PCIe": (756, 2.0, 1.755 * 114, 1.755, 50),
    "NVIDIA A100-SXM4-80GB": (312, 2.039, 1.41 * 108, 1.41, 40),
    "NVIDIA A100-SXM4-40GB": (312, 1.555, 1.41 * 108, 1.41, 40),
    "NVIDIA A100 80GB PCIe": (312, 1.935, 1.41 * 108, 1.41, 40),
}
MEASURED = "NVIDIA H200"


def name_of(device: str) -> str:
    """The name of a device of this type (``"cuda"``, ``"cpu"``) here, the current one if there are several."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Those of torch and Triton, the latter empty where it is not installed."""
    triton = next((d.version for d in importlib.metadata.distributions(name="triton")), "")
    return dict(torch=torch.__version__, triton=triton)


def path_of(name: str) -> Path:
    """The file of a device that was measured here: one per name and versions, under ``XDG_CACHE_HOME``.

    Raises ``OSError`` where neither that nor a home directory is known.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError(f"XDG_CACHE_HOME is not set, and there is no home directory: {error}") from None
    key = "-".join([name, *versions().values()])
    return home / "express_compile" / f"{re.sub(r'[^A-Za-z0-9.+]+', '-', key)}.json"


def save(device: Device) -> Path:
    """Keep a device that was measured here; returns its file. Raises ``OSError`` where that cannot be written."""
    path = path_of(device.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(device), indent=2))
    known.cache_clear()
    return path


@functools.cache
def shipped() -> dict[str, Device]:
    """The devices that need no measurement: those measured for this package, and others by their data sheets."""
    found = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    devices = {data["name"]: Device.from_dict(data) for data in found}
    base = devices[MEASURED]
    for name, sheet in _SHEETS.items():
        if name not in devices:
            matrix, memory, vector, clock, cache = (x / y for x, y in zip(_SHEETS[MEASURED], sheet, strict=True))
            source = f"data sheet: rates of {MEASURED} scaled, not measured"
            times = dict(flops=matrix, bytes=memory, evictions=memory, scores=vector, steps=clock, cache=1 / cache)
            devices[name] = base.scaled(name, source, **times)
    return devices


def device_of(kind: str) -> Device | None:
    """What is known of the device of this type here: as measured on this machine, else shipped, else None."""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        return None
    return known(name_of(kind))


@functools.cache
def known(name: str) -> Device | None:
    """The device of this name, which for a CPU follows ``torch.set_num_threads``."""
    return _measured(name) or shipped().get(name)


device_of.cache_clear = known.cache_clear  # type: ignore[attr-defined]  # of 0.1.0, goes with 0.2


def _measured(name: str) -> Device | None:
    """A device as it was measured here; None where it was not, or its file may not be read, or says nothing that can be
    true, which a ``RuntimeWarning`` tells."""
    try:
        path = path_of(name)
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        _ignored(path, error)
        return None
    try:
        device = from_json("device", text, Device.from_dict)
    except (TypeError, ValueError) as error:
        _ignored(path, error)
        return None
    if device.name != name:
        _ignored(path, f"it is of {device.name!r}, not {name!r}")
        return None
    return device


def _ignored(path: Path, reason: object) -> None:
    warnings.warn(
        f"{path}: does not hold how fast this machine is, and is left out ({reason}); "
        "python -m express_compile calibrate writes it anew",
        RuntimeWarning,
        stacklevel=2,
    )
