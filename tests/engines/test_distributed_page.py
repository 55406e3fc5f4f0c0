"""The page on several GPUs: its example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_of_the_page_runs_on_two_processes(tmp_path: Path) -> None:
    page = (ROOT / "docs/guide/distributed.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(r"(\w+) off by tensor\((\S+)\)", done.stdout)
    assert sorted(how for how, _ in found) == ["all_to_all", "all_to_all", "coresets", "coresets"]
    assert all(0 < float(error) < 0.2 for _, error in found)
    assert max(float(error) for _, error in found) == pytest.approx(0.05, abs=0.05)
