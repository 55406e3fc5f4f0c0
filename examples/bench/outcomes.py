"""What tests in an environment of their own came to, as a file with its date and versions."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class Record:
    """A plugin of pytest that keeps the outcome of every test."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.lines.append(f"{report.outcome:8s} {report.duration:6.1f} s  {report.nodeid.rpartition('::')[2]}")


def run_tests(file: str, words: str, target: str, packages: Sequence[str]) -> int:
    """Run the tests of a file by the command line, and write what became of them to its ``--out``.

    words: what the command line says of itself; target: that of the Makefile; packages: distributions of which the
    versions are told, those that are installed. Returns the status of pytest, which gets all other arguments.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the outcome is written to")
    arguments, others = parser.parse_known_args()
    record = Record()
    status = pytest.main(["--import-mode=importlib", "-q", "-p", "no:cacheprovider", file, *others], plugins=[record])
    names = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if name in names]
    failed = sum(not line.startswith("passed") for line in record.lines)
    text = [
        f"make {target}, {datetime.date.today()}: {', '.join(versions)}, Python {sys.version.split()[0]}, CPU",
        *record.lines,
        f"{len(record.lines) - failed} passed, {failed} failed or skipped",
    ]
    print("\n".join(text))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")
    return int(status)
