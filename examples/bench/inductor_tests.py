"""PyTorch's own tests of attention fusion (test/inductor/test_fused_attention.py) with inductor and with this package.

    apt-get source --download-only pytorch     # or any other source distribution of PyTorch; deb-src has to be enabled
    python examples/bench/inductor_tests.py pytorch_*.orig.tar.xz --out examples/bench/results/fused-attention-tests.txt

The file is read from an archive, an unpacked source tree or a path, and is not part of this repository. Every test runs
twice: as it is, and with ``torch.compile``'s backend replaced by ``express`` (default options). The tests ask a counter
of inductor whether a pattern was fused; with our backend it counts the attention that was found and understood.
Where a test wants that nothing is fused, and what was found is right all the same, only the last column tells.

Needs ``expecttest`` (``pip install expecttest``), as PyTorch's tests do. Ends with status 1 if a test that passes with
inductor does not pass with ours, or inductor fuses what we do not find.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import io
import sys
import tarfile
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

from express_compile.passes.buffers import Buffers
from express_compile.passes.match import find_sites
from express_compile.routes.compile import express

NAME = "test/inductor/test_fused_attention.py"


@dataclass
class Outcome:
    """passed: None for a skipped test. fused: how often the counter was raised."""

    passed: bool | None
    fused: int
    message: str = ""

    @property
    def word(self) -> str:
        return "skipped" if self.passed is None else "passes" if self.passed else "fails"


class Fused(Counter):
    """Inductor's counters, and by how much fusions were raised since :attr:`ever` was 0: tests clear the counters."""

    ever = 0

    def __setitem__(self, key: str, value: int) -> None:
        if key == "fuse_attention":
            Fused.ever += max(0, value - self[key])
        super().__setitem__(key, value)


def test_file(source: Path, folder: Path) -> Path:
    """The file of tests in ``source``: an archive, a source tree, or the file itself."""
    if source.is_dir():
        return source / NAME
    if ".tar" not in source.name:
        return source
    with tarfile.open(source) as archive:
        for member in archive:
            if member.name.endswith(NAME):
                path = folder / Path(NAME).name
                path.write_bytes(archive.extractfile(member).read())
                return path
    raise SystemExit(f"{source}: it has no {NAME}")


def load(path: Path) -> ModuleType:
    """The tests as a module. What an older file imports under a name that torch has changed is given that name."""
    from torch.testing._internal import inductor_utils

    if not hasattr(inductor_utils, "HAS_CUDA"):
        inductor_utils.HAS_CUDA = inductor_utils.HAS_CUDA_AND_TRITON
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def ours(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend ``express``, which counts as inductor does."""
    found = [site for site in find_sites(gm, Buffers(gm, inputs)) if site.spec is not None and site.form == "softmax"]
    if found:
        counters["inductor"]["fuse_attention"] += len(found)
    return express(gm, inputs)


@contextmanager
def counted() -> Iterator[None]:
    """Have torch's counters be :class:`Fused`."""
    factory, Fused.ever = counters.default_factory, 0
    counters.default_factory = Fused
    counters.clear()
    try:
        yield
    finally:
        counters.default_factory = factory
        counters.clear()


def run(test: unittest.TestCase, compile_: Callable[..., Any]) -> Outcome:
    """One test with another ``torch.compile``."""
    torch._dynamo.reset()
    result, quiet = unittest.TestResult(), io.StringIO()
    with mock.patch.object(torch, "compile", compile_), counted(), redirect_stdout(quiet), redirect_stderr(quiet):
        test.run(result)
    if result.skipped:
        return Outcome(None, 0)
    problems = [text for _, text in (*result.failures, *result.errors)]
    return Outcome(not problems, Fused.ever, problems[0] if problems else "")


def tests_of(module: ModuleType, pattern: str) -> Iterator[unittest.TestCase]:
    suites = [unittest.defaultTestLoader.loadTestsFromModule(module)]
    while suites:
        for item in suites.pop():
            if isinstance(item, unittest.TestSuite):
                suites.append(item)
            elif pattern in item.id():
                yield item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="an archive or a tree of PyTorch's sources, or the file of tests")
    parser.add_argument("-k", default="", metavar="PART", help="only tests with this in their name")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--verbose", action="store_true", help="show why a test fails")
    args = parser.parse_args()
    plain, lines, lost = torch.compile, [], []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory() as folder:
        path = test_file(args.source, Path(folder))
        say(f"{NAME} of {args.source.name}, torch {torch.__version__}, {datetime.date.today()}")
        say(f"{'test':<78} {'inductor':<9} {'fused':>5}  {'ours':<9} {'found':>5}")
        for test in tests_of(load(path), args.k):
            name = ".".join(test.id().split(".")[-2:])
            outcomes = [run(test, compile_) for compile_ in (plain, partial(plain, backend=ours))]
            inductor, own = outcomes
            say(f"{name:<78} {inductor.word:<9} {inductor.fused:>5}  {own.word:<9} {own.fused:>5}")
            if (inductor.passed and not own.passed) or (inductor.fused and not own.fused):
                lost.append(name)
            if args.verbose:
                print("".join(f"{outcome.message}\n" for outcome in outcomes if outcome.message))
    say(f"passes with inductor and not with ours, or fused and not found: {', '.join(lost) or 'none'}")
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
