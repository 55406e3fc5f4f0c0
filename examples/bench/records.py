"""Result files: their columns, what a row says of the run it comes from, and the same rows on the screen."""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

SPEED_COLUMNS = (
    "date,gpu,torch,triton,commit,job,method,params,B,H,H_kv,Lq,Lk,D,Dv,dtype,s,ms_p20,ms_p50,ms_p80,opponent,"
    "opponent_ms_p50,speedup,error,peak_mb"
).split(",")
QUALITY_COLUMNS = "date,gpu,commit,model,task,n,method,params,rows,metric,value,low,high".split(",")


def add_arguments(parser: argparse.ArgumentParser, out: str = "CSV file to append to") -> None:
    """``--out`` and ``--commit``."""
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--commit", default=None, help="commit to record; asked from git if not given")


def run_of(commit: str | None) -> dict[str, str]:
    """Date, GPU and commit of this run; without one, the commit that is checked out here."""
    if commit is None:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return dict(date=datetime.date.today().isoformat(), gpu=gpu, commit=commit)


def params_of(row: dict[str, str]) -> dict[str, str]:
    """The column ``params`` of a row, ``name=value`` pairs."""
    return dict(pair.split("=") for pair in row["params"].split())


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Append ``rows`` to a CSV file, with a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: Iterable[dict], columns: Sequence[str], width: int = 150, digits: str = ".4g") -> None:
    """Print the ``columns`` of ``rows`` as a table."""
    table = Table(*columns)
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(format(x, digits) if isinstance(x, float) else str(x) for x in cells))
    Console(width=width).print(table)
