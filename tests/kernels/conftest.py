"""What the kernel tests of several modules share."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from express_compile.core.call import Call
from express_compile.core.rows import Rows
from express_compile.kernels import heads as P


@pytest.fixture(scope="session")
def accesses() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_accesses", Path(__file__).with_name("accesses.py"))
    assert spec is not None and spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def faults_of(accesses: ModuleType) -> Callable[..., set[str]]:
    """The faults of one launch, in words behind the kernel's name; for tests of what finds them, in place of
    ``no_faults``."""

    def of(kernel: Any, programs: int, *args: Any, **options: Any) -> set[str]:
        with accesses.watched() as words:
            kernel[(programs,)](*args, **options)
        name = f"{kernel.fn.__name__}: "
        assert all(x.startswith(name) for x in words)
        return {x.removeprefix(name) for x in words}

    return of


@pytest.fixture(autouse=True)
def no_faults(accesses: ModuleType, request: pytest.FixtureRequest) -> Iterator[None]:
    """What kernels of a test load and store is theirs, and they load and store it in an order that a GPU keeps."""
    if torch.cuda.is_available() or "faults_of" in request.fixturenames:  # on CUDA the interpreter runs none
        yield
        return
    with accesses.watched() as found:
        yield
    assert not found, "\n".join(sorted(found))


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(math.nan) if x.is_floating_point() else x.fill_(2**30)


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[tuple[Any, tuple[int, ...]]]]:
    """The kernels that a module launches from then on, with their grids; they run."""

    def of(module: ModuleType) -> list[tuple[Any, tuple[int, ...]]]:
        launches, run = [], module.launch

        def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
            launches.append((kernel, grid))
            run(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", launch)
        return launches

    return of


@pytest.fixture
def judge_together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Heads with ``rows`` in one launch give what the reference gives, whatever was in the memory that it takes; exact
    ones beside the others or by a kernel of their own. The ``last`` queries, which see everything, change no other."""

    def judge(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Sequence[Rows], last: int = 0) -> None:
        seed, own = torch.tensor(7), P.PerHead(rows, block=32, last=last)
        call = Call(q, k, v, None, seed, 0.5, 3)
        expected, expected_lse = P.heads_reference(q, k, v, own, 0.5, seed, 3)
        for mixed in (False, True):
            monkeypatch.setattr(P, "_mixes_exact", lambda *_, mixed=mixed: mixed)
            for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
                empty = getattr(owner, name)
                monkeypatch.setattr(owner, name, lambda *a, empty=empty, **o: _poisoned(empty(*a, **o)))
            out, lse = P.together(call, own, None, last)
            plain = P.together(call, own, None) if last and mixed else (out, lse)
            monkeypatch.undo()
            assert all(torch.equal(x[:, :, :-last], y[:, :, :-last]) for x, y in zip((out, lse), plain, strict=True))
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)

    return judge


@pytest.fixture(scope="session")
def tokens() -> Callable[..., list[torch.Tensor]]:
    """Queries ``[B, H, Lq, D]``, keys and values of ``n`` tokens, the same for the same sizes; unless given ``Lq`` is
    ``n``."""

    def make(
        n: int, H: int = 4, H_kv: int = 2, B: int = 2, D: int = 8, Dv: int = 6, Lq: int | None = None, **own: Any
    ) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(n)
        shapes = (B, H, Lq or n, D), (B, H_kv, n, D), (B, H_kv, n, Dv)
        return [torch.randn(shape, generator=generator, **{"dtype": torch.float64, **own}) for shape in shapes]

    return make
