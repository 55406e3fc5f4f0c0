"""Set-up shared by all tests: how Triton runs here, how hypothesis searches, and poisoned memory."""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning starve what else runs here

import torch  # noqa: E402

# Triton reads TRITON_INTERPRET once, when it is first imported (torch._inductor imports it), so this must come
# before every other import that could lead there. `import torch` alone does not.
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

    def _fails(*args: Any) -> NoReturn:
        raise RuntimeError("Found no NVIDIA driver on your system")

    # as in a build of PyTorch with CUDA where there is no driver; without CUDA it has none of them to ask, so that code
    # which takes that for an answer would work in such a build alone
    for _asked in ("_cuda_getDevice", "_cuda_getCurrentStream", "_cuda_getCurrentRawStream"):
        setattr(torch._C, _asked, _fails)
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# pytest-xdist has a worker per core
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

hypothesis.settings.register_profile(
    "ci", derandomize=True, max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

GPU_TESTS = Path(__file__).parent / "gpu"


def _quicken_the_interpreter() -> None:
    """Two things that Triton's interpreter does anew all the time are half of the time of small kernels: it replaces
    ``triton.language`` by functions of its own at every call of a device function, too, which the launch did already,
    and it makes a table at every look for a dtype."""
    from triton import language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # Triton 3.6 remembers what it replaces in another way
        return
    patch, restore, look = interpreter._patch_lang, interpreter._LangPatchScope.restore, interpreter._get_np_dtype
    patched: set[Any] = set()  # modules, while a launch runs

    @functools.cache
    def modules_of(fn: Callable) -> frozenset[Any]:
        return frozenset(x for x in (tl, tl.core) if any(x is value for value in fn.__globals__.values()))

    def patch_once(fn: Callable) -> Any:
        modules = modules_of(fn)
        if modules and modules <= patched:
            return None  # a device function, which restores nothing
        patched.update(modules)
        return patch(fn)

    def restore_all(scope: Any) -> None:
        restore(scope)
        patched.clear()

    found = functools.cache(look)

    def look_once(dtype: Any) -> Any:
        scalar = dtype.scalar
        return look(scalar) if isinstance(scalar, tl.pointer_type) else found(scalar)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_all
    interpreter._get_np_dtype = look_once


if not HAS_CUDA and importlib.util.find_spec("triton"):
    _quicken_the_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HAS_CUDA:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """What was imported lives for ever, and collections of garbage, of which Dynamo asks for many, need not look at it:
    a sixth of the time of tests of routes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo gives up on code that was compiled too often; no test may use up that limit for another. Nor does it time
    every graph's guards after a flush of the caches, which takes as long as the compilation of a small graph."""
    if guards := sys.modules.get("torch._dynamo.guards"):
        guards.profile_guard_manager = lambda *_: 0.0
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def same_global_state() -> Iterator[None]:
    """No test may leave what Dynamo guards of PyTorch (autocast, gradients, threads, determinism, ...) as it was not:
    part of it belongs to a thread, and what another thread calls would be compiled anew in every later test."""
    guard = torch._C._dynamo.guards.GlobalStateGuard()
    yield
    assert guard.check(), f"the test has changed PyTorch's global state: {guard.reason()}"


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


@pytest.fixture
def shipped_rates() -> Iterator[None]:
    """The CPU whose speed is shipped has two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def judge_contests() -> Callable[..., None]:
    """A function that fails unless ``(stream, places)`` is what contests give, up to scores within ``tolerance``."""
    return _judge_contests


def _judge_contests(key, sinks, stream, places, tolerance) -> None:
    from express_compile.kernels.select.contest import CONTEST

    B, H, contests, protected = places.shape
    rows, first = contests * CONTEST, torch.arange(contests, device=key.device) * CONTEST
    keys = key[:, :, sinks : sinks + rows].double().unflatten(2, (contests, CONTEST))
    sums = keys.sum(3).cumsum(2) + key[:, :, :sinks].double().sum(2)[:, :, None]
    mean = sums / (sinks + first + CONTEST)[:, None]
    score = -torch.cosine_similarity(keys, mean[:, :, :, None], dim=-1).flatten(2)

    lost = (stream - sinks).long()
    assert ((lost >= 0) & (lost < rows)).all(), "losers are rows"
    ends = (first + CONTEST - protected).clamp(min=0)
    contest = torch.searchsorted(ends, torch.arange(lost.shape[2], device=key.device), right=True).expand_as(lost)
    assert ((lost.diff() > 0) | (contest.diff() > 0)).all(), "losers of one contest leave in position order"
    assert (lost.sort().values.diff() > 0).all(), "a row leaves once"
    leaves = torch.full_like(score, contests, dtype=torch.int64).scatter_(2, lost, contest)
    assert (leaves >= torch.arange(rows, device=key.device) // CONTEST).all(), "no row leaves before it comes"

    filled = torch.arange(protected, device=key.device) >= (protected - first - CONTEST)[:, None]
    held = places.long().sort().values - sinks  # free places first
    assert (held + sinks)[:, :, ~filled].eq(0).all(), "free places are 0"
    assert ((held.diff() > 0) | ~filled[:, :-1]).all(), "a row has one place"
    held = held.where(filled, first[:, None])
    assert (((held >= 0) & (held < (first + CONTEST)[:, None])) | ~filled).all(), "rows that came have places"
    here = leaves.gather(2, held.flatten(2)).unflatten(2, (contests, protected)) > first[:, None] // CONTEST
    assert (here | ~filled).all(), "rows that did not leave have places"

    worst = score.gather(2, held.flatten(2)).view(held.shape).masked_fill(~filled, float("inf")).amin(-1)
    best = torch.full_like(worst, -float("inf")).scatter_reduce(2, contest, score.gather(2, lost), "amax")
    assert (worst >= best - tolerance).all(), f"better rows lost: by {(best - worst).max():.1e}"


@pytest.fixture(scope="session")
def judge_blocks() -> Callable[..., None]:
    """A function that fails unless blocks of keys were chosen as promised, up to scores within ``tolerance``."""
    return _judge_blocks


def _judge_blocks(chosen, q, k, config, scale, start=None, tolerance=1e-4) -> None:
    """Fails unless ``chosen`` has the form that is promised, and the best blocks up to ``tolerance``, decision by
    decision. Blocks of queries without any chooser may choose as they like."""
    from express_compile.kernels.select import blocks as S

    layout = S.query_blocks(config, q.shape[2], k.shape[2])
    mass = S.block_mass(q.double(), k.double(), config, scale, start)
    candidates = torch.from_numpy(layout.candidates).to(chosen.device)
    fewer = candidates.clamp(max=config.blocks)
    taken = torch.arange(config.blocks, device=chosen.device) < fewer[:, None]
    assert chosen.dtype == torch.int32 and chosen.shape == (*mass.shape[:3], config.blocks)
    assert (chosen == S.NONE).eq(~taken).all(), "as many as there are, NONE behind"
    assert ((chosen < candidates[:, None]) & (chosen >= 0) | ~taken).all(), "blocks are candidates"
    assert ((chosen.diff() > 0) | ~taken[:, 1:]).all(), "blocks ascend"
    if not mass.shape[3]:
        return
    held = torch.zeros(*mass.shape[:3], mass.shape[3] + 1, dtype=torch.bool, device=chosen.device)
    held = held.scatter_(3, chosen.long().where(taken, mass.shape[3]), True)[..., :-1]
    worst = mass.masked_fill(~held, math.inf).amin(-1)
    other = torch.arange(mass.shape[3], device=chosen.device) < candidates[:, None]
    best = mass.masked_fill(held | ~other, -math.inf).amax(-1)
    assert (worst >= best - tolerance).all(), f"better blocks were left: by {(best - worst).max():.1e}"


@pytest.fixture(scope="module")
def listening_model() -> torch.nn.Module:
    """A tiny Llama of three layers: much of what it says comes from the second, and nothing from the last."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer, gain in zip(model.model.layers, (1.0, 20.0, 0.0), strict=True):
            layer.self_attn.o_proj.weight.mul_(gain)
        model.lm_head.weight.mul_(20)
    return model
