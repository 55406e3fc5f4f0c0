"""transformers' own tests on 13 families of models, untouched and with every model rewritten.

    python examples/bench/transformers_tests.py PATH [--families llama] [--methods exact express,exact] [--out FILE]

PATH holds transformers' ``tests`` folder: an unpacked source distribution from PyPI
(``pip download --no-deps --no-binary :all: transformers==5.23.0``), or a checkout. The source distribution has the
common tests of all models, but neither the test files of the models nor those of ``generate``: then the families are
those of ``transformers_families.py`` beside this file. With a checkout its own ``test_modeling_*.py`` are run, which
hold the tests of ``generate``, too.

Each family runs in a process of its own, once untouched and once for every list of methods. As a pytest plugin
(``-p transformers_tests``) this file has every model rewritten as soon as a test calls ``to``, ``eval`` or ``train``
on it, which nearly all do right after they made it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "phi3",
    "bert",
    "t5",
    "whisper",
    "clip",
)
FAMILIES += ("vit",)
METHODS = ("exact", "express,exact")
VARIABLE, RESULTS = "EXPRESS_REWRITE", "EXPRESS_RESULTS"
# Shapes of no interest here, a hub, a second GPU; and what no source distribution ships.
LEFT_OUT = "not hub and not multi_gpu and not flash_attn and not deepspeed and not TorchCompile"
MISSING = {"tests.generation.test_utils": "GenerationTesterMixin", "tests.exporters.test_export": "ExportTesterMixin"}

# ------------------------------------------------------------------------------------------------- the plugin


def pytest_configure(config: Any) -> None:
    if RESULTS not in os.environ:
        return
    for name, mixin in MISSING.items():
        if not _exists(name):
            module = sys.modules[name] = types.ModuleType(name)
            setattr(module, mixin, type(mixin, (), {}))
    if methods := os.environ.get(VARIABLE):
        rewrite_every_model(methods.split(","))


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def rewrite_every_model(methods: Sequence[str]) -> None:
    """Have each model of transformers rewritten when it is moved or its mode is set."""
    from transformers import PreTrainedModel

    from express_compile import is_rewritten, rewrite_attention

    def rewritten_before(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_rewritten(self):
                try:
                    rewrite_attention(self, methods=list(methods), min_length=0, seed=0)
                    _counts["models rewritten"] += 1
                except ValueError as error:
                    if "no attention found" not in str(error):
                        raise
            return function(self, *args, **kwargs)

        return run

    for name in ("to", "eval", "train"):
        setattr(PreTrainedModel, name, rewritten_before(getattr(PreTrainedModel, name)))


_counts: Counter[str] = Counter()
_outcomes: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        cause = "" if report.outcome != "failed" else str(getattr(report.longrepr, "reprcrash", report.longrepr))
        _outcomes[report.nodeid.partition("::")[2]] = report.outcome, cause[-400:]


def pytest_sessionfinish() -> None:
    if RESULTS in os.environ:
        Path(os.environ[RESULTS]).write_text(json.dumps({"outcomes": _outcomes, "counts": _counts}))


# ------------------------------------------------------------------------------------------------ the command


def run_family(path: Path, family: str, methods: str, only: str) -> dict[str, Any]:
    """Outcomes of the tests of one family, by name, and how many models were rewritten."""
    here = Path(__file__).resolve().parent
    own = path / "tests" / "models" / family / f"test_modeling_{family}.py"
    what = [str(own)] if own.exists() else [str(here / "transformers_families.py"), "--import-mode=importlib"]
    chosen = LEFT_OUT if own.exists() else f"(Test_{family} or Test_{family}_text) and {LEFT_OUT}"
    chosen = f"({chosen}) and ({only})" if only else chosen
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        environment = {**os.environ, RESULTS: str(results), VARIABLE: methods, "HF_HUB_OFFLINE": "1"}
        found = [str(path), str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "transformers_tests",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-o", "addopts=", "-o", "filterwarnings=", "-W", "ignore", "--tb=short", f"--rootdir={path}"]
        done = subprocess.run(
            [*command, "-k", chosen, *what], cwd=path, env=environment, capture_output=True, text=True
        )
        if not results.exists() or done.returncode not in (0, 1):
            raise RuntimeError(f"{family}: pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(results.read_text())


def compared(untouched: dict[str, Any], rewritten: dict[str, Any]) -> dict[str, str]:
    """Name and cause of every test that passes untouched and does not pass rewritten."""
    after = {name: rewritten["outcomes"].get(name, ["not run", ""]) for name in untouched["outcomes"]}
    passed = [name for name, (outcome, _) in untouched["outcomes"].items() if outcome == "passed"]
    return {name: " ".join(after[name]).strip() for name in passed if after[name][0] != "passed"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where transformers' folder tests is")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="lists of methods, e.g. express,exact")
    parser.add_argument("--only", default="", help="as pytest's -k")
    parser.add_argument("--out", type=Path, help="also write the outcome to this file")
    given = parser.parse_args(arguments)
    if not (given.path / "tests" / "test_modeling_common.py").is_file():
        parser.error(f"path={str(given.path)!r}: has no tests/test_modeling_common.py")
    lines = [_heading(given.path.resolve(), given.only)]
    print(lines[0])
    for family in given.families:
        start = len(lines)
        untouched = run_family(given.path.resolve(), family, "", given.only)
        outcomes = Counter(outcome for outcome, _ in untouched["outcomes"].values())
        lines.append(
            f"{family}: {outcomes['passed']} pass untouched ({outcomes['failed']} fail, {outcomes['skipped']} skip)"
        )
        for methods in given.methods:
            rewritten = run_family(given.path.resolve(), family, methods, given.only)
            broken = compared(untouched, rewritten)
            models = rewritten["counts"].get("models rewritten", 0)
            passed = outcomes["passed"] - len(broken)
            lines.append(f"  {methods}: {passed} of {outcomes['passed']} pass rewritten, {models} models rewritten")
            lines += [f"    {name}: {' '.join(cause.split())}" for name, cause in broken.items()]
        print("\n".join(lines[start:]), flush=True)
        if given.out:
            given.out.write_text("\n".join(lines) + "\n")


def _heading(path: Path, only: str) -> str:
    import torch
    import transformers

    kind = "a checkout" if (path / "tests" / "models").is_dir() else "the source distribution"
    today = datetime.date.today()
    chosen = f"; those of -k '{only}'" if only else ""
    return f"transformers {transformers.__version__}, its tests from {kind}{chosen}; torch {torch.__version__}; {today}"


if __name__ == "__main__":
    main()
