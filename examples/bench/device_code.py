"""What the kernels compile to for an H200, without one: registers, spills, shared memory, and a hash of the PTX.

    make device-code TRITON=WHEEL-OR-FOLDER       # writes examples/bench/results/device-code.csv
    python examples/bench/device_code.py --triton WHEEL-OR-FOLDER --against examples/bench/results/device-code.csv

TRITON is a wheel for this Python (``pip download --no-deps triton==3.6.0``), or a folder where one is unpacked. Every
call of ``device_calls.py`` runs on CPU tensors. What it launches is compiled for sm_90 and assembled, each variant
once, in four minutes of a core. ``--against`` compares with a table that was written before: a refactoring leaves the
PTX of all kernels as it is. To compile another tree than the one that is installed, put it on PYTHONPATH.

Ends with status 1 where a kernel does not compile, or takes more shared memory than Hopper gives to a block.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

COLUMNS = "commit,triton,dtype,D,call,kernel,variant,registers,spilled,shared,warnings,ptx,error".split(",")
SHARED = 227 << 10
"""Bytes of shared memory that a block may have on Hopper."""

Row = dict[str, Any]


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder of a Triton: ``path``, or what is in that wheel."""
    if path.is_dir():
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(path).extractall(folder)
        for program in Path(folder).glob("triton/backends/nvidia/bin/*"):
            program.chmod(0o755)
        yield Path(folder)


def use_triton(folder: Path, version: str) -> None:
    """Let this process import Triton from ``folder``, to compile and never to run, with nothing from its cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    for name in ("ALWAYS_COMPILE", "DISABLE_LINE_INFO", "DUMP_PTXAS_LOG"):
        os.environ[f"TRITON_{name}"] = "1"
    sys.path.insert(0, str(folder))
    triton = import_module("triton")
    if not Path(triton.__file__).is_relative_to(folder):
        raise SystemExit(f"--triton: {folder} has no triton; Python found {triton.__file__}")
    if not triton.__version__.startswith(version):
        raise SystemExit(f"--triton: {folder} has version {triton.__version__}, asked for is {version} (--version)")
    target = import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    import_module("triton.runtime.driver").driver.set_active(_Hopper(target))


class _Hopper:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, target: Any) -> None:
        self.get_current_target = lambda: target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def compiled(launch: Any, known: dict[Any, Row]) -> Row:
    """The row of one launch, from those that are ``known`` by what Triton compiled."""
    stand_in = import_module("express_compile.kernels.launch").stand_in
    kernel, args, options = launch
    name = f"{kernel.fn.__module__.removeprefix('express_compile.kernels.')}.{kernel.fn.__name__}"
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            args = [stand_in(x, p.do_not_specialize) for x, p in zip(args, kernel.params, strict=False)]
            made = kernel.warmup(*args, grid=(1,), **options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"kernel": name, "variant": "", "ptx": "", "error": f"{type(error).__name__}: {lines[-1][:200]}"}
    if id(made) not in known:
        source, meta, said = made.src, made.metadata, log.getvalue()
        kind = source.signature, source.constants, source.attrs, meta.num_warps, meta.num_stages
        registers, spilled = (re.search(what, said) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        if registers is None or spilled is None:
            raise SystemExit(f"{name}: ptxas did not say how many registers it uses\n{said}")
        known[id(made)] = {
            "kernel": name,
            "variant": digest(*kind),
            "registers": int(registers[1]),
            "spilled": int(spilled[1]),
            "shared": meta.shared,
            "warnings": " ".join(sorted(set(re.findall(r"\((C\d+)\)", said)))),
            "ptx": digest(made.asm["ptx"].replace(meta.name, "kernel")),
            "error": f"shared memory: {meta.shared} bytes, at most {SHARED}" if meta.shared > SHARED else "",
            "made": made,  # as long as this is held nothing else gets its id
        }
    return known[id(made)]


def table() -> Iterator[Row]:
    """One row for each kernel and variant of every call."""
    calls, known = import_module("device_calls"), {}
    for dtype, D in calls.KINDS:
        for name, call in calls.CALLS.items():
            with calls.recorded() as launches:
                call(dtype, D)
            seen = []
            for launch in launches:
                row = compiled(launch, known)
                if row not in seen:
                    seen.append(row)
                    yield {"dtype": str(dtype).removeprefix("torch."), "D": D, "call": name, **row}


def compare(old: list[Row], new: list[Row]) -> list[tuple[str, Row | None, Row | None]]:
    """``(what, old row, new row)`` of every kernel of both tables; what is "same", "changed", "missing" or "new".

    The same call of the same kernel, in the order of its variants: those with equal PTX first, whatever they were
    compiled from.
    """
    found: list[tuple[str, Row | None, Row | None]] = []
    groups: dict[tuple[str, ...], tuple[list[Row], list[Row]]] = {}
    for i, rows in enumerate((old, new)):
        for row in rows:
            place = tuple(str(row[name]) for name in ("dtype", "D", "call", "kernel"))
            groups.setdefault(place, ([], []))[i].append(row)
    for before, after in groups.values():
        for row in list(after):
            twin = next((x for x in before if x["ptx"] and x["ptx"] == row["ptx"]), None)
            if twin is not None:
                before.remove(twin)
                after.remove(row)
                found.append(("same", twin, row))
        pairs = min(len(before), len(after))
        found += [("changed", *pair) for pair in zip(before, after, strict=False)]
        found += [("missing", row, None) for row in before[pairs:]]
        found += [("new", None, row) for row in after[pairs:]]
    return found


def differences(old: list[Row], new: list[Row]) -> list[Row]:
    """What :func:`compare` finds but equal kernels, as rows to be shown: ``before -> after`` where numbers differ, the
    first call, and how many there are."""
    rows: dict[tuple[Any, ...], Row] = {}
    for what, before, after in compare(old, new):
        if what == "same":
            continue
        row = after or before or {}
        place = (
            what,
            *(str(row[name]) for name in ("dtype", "D", "kernel")),
            *(x and x["ptx"] for x in (before, after)),
        )
        shown = rows.setdefault(place, {"what": what, "calls": 0, **row})
        shown["calls"] += 1
        for name in ("registers", "spilled", "shared"):
            numbers = [str(x.get(name, "")) for x in (before, after) if x is not None]
            shown[name] = " -> ".join(dict.fromkeys(numbers))
    return list(rows.values())


def read(path: Path, triton: str) -> list[Row]:
    """An earlier table, of the same Triton."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if other := {row["triton"] for row in rows} - {triton}:
        raise SystemExit(f"--against: {path} is of Triton {', '.join(other)}, this is {triton}; must be the same")
    return rows


def commit_of(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, required=True, help="a wheel, or the folder where it is unpacked")
    parser.add_argument("--version", default="3.6.", help="how the version of that Triton must begin")
    parser.add_argument("--against", type=Path, help="table to compare with")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    if not args.triton.exists():
        parser.error(f"--triton: {args.triton} is not there; must be a wheel, or a folder where one is unpacked")
    with unpacked(args.triton) as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        use_triton(folder, args.version)
        records, triton = import_module("records"), sys.modules["triton"].__version__
        old = read(args.against, triton) if args.against else []  # before it is written anew
        tree = Path(import_module("express_compile").__file__).parents[1]
        run = {"commit": commit_of(tree), "triton": triton}
        print(f"Triton {triton} of {folder}, kernels of {tree}, {run['commit']}", flush=True)
        rows = []
        for row in table():
            rows.append({**run, **{name: row.get(name, "") for name in COLUMNS[2:]}})
            print(*rows[-1].values(), flush=True)
    if args.out:
        args.out.unlink(missing_ok=True)
        records.append(args.out, COLUMNS, rows)
    if args.against:
        differ = differences(old, rows)
        records.show(differ, ["what", "dtype", "D", "call", "calls", "kernel", "registers", "spilled", "shared"])
        same = sum(what == "same" for what, *_ in compare(old, rows))
        print(f"{same} of {len(rows)} rows have the PTX that they have in {args.against}, which has {len(old)}")
    wrong = [row for row in rows if row["error"]]
    records.show(wrong, ["dtype", "D", "call", "kernel", "error"])
    kernels = {row["ptx"] for row in rows}, {row["ptx"] for row in rows if row["spilled"]}
    print(f"{len(kernels[0])} kernels, {len(kernels[1])} of them spill; {len(wrong)} rows with errors")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
