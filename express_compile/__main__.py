"""The command line: ``python -m express_compile explain model.py:factory --shape 1x8192``."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # the current folder, which python -m puts first, may hold a json.py; what lies there is found all the same
    sys.path.append(sys.path.pop(0))

import argparse
import importlib
import importlib.util
import inspect
import json
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .core.plain import from_json

if TYPE_CHECKING:
    import torch

    from .report.explain import Report

MODULE = "express_compile_model"  # the module that a model's file becomes
DTYPES = ("int64", "int32", "bool", "float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` if None); returns the exit status, 1 where ``strict`` found a refused site.

    A bad argument ends the process with status 2, before the model runs, and a line that names it, its value and what
    is allowed. What the model raises is not caught.
    """
    parser = _Parser(prog="python -m express_compile", description="Sub-quadratic attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_explain(commands)
    _add_calibrate(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())} (--help tells more)\n")


# ------------------------------------------------------------------------------------------------------ explain


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        usage="%(prog)s MODEL [--shape SIZES[:DTYPE] ...] [options]",
        help="show every attention site of a model: what it becomes, or why not",
        description="Run a model once on made-up inputs (integers and booleans are ones, floats are normal random "
        "numbers) and show what the backend would do at every attention site, and why.",
    )
    parser.set_defaults(run=_explain, parser=parser)
    add = parser.add_argument
    add("model", type=_place, metavar="MODEL", help="FILE.py:FUNCTION or MODULE:FUNCTION that returns the model")
    add("--shape", type=_tensor, action="append", default=[], metavar="SIZES[:DTYPE]", help="of an input: 1x8192")
    add("--dtype", choices=DTYPES, default="int64", help="of inputs that do not name one (default: %(default)s)")
    add("--kwargs", type=_keyword, action="append", default=[], metavar="NAME=SIZES[:DTYPE]", help="a named input")
    add("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    add("--measure", action="store_true", help="time what runs at each site, and exact attention, on this machine")
    add("--error", action="store_true", help="measure what each site's output is off by on these made-up inputs")
    add("--json", type=_file, metavar="FILE", help="write the report as JSON")
    add("--html", type=_file, metavar="FILE", help="write the report as one HTML page")
    add("--save-plan", type=_file, metavar="FILE", help="write what was decided; the option plan takes it")
    policy = parser.add_argument_group("policy", "the options of the backend; the README says what they mean")
    for name, settings in POLICY.items():
        policy.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **settings)


def _explain(options: argparse.Namespace) -> int:
    import torch

    from .core.policy import Unmet
    from .report.explain import explain

    fields = {name: getattr(options, name) for name in POLICY if hasattr(options, name)}
    if "modules" in fields:
        fields["modules"] = dict(fields["modules"])
    _check(options, fields)
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
        report = explain(model, *inputs, example_kwargs=kwargs, error=options.error, **fields)
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


def _plots(report: Report, options: argparse.Namespace) -> dict[str, str]:
    try:
        return report.crossovers()
    except ImportError:
        print(f"{options.parser.prog}: no plots without matplotlib (pip install matplotlib)", file=sys.stderr)
        return {}


def _check(options: argparse.Namespace, fields: dict[str, Any]) -> None:
    import torch

    from .core.policy import Policy
    from .planning.choose import check_policy

    try:
        torch.empty(0, device=options.device)
    except Exception as error:  # torch raises AssertionError, RuntimeError, NotImplementedError, ..
        options.parser.error(f"--device={options.device!r}: {_first_line(error)}")
    try:
        check_policy(Policy.from_options(fields))
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
    home, name = options.model
    where = f"MODEL={home}:{name}"
    try:
        module = _run_file(Path(home)) if home.endswith(".py") else importlib.import_module(home)
    except (Exception, SystemExit) as error:
        frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith("<frozen")]
        at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        words = f"{type(error).__name__}: {_first_line(error)}{at}"
        options.parser.error(f"{where}: must be a Python file or a module that can be imported: {words}")
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = sorted(n for n, x in vars(module).items() if callable(x) and not n.startswith("_"))
        options.parser.error(f"{where}: must be a function there; it has {', '.join(functions) or 'none'}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        options.parser.error(f"{where}: must be a function that can be called without arguments: {error}")
    except ValueError:  # of a builtin nothing is known
        pass
    return factory


def _run_file(path: Path) -> Any:
    """Run a file as a module with a name of its own, whatever the file is called. What lies beside it can be imported,
    but for what is called like an installed module."""
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # pickle and dataclasses look there
    spec.loader.exec_module(module)
    return module


def _make(argument: str, tensor: tuple[tuple[int, ...], str | None], options: argparse.Namespace) -> torch.Tensor:
    import torch

    sizes, dtype = tensor[0], getattr(torch, tensor[1] or options.dtype)
    try:
        if not dtype.is_floating_point:
            return torch.ones(sizes, dtype=dtype, device=options.device)
        numbers = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return numbers.to(options.device, dtype)
    except Exception as error:  # too large for torch, or for the memory
        options.parser.error(f"{argument} {'x'.join(map(str, sizes))}: {_first_line(error)}")


# ---------------------------------------------------------------------------------------------------- calibrate


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure how fast the methods are on this machine, for the planner",
        description="Time every method at some shapes on this machine's GPU, or on its CPU if it has none, and keep "
        "the rates that follow in a file, where the planner finds them. Takes two to three minutes.",
    )
    parser.set_defaults(run=_calibrate, parser=parser)
    parser.add_argument("--out", type=_file, metavar="FILE", help="write them there instead, for no planner to find")


def _calibrate(options: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from .core.cost import Rates
    from .planning.devices import name_of, path_of, save
    from .planning.measure import calibrate

    if options.out is None:
        try:
            place = path_of(name_of("cuda" if torch.cuda.is_available() else "cpu"))
            place.parent.mkdir(parents=True, exist_ok=True)
            _try_to_write(place)
        except OSError as error:
            options.parser.error(f"the rates cannot be kept ({error}); give --out FILE, or set XDG_CACHE_HOME")
    device, found = calibrate(lambda shapes: track(shapes, description="calibrate"))
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
    print(f"{device.name}, {device.source}: {options.out or save(device)}")
    return 0


# ----------------------------------------------------------------------------------- what arguments are made of


def _error(value: str, allowed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{value!r}: must be {allowed}")


def _place(value: str) -> tuple[str, str]:
    home, _, name = value.rpartition(":")
    if not home or not name.isidentifier():
        raise _error(value, "FILE.py:FUNCTION or MODULE:FUNCTION, e.g. model.py:make")
    return home, name


def _tensor(value: str) -> tuple[tuple[int, ...], str | None]:
    sizes, _, dtype = value.partition(":")
    if not all(size.isascii() and size.isdigit() for size in sizes.split("x")) or (
        ":" in value and dtype not in DTYPES
    ):
        raise _error(value, f"sizes such as 1x8192, with one of {', '.join(DTYPES)} as in 1x8192:int64 if need be")
    return tuple(map(int, sizes.split("x"))), dtype or None


def _keyword(value: str) -> tuple[str, tuple[tuple[int, ...], str | None]]:
    name, equals, tensor = value.partition("=")
    if not equals or not name.isidentifier():
        raise _error(value, "NAME=SIZES or NAME=SIZES:DTYPE, e.g. attention_mask=1x8192:int64")
    return name, _tensor(tensor)


def _file(value: str) -> Path:
    path = Path(value)
    try:
        _try_to_write(path)
    except (OSError, ValueError) as error:
        raise _error(value, f"a file that can be written, but: {error}") from None
    return path


def _try_to_write(path: Path) -> None:
    """Raise ``OSError`` unless a file can be written there, and leave everything as it is."""
    if path.exists() and not path.is_file() and not path.is_dir():  # to open a pipe would wait for its reader
        return
    new = not path.exists()
    with path.open("ab"):
        pass
    if new:
        path.unlink()


def _budget(value: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise _error(value, "a number of rows or a fraction of the keys, e.g. 512 or 0.05")


def _override(value: str) -> tuple[str, Any]:
    glob, equals, given = value.partition("=")
    if not equals or not given:
        raise _error(value, "GLOB=METHOD or GLOB={...}, e.g. 'model.layers.0.*=exact' or '*.cross={\"budget\": 1024}'")
    return glob, _json(given) if given.startswith("{") else given


def _json(value: str) -> Any:
    shown = value if len(value) <= 100 else f"{value[:100]}..."
    try:
        return from_json(f"{shown!r}: must be JSON, but", value, lambda data: data)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# How each field of Policy is given; a seed changes nothing that is explained.
POLICY: dict[str, dict[str, Any]] = {
    "budget": {"type": _budget, "metavar": "ROWS|FRACTION"},
    "methods": {"type": lambda value: value.split(","), "metavar": "NAME[,NAME...]"},
    **{name: {"type": int, "metavar": "N"} for name in ("sinks", "window", "protected", "inflation", "min_length")},
    "halving": {"metavar": "RULE"},
    **{name: {"action": argparse.BooleanOptionalAction} for name in ("strict", "causal_only", "training")},
    "method_options": {"type": _json, "metavar": "JSON"},
    "modules": {"type": _override, "action": "append", "metavar": "GLOB=METHOD|JSON"},
    "plan": {"metavar": "FILE"},
}


if __name__ == "__main__":
    sys.exit(main())
