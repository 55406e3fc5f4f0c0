"""The command line: ``python -m express_compile explain model.py:factory --shape 1x8192``."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # the current folder, which python -m puts first, may hold a json.py; what lies there is found all the same
    sys.path.append(sys.path.pop(0))

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .core.plain import from_json, shown, try_to_write

DTYPES = ("int64", "int32", "bool", "float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` if None); returns the exit status, 1 where ``strict`` found a refused site.

    A bad argument ends the process with status 2, before the model runs, and a line that names it, its value and what
    is allowed. What the model raises is not caught.
    """
    parser = _Parser(prog="python -m express_compile", description="Sub-quadratic attention.")
    parser.add_argument("--version", action="version", version=f"express-compile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_explain(commands)
    _add_fit(commands)
    _add_calibrate(commands)
    options = parser.parse_args(arguments)
    # it loads torch, which takes seconds: --help and bad arguments do without
    from .report import commands as run

    if options.command == "calibrate":
        return run.calibrate(options)
    if options.command == "fit":
        return run.fit(options)
    return run.explain(options, {name: getattr(options, name) for name in POLICY if hasattr(options, name)})


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
    parser.set_defaults(parser=parser)
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
    policy = parser.add_argument_group("policy", "the options of the backend (docs/guide/options.md)")
    for name, settings in POLICY.items():
        policy.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **settings)


# ---------------------------------------------------------------------------------------------------------- fit


def _add_fit(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        usage="%(prog)s MODEL --sample FILE (--tolerance NATS | --rows N | --speedup FACTOR) [options]",
        help="fit a plan for every head of a model to a sample text",
        description="Measure what every head loses with every option of rows on one half of a sample, and choose "
        "the cheapest ones that keep what is asked for, as measured on the other half.",
    )
    parser.set_defaults(parser=parser)
    add = parser.add_argument
    add(
        "model", type=_place, metavar="MODEL",
        help="FILE.py:FUNCTION or MODULE:FUNCTION that returns the model, or the model and its tokenizer",
    )  # fmt: skip
    add("--sample", type=Path, required=True, metavar="FILE", help="a text, or token ids that torch.save wrote (.pt)")
    add("--tokens", type=int, metavar="N", help="of the sample that are used (default: all)")
    add(
        "--questions", type=Path, nargs="+", default=[], metavar="FILE",
        help="like the sample, and end with questions about what is before them and their answers",
    )  # fmt: skip
    add(
        "--questions-weight", type=float, default=1.0, metavar="FACTOR",
        help="how much more than the text they count (default: %(default)g)",
    )  # fmt: skip
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tolerance", type=float, metavar="NATS", help="KL per token that is allowed, measured")
    asked.add_argument("--rows", type=float, metavar="N", help="rows per query that are allowed, mean over heads")
    asked.add_argument("--speedup", type=float, metavar="FACTOR", help="predicted, over exact attention")
    add("--length", type=int, metavar="N", help="tokens that rows and speedup are for (default: those profiled)")
    add("--query-heads", action="store_true", help="rows for every query head, for prefill, not for every KV head")
    add("--device", default="cpu", help="where the model runs, e.g. cuda (default: %(default)s)")
    add("--save-plan", type=_file, metavar="FILE", help="write the plan; the option plan takes it")


# ---------------------------------------------------------------------------------------------------- calibrate


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure how fast the methods are on this machine, for the planner",
        description="Time every method at some shapes on this machine's GPU, or on its CPU if it has none, and keep "
        "the rates that follow in a file, where the planner finds them. Takes one to three minutes.",
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--out", type=_file, metavar="FILE", help="write them there instead, for no planner to find")


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
        try_to_write(path)
    except (OSError, ValueError) as error:
        raise _error(value, f"a file that can be written, but: {error}") from None
    return path


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
    try:
        return from_json(shown(value), value, lambda data: data)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# How each field of Policy is given; a seed changes nothing that is explained.
POLICY: dict[str, dict[str, Any]] = {
    "budget": {"type": _budget, "metavar": "ROWS|FRACTION"},
    "methods": {"type": lambda value: value.split(","), "metavar": "NAME[,NAME...]"},
    **{name: {"type": int, "metavar": "N"} for name in ("sinks", "window", "protected", "inflation", "min_length")},
    "halving": {"metavar": "RULE"},
    **dict.fromkeys(("strict", "causal_only", "training", "cuda_graphs"), {"action": argparse.BooleanOptionalAction}),
    "method_options": {"type": _json, "metavar": "JSON"},
    "modules": {"type": _override, "action": "append", "metavar": "GLOB=METHOD|JSON"},
    "plan": {"metavar": "FILE"},
}


if __name__ == "__main__":
    sys.exit(main())
