"""Processes that work together, on one machine and over gloo."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """``of_ranks(script, ranks)``: what each process of ``script`` returned. Fails with what the first wrote."""

    def run(script: str, ranks: int = 2, seconds: float = 300) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(Path(script).stem)
        logs = [folder / f"{rank}.log" for rank in range(ranks)]
        command = [sys.executable, str(HERE / script)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                arguments = [*command, str(rank), str(ranks), str(folder)]
                processes.append(subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT))
        try:
            end = time.monotonic() + seconds
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if any(process.poll() for process in processes):
                    break  # the others would wait for it
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [i for i, code in enumerate(codes) if code] or [i for i, code in enumerate(codes) if code is None]
        if failed:
            pytest.fail(f"rank {failed[0]} ended with {codes[failed[0]]}\n{logs[failed[0]].read_text()[-6000:]}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

    return run
