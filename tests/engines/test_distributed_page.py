"""The page on several GPUs: its example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_of_the_page_runs_on_two_processes(tmp_path: Path) -> None:
    page = (ROOT / "docs/guide/distributed.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    logs = ["--redirects", "3", "--log-dir", str(tmp_path)]  # what two processes print to one pipe runs into each other
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *logs, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    errors = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("stderr.log"))
    assert done.returncode == 0, done.stderr[-2000:] + errors[-4000:]
    found = [re.findall(r"(\w+) off by tensor\((\S+)\)", path.read_text()) for path in tmp_path.rglob("stdout.log")]
    assert len(found) == 2
    for rank in found:
        assert [how for how, _ in rank] == ["all_to_all", "coresets"]
        assert all(0.0 < float(error) < 0.2 for _, error in rank)
