"""What the command line does with its arguments, which ``__main__`` has read."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core.cost import Rates
from ..core.plain import try_to_write
from ..core.policy import Policy, Unmet
from ..planning import devices, measure
from ..planning.choose import check_policy
from ..quality.fit import fit as fit_plan
from .explain import Report
from .explain import explain as report_of

MODULE = "express_compile_model"  # the module that a model's file becomes


def calibrate(options: argparse.Namespace) -> int:
    """Measure this machine and keep the rates where the planner finds them, or in the file that is named."""
    if options.out is None:
        try:
            place = devices.path_of(devices.name_of("cuda" if torch.cuda.is_available() else "cpu"))
            place.parent.mkdir(parents=True, exist_ok=True)
            try_to_write(place)
        except OSError as error:
            options.parser.error(f"the rates cannot be kept ({error}); give --out FILE, or set XDG_CACHE_HOME")
    device, found = measure.calibrate(lambda shapes: track(shapes, description="calibrate"))
    table = Table("dtype", "method", *(f.name for f in fields(Rates)), "off by", title="picoseconds per unit")
    for kind, rates in device.rates.items():
        for method, rate in rates.items():
            rows = [x for x in found if x["shape"].key == (kind, method)]
            off = [abs(rate.seconds(x["cost"], graphs=True) / x["seconds"] - 1) for x in rows]
            numbers = (f"{1e12 * x:,.4g}" for x in asdict(rate).values())
            table.add_row(kind, method, *numbers, f"{100 * statistics.median(off):.1f}%, at most {100 * max(off):.0f}%")
    Console(width=150).print(table)
    if options.out is not None:
        options.out.write_text(json.dumps(asdict(device), indent=2) + "\n", encoding="utf-8")
    print(f"{device.name}, {device.source}: {options.out or devices.save(device)}")
    return 0


def explain(options: argparse.Namespace, policy: dict[str, Any]) -> int:
    """Print and write what :func:`~express_compile.explain` reports for the fields of a policy."""
    if "modules" in policy:
        policy["modules"] = dict(policy["modules"])
    _check(options, policy)
    inputs = [_make("--shape", tensor, options) for tensor in options.shape]
    kwargs = {name: _make(f"--kwargs {name}", tensor, options) for name, tensor in options.kwargs}
    model = _load(options)()
    if not callable(model):
        home = ":".join(options.model)
        options.parser.error(f"MODEL={home}: returned {model!r}; must return a torch.nn.Module or a function")
    if isinstance(model, torch.nn.Module):
        model.to(options.device)
    _check_call(model, inputs, kwargs, options)
    try:
        report = report_of(model, *inputs, example_kwargs=kwargs, error=options.error, **policy)
    except Unmet as error:
        print(f"{options.parser.prog}: {error}", file=sys.stderr)
        return 1
    if options.error and not all(x.is_floating_point() for x in (*inputs, *kwargs.values())):
        words = (
            "integers are ones, so errors are those of equal tokens; explain(model, *inputs, error=True) takes yours"
        )
        print(f"{options.parser.prog}: {words}", file=sys.stderr)
    report = report.timed() if options.measure else report
    print(report)
    if options.json is not None:
        options.json.write_text(report.to_json() + "\n", encoding="utf-8")
    if options.html is not None:
        options.html.write_text(report.to_html(_plots(report, options)) + "\n", encoding="utf-8")
    if options.save_plan is not None:
        report.plan.save(options.save_plan)
    return 0


def fit(options: argparse.Namespace) -> int:
    """Fit a plan for every head to a sample, print what came of it and write it."""
    _check_device(options)
    made = _load(options)()
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        home = ":".join(options.model)
        options.parser.error(f"MODEL={home}: returned {made!r}; must return a torch.nn.Module, or it and its tokenizer")
    if options.tokens is not None and options.tokens < 4:
        options.parser.error(f"--tokens={options.tokens}: must be 4 or more")
    sample = _token_ids("sample", options.sample, options, tokenizer)[:, : options.tokens]
    questions = [_token_ids("questions", path, options, tokenizer) for path in options.questions] or None
    try:
        asked = dict(tolerance=options.tolerance, rows=options.rows, speedup=options.speedup)
        how = dict(length=options.length, query_heads=options.query_heads, progress=True)
        how |= dict(questions=questions, questions_weight=options.questions_weight)
        found = fit_plan(model.to(options.device).eval(), sample, **asked, **how)
    except (TypeError, ValueError) as error:
        options.parser.error(str(error))
    print(found)
    if options.save_plan is not None:
        found.save(options.save_plan)
    return 0


def _token_ids(name: str, path: Path, options: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """The token ids ``[batch, tokens]`` in a file, which is that of the argument ``name``."""
    where = f"--{name}={str(path)!r}"
    if path.suffix != ".pt" and not callable(tokenizer):
        options.parser.error(
            f"{where}: is a text, and MODEL returned {'no tokenizer' if tokenizer is None else repr(tokenizer)}; must "
            "be token ids (.pt), or MODEL a function that returns the model and its tokenizer"
        )
    try:
        read = path.read_text(encoding="utf-8") if path.suffix != ".pt" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of a file that is none of its own torch.load raises EOFError, RuntimeError, ..
        options.parser.error(f"{where}: {_first_line(error)}")
    ids: Any = read if path.suffix == ".pt" else _ids(tokenizer(read))
    if isinstance(ids, torch.Tensor) and not ids.numel():
        options.parser.error(f"{where}: has no tokens; must have 4 or more")
    if not isinstance(ids, torch.Tensor) or ids.dtype not in INTEGERS or ids.dim() not in (1, 2):
        options.parser.error(f"{where}: must be token ids, integers [tokens] or [batch, tokens]")
    return ids.long().reshape(-1, ids.shape[-1]).to(options.device)


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _ids(made: Any) -> Any:
    """What a tokenizer made of a text as a tensor, or as it is if it is none."""
    try:
        return torch.as_tensor(made["input_ids"] if hasattr(made, "keys") else made)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return made


def _plots(report: Report, options: argparse.Namespace) -> dict[str, str]:
    try:
        return report.crossovers()
    except ImportError:
        print(f"{options.parser.prog}: no plots without matplotlib (pip install matplotlib)", file=sys.stderr)
        return {}


def _check_device(options: argparse.Namespace) -> None:
    try:
        torch.empty(0, device=options.device)
    except Exception as error:  # torch raises AssertionError, RuntimeError, NotImplementedError, ..
        options.parser.error(f"--device={options.device!r}: {_first_line(error)}")


def _check(options: argparse.Namespace, policy: dict[str, Any]) -> None:
    _check_device(options)
    try:
        check_policy(Policy.from_options(policy))
    except (OSError, TypeError, ValueError) as error:
        options.parser.error(str(error))


def _check_call(model: Any, inputs: list[Any], kwargs: dict[str, Any], options: argparse.Namespace) -> None:
    """The inputs are as many, and have the names, that the model takes."""
    if getattr(model, "_forward_pre_hooks", None):  # which may change them
        return
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*inputs, **kwargs)
    except TypeError as error:
        options.parser.error(f"--shape, --kwargs: the model takes {signature}, but: {error}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _load(options: argparse.Namespace) -> Callable[[], Any]:
    """The function that makes the model."""
    parser: argparse.ArgumentParser = options.parser
    home, name = options.model
    where = f"MODEL={home}:{name}"
    try:
        module = _run_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    except (Exception, SystemExit) as error:
        frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith("<frozen")]
        at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        words = f"{type(error).__name__}: {_first_line(error)}{at}"
        parser.error(f"{where}: must be a Python file or a module that can be imported: {words}")
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = sorted(n for n, x in vars(module).items() if callable(x) and not n.startswith("_"))
        parser.error(f"{where}: must be a function there; it has {', '.join(functions) or 'none'}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        parser.error(f"{where}: must be a function that can be called without arguments: {error}")
    except ValueError:  # of a builtin nothing is known
        pass
    return factory


def _run_file(path: Path) -> Any:
    """Run a file as a module with a name of its own, whatever the file is called. What lies beside it can be imported,
    but for what is called like an installed module."""
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None, "its name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # pickle and dataclasses look there
    spec.loader.exec_module(module)
    return module


def _make(argument: str, tensor: tuple[tuple[int, ...], str | None], options: argparse.Namespace) -> torch.Tensor:
    parser: argparse.ArgumentParser = options.parser
    sizes, dtype = tensor[0], getattr(torch, tensor[1] or options.dtype)
    try:
        if not dtype.is_floating_point:
            return torch.ones(sizes, dtype=dtype, device=options.device)
        numbers = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return numbers.to(options.device, dtype)
    except Exception as error:  # too large for torch, or for the memory
        parser.error(f"{argument} {'x'.join(map(str, sizes))}: {_first_line(error)}")
