"""Set-up shared by all tests: how Triton runs here, how hypothesis searches, and poisoned memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Triton reads TRITON_INTERPRET once, when it is first imported (torch._inductor imports it), so this must come
# before every other import that could lead there. `import torch` alone does not.
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HAS_CUDA:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo gives up on code that was compiled too often; no test may use up that limit for another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN (the largest value for integers): a result that reads it cannot look right."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    probe = torch.empty(64)
    if not probe.isnan().all():
        raise RuntimeError("torch.empty was not poisoned: this torch ignores fill_uninitialized_memory")
    yield
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
