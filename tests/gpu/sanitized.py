"""Every kernel of the package on small problems, for compute-sanitizer (``make gpu-sanitize``).

    python tests/gpu/sanitized.py                     # all groups in this process, without a tool
    python tests/gpu/sanitized.py GROUP...            # some of them
    python tests/gpu/sanitized.py --tool memcheck     # one process per group, side by side, each under the tool

Results are compared as in the tests beside this file, whose helpers run here at other sizes. Ops run four times, the
last time as the code that their calls became. Ends with 1 where a result is wrong, where the tool has found something
or did not end in time, where it did not find what was planted for it, and where a kernel was never launched. PyTorch's
own kernels are not checked, and its memory is not pooled, so that the tool knows where every tensor ends.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import conftest
import test_backward
import test_bernoulli
import test_decode
import test_pages
import test_santa
import test_segments
import test_sparse
import test_thinformer
import torch
from test_santa import relative
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import express_compile.kernels
from express_compile.core.method import METHODS
from express_compile.core.rows import Rows, to_numbers
from express_compile.kernels import express as E
from express_compile.kernels import heads as heads_kernels
from express_compile.kernels import launch as launching
from express_compile.kernels import prepared
from express_compile.kernels.attend import hopper
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.attend.segments import causal_table
from express_compile.kernels.heads import PerHead
from express_compile.kernels.held import Held
from express_compile.kernels.launch import Random, philox_uniform
from express_compile.kernels.select import blocks as B
from express_compile.kernels.select import contest as C
from express_compile.kernels.select import hopper as scoring
from express_compile.kernels.select.thinning import draws_triton
from express_compile.kernels.sparse import Pattern

_spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec is not None and _spec.loader is not None
judges = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(judges)

N, LAYER, BF16 = 1000, 3, torch.bfloat16
SEEDS = (5, 6, 7)
"""A decision that is within rounding of its margin goes either way; with the next seed there is another one."""
BLOCKS, WINDOW, WHOLE = Rows(4, 64, selected=3), Rows(4, 64), Rows(everything=True)
CORE, KEPT, PLACES = Rows(4, 64, 16), Rows(4, 64, 16, 64), Rows(4, 64, protected=64)
MIXED = (BLOCKS, WHOLE, KEPT, CORE)
EXPRESS = dict(s=64, inflation=-1, sinks=4, recent=64, protected=0, halving="balanced", flatten=0.0, block=128,
               min_length=0)  # fmt: skip
HEADS = dict(halving="balanced", inflation=-1, flatten=0.0, block=128, min_length=0)
THINFORMER = dict(s=64, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0)


# ---- ops against their references on the CPU ------------------------------------------------------------------------


def tokens(
    n: int = N, Lq: int | None = None, H: int = 4, H_kv: int = 2, D: int = 128, B: int = 1, seed: int = 0
) -> list[Any]:
    """Query, key and value in bfloat16, strided as models produce them."""
    generator = torch.Generator("cuda").manual_seed(n + seed)
    q, k, v = (torch.randn(B, n, h, D, generator=generator, device="cuda").to(BF16) for h in (H, H_kv, H_kv))
    return [x.transpose(1, 2) for x in (q[:, n - (Lq or n) :], k, v)]


def padded(n: int = N) -> torch.Tensor:
    return torch.arange(n, device="cuda") >= torch.tensor([[100], [0]], device="cuda")


def copied(x: Any) -> Any:
    """``x`` on the CPU, half floats in float32."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().cpu().float() if x.is_floating_point() else x.cpu()


def on_cpu(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` gives for copies of its arguments, by plain PyTorch."""
    return function(*([copied(y) for y in x] if isinstance(x, list) else copied(x) for x in args))


def close(found: Any, expected: Any, allowed: float) -> None:
    """Raise ``AssertionError`` unless the relative error of ``found`` is at most ``allowed``."""
    error = relative(copied(found), expected)
    assert error <= allowed, f"relative error {error:.1e}, at most {allowed:.0e} is allowed"


def of_op(
    op: Any, given: list[Any], *others: Any, seed: int, trained: bool = True, allowed: float = 1e-2, **options: Any
) -> None:
    """``op`` and its gradient, with ``others`` behind ``given``, against themselves on the CPU."""
    drawn, scale = torch.tensor(seed, device="cuda"), given[0].shape[-1] ** -0.5
    grad = torch.randn(given[0].shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(BF16)

    def run(given: list[Any], drawn: torch.Tensor, grad: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_(trained) for x in given]
        out, lse = op(*leaves, *others, drawn, scale, LAYER, **options)
        return (out.detach(), lse, *(torch.autograd.grad(out, leaves, grad) if trained else ()))

    found = run(given, drawn, grad, *others)
    for _ in range(3):  # recorded, recorded, and code
        assert all(torch.equal(x, y) for x, y in zip(run(given, drawn, grad, *others), found, strict=True))
    out, lse, *grads = on_cpu(run, given, drawn, grad, *others)
    close(found[0], out, allowed)
    seen = lse.isfinite()
    assert torch.equal(seen, copied(found[1]).isfinite()) and (copied(found[1]) - lse)[seen].abs().max() < 3e-3
    for x, e in zip(found[2:], grads, strict=True):
        close(x, e, 2 * allowed)


def op_of(name: str, given: Callable[..., list[Any]], padding: bool = False, **options: Any) -> Callable[[int], None]:
    return lambda seed: of_op(
        METHODS[name].op, given(seed=seed), padded() if padding else None, seed=seed, trained=name != "santa", **options
    )


def express(protected: int, padding: bool = False, **sizes: Any) -> Callable[[int], None]:
    options = {**EXPRESS, "protected": protected, "s": 16 if protected else 64}
    return op_of("express", partial(tokens, B=1 + padding, **sizes), padding, **options)


def heads(*rows: Rows, last: int = 0, padding: bool = False, **sizes: Any) -> Callable[[int], None]:
    given = partial(tokens, H=8, H_kv=4, B=1 + padding, **sizes)
    return op_of("heads", given, padding, **HEADS, rows=to_numbers(rows), last=last)


def packed(seed: int, **sizes: Any) -> None:
    """Sequences of 700 tokens, none, one and 299."""
    given = [x[0].transpose(0, 1) for x in tokens(**sizes, seed=seed)]
    starts = torch.tensor([0, 700, 700, 701, N], dtype=torch.int32, device="cuda")
    of_op(E.VARLEN, given, starts, 700, seed=seed, **{**EXPRESS, "s": 16, "protected": 64})


# ---- kernels --------------------------------------------------------------------------------------------------------


def attend(D: int, Dv: int, past: int, indexed: bool) -> None:
    """Of the tokens behind ``past`` of them, over tokens and rows, the last fifth by index; and over all tokens."""
    q, k, v = test_segments.tokens(N, 2, 4, 2, D, Dv, BF16)
    table, rows, index = test_segments.problem(past, 16, 77, 128, k, v, indexed)
    test_segments.check((q[:, :, past:], k, v, *rows), table, D**-0.5, index)
    causal = causal_table(N - past, N)
    test_segments.check((q[:, :, past:], k, v, k[:, :, :0], v[:, :, :0]), causal, D**-0.5, None)


def gradients(D: int, Dv: int, protected: int) -> None:
    config = E.Express(16, inflation=2, sinks=4, recent=64, protected=protected)
    test_backward.check(test_backward.problem(N, config, 2, 4, 2, D, Dv, Lq=N - 37)[1])


def thinning(rule: str, D: int, seed: int) -> None:
    """Every halving along its own decisions, and the copies of what stays."""
    _, k, v = tokens(1300, D=D, seed=seed)
    config = E.Express(64, inflation=2, sinks=4, recent=64, halving=rule, protected=0)
    layout, drawn = E.make_layout(config, 1300, 1300), torch.tensor(seed, device="cuda")
    index, *copies = E.thin_triton(k, v, layout, D**-0.5, drawn, LAYER)
    stream = torch.arange(4, 4 + layout.schedule.tokens, device="cuda", dtype=torch.int32)
    arena = torch.cat([stream.expand(*index.shape[:2], -1), index], 2)
    assert conftest._judge(k, v, arena, layout.schedule, config.rule, D**-0.5, drawn, LAYER) > 500 or rule == "uniform"
    assert all(torch.equal(y, E.gather_rows(x, index)) for x, y in zip((k, v), copies, strict=True))


def draws(seed: int) -> None:
    drawn, numbers = torch.tensor(seed, device="cuda"), torch.tensor([4, 0, 3], dtype=torch.int32, device="cuda")
    found = draws_triton(Random(drawn, LAYER, numbers), 7, 100, 2)
    at = torch.arange(7, 107, device="cuda")
    assert torch.equal(found, philox_uniform(drawn, LAYER, at, 0, 2, numbers[:, None].long()))


def contest(D: int, protected: int) -> None:
    k = tokens(1100, H_kv=3, D=D, B=2)[1]
    judges._judge_contests(k, 4, *C.compete(k, 4, 4, protected), 1e-5)


def choose(D: int, Lq: int, config: B.BlockConfig) -> None:
    q, k, _ = tokens(1100, Lq, D=D, B=2)
    for start in (None, torch.tensor([1100 - Lq, 1100 - Lq + min(150, Lq - 1)], device="cuda")):
        chosen = B.select_blocks_triton(2 * q, k, config, D**-0.5, start)
        judges._judge_blocks(chosen, 2 * q, k, config, D**-0.5, start)


def cache(rows: tuple[Rows, ...], dtype: torch.dtype, seed: int) -> None:
    """Tokens at once, a few, and one by one, of which a contest is due in the middle."""
    q, k, v = (x.to(dtype) for x in tokens(620, H=2 * len(rows), H_kv=len(rows), D=64, B=2, seed=seed))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        held, n = Held(PerHead(rows), k, v, Random(drawn, LAYER), 0.125), 566
        held.fill(k[:, :, :n], v[:, :, :n])
        outs = [held.extend(*(x[:, :, n : n + 5] for x in (q, k, v)))]
        for i in range(n + 5, n + 20):
            held.settle(single=True)
            outs.append(held.step(*(x[:, :, i : i + 1] for x in (q, k, v))))
        return torch.cat(outs, 2)

    given = 4 * q, k, v, torch.tensor(seed, device="cuda")
    close(run(*given), on_cpu(run, *given), 1e-2)


def decode(D: int, n: int, kinds: list[str]) -> None:
    test_decode.test_the_kernels_give_what_the_reference_gives((2, 8, 2, n, N, D, D), BF16, kinds)
    q, k, v = test_decode.tokens(2, 8, 2, 1, N, D)
    lengths = torch.tensor([N, 33], dtype=torch.int32, device="cuda")
    first, *others = (decode_attention(q, k, v, 0.1, lengths=lengths)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def sparse(kind: str, D: int, parts: str) -> None:
    test_sparse.check(*test_sparse.tensors(700, 700, 2, 4, 2, D), Pattern(kind, 64, 8, 1, parts), 0.1)
    test_sparse.check(*test_sparse.tensors(300, 727, 1, 4, 2, D), Pattern(kind, 100, 13, 2, parts), 0.1)


def thinformer(Lk: int, padding: bool = False, **sizes: Any) -> Callable[[int], None]:
    return op_of("thinformer", partial(tokens, Lk, B=1 + padding, **sizes), padding, **THINFORMER)


UNEVEN = B.BlockConfig(5, sinks=70, recent=33, samples=3, stride=40, block=32)
# In half floats other rows are drawn than in float32, which "draws" has; the log-sum-exp has no draws.
SANTA = dict(allowed=0.3, draws=[64], fraction=0.0, sampler="sys", shared=True, min_length=0)
KINDS = test_decode.KINDS


def step_of(**sizes: Any) -> list[Any]:
    q, k, v = tokens(Lq=1, **sizes)
    return [2 * q, k.contiguous(), v.contiguous()]


def by_feature(**sizes: Any) -> list[Any]:
    q, k, v = step_of(**sizes)
    return [q, k.mT.contiguous().mT, v]


Case = Callable[[int], None]


def always(function: Callable[..., None], *args: Any) -> Case:
    """A case without draws of its own."""
    return lambda seed: function(*args)


def on_hopper(case: Case) -> Case:
    """``case`` with the kernels for Hopper wherever they can run, at any length; other cases are without them."""

    def run(seed: int) -> None:
        with mock.patch.object(hopper, "takes", TAKES), mock.patch.object(scoring, "LONG", 0):
            case(seed)

    return run


def beside(case: Case) -> Case:
    """``case`` with the last queries in the launch of the others, however few these are."""

    def run(seed: int) -> None:
        with mock.patch.object(heads_kernels, "_last_beside", lambda call, own, last: call.key.is_cuda):
            case(seed)

    return run


TAKES = hopper.takes
# in a group of their own: if the tool cannot follow warps that are specialised, the other kernels are checked still
ON_HOPPER: dict[str, Case] = {
    "attend, rows side by side": always(attend, 128, 128, 232, False),
    "attend, rows by index": always(attend, 128, 128, 200, True),
    "attend, D=64, Dv=128": always(attend, 64, 128, 200, True),
    "express": express(0),
    "express, protected": express(64),
    "express, padded": express(0, True),
    "express, protected, padded": express(64, True),
    "express, packed": packed,
    "heads": heads(*MIXED),
    "heads, rows per query head": heads(BLOCKS, WINDOW, WHOLE, KEPT, *MIXED),
    "heads, last 200": beside(heads(*MIXED, last=200)),
    "blocks, D=64": always(choose, 64, N, B.BlockConfig(16, block=64)),
    "blocks, D=128": always(choose, 128, N, B.BlockConfig(4)),
    "blocks, uneven": always(choose, 128, 700, UNEVEN),
}
GROUPS: dict[str, dict[str, Case]] = {
    "hopper": {name: on_hopper(case) for name, case in ON_HOPPER.items()},
    "attend": {
        "rows side by side": always(attend, 128, 128, 232, False),
        "rows by index": always(attend, 128, 128, 200, True),
        "rows by index, D=64": always(attend, 64, 64, 200, True),
        "gradients": always(gradients, 128, 128, 0),
        "gradients, D=64": always(gradients, 64, 64, 64),
        "gradients of rows": always(test_backward.test_accumulated_rows, 900, 70, 80),
        "gradients of many rows": always(test_backward.test_accumulated_rows, 300, 2000, 128),
    },
    "express": {
        "op": express(0),
        "op, D=64": express(0, D=64),
        "op, protected": express(64),
        "op, padded": express(0, True, D=64),
        "op, protected, padded": express(64, True),
        "op, a chunk": express(64, Lq=300),
        "op, packed": packed,
        "op, packed, D=64": partial(packed, D=64),
    },
    "heads": {
        "op": heads(*MIXED),
        "op, no coreset": heads(BLOCKS, BLOCKS, PLACES, WINDOW, D=64),
        "op, rows per query head": heads(BLOCKS, WINDOW, WHOLE, KEPT, *MIXED),
        "op, last 64": heads(*MIXED, last=64),
        "op, last 64 in one launch": beside(heads(*MIXED, last=64)),
        "op, last 64, padded": heads(*MIXED, last=64, padding=True, D=64),
    },
    "select": {
        "thinning": partial(thinning, "balanced", 128),
        "thinning, D=64": partial(thinning, "kernel", 64),
        "thinning, coins": partial(thinning, "uniform", 128),
        "draws": draws,
        "contest": always(contest, 128, 64),
        "contest, more places": always(contest, 64, 300),
        "blocks, D=64": always(choose, 64, N, B.BlockConfig(16, block=64)),
        "blocks, D=128": always(choose, 128, N, B.BlockConfig(4)),
        "blocks, uneven": always(choose, 128, 700, UNEVEN),
    },
    "decode": {
        "rows of all kinds": always(decode, 128, 1, KINDS),
        "D=64, 4 queries": always(decode, 64, 4, KINDS),
        "64 queries": always(decode, 128, 64, ["all", "everything"]),
        "op of exact steps": always(test_decode.test_the_op_of_exact_steps),
        "pages": always(test_pages.test_the_kernels_choose_what_the_reference_chooses, 2, 8, 2, 1, 900, 128, BF16),
        "pages, 4 queries": always(
            test_pages.test_the_kernels_choose_what_the_reference_chooses, 1, 8, 2, 4, N, 64, BF16
        ),
        "pages, a step": always(
            test_pages.test_a_step_in_one_launch_lists_what_the_reference_chooses, 2, 6, 2, 700, 128, BF16
        ),
    },
    "cache": {
        "rows": partial(cache, (WINDOW, CORE, WHOLE, Rows(4, 60, 16, 64)), BF16),
        "pages": partial(cache, (Rows(4, 60, selected=2), Rows(0, 100, selected=3)), torch.float32),
    },
    "santa": {
        "op": op_of("santa", step_of, **SANTA),
        "op, padded": op_of("santa", partial(step_of, B=2), True, **SANTA),
        "op, query rounded": op_of("santa", by_feature, **SANTA, bernoulli=4),
        "draws": always(test_santa.test_draws_are_those_of_the_reference, "sys", 600, 1, 4, 1, True),
        "all rows": always(test_santa.test_all_rows_are_exact_attention, None, BF16, 700, 4, 1, 6, 1, 96),
        "window, soft-cap, sinks": always(
            test_santa.test_windows_soft_caps_and_sinks_over_all_rows, None, BF16, "all", 4, True
        ),
        "rounding": always(test_bernoulli.test_the_kernel_rounds_as_the_reference, BF16, 4, True),
        "all rows, query rounded": always(
            test_bernoulli.test_all_rows_are_exact_attention_of_the_rounded_query, None, BF16, 700, 4, 1, 6, 1, 96, 4
        ),
    },
    "thinformer": {
        "op": thinformer(1024),
        "op, stretched, D=64": thinformer(N, D=64),
        "op, padded": thinformer(N, True),
        "gradients": always(test_thinformer.test_gradients, BF16, True, 600, 900, 64),
        "decisions": always(
            test_thinformer.test_halving_decisions, None, conftest._judge, "balanced", BF16, 777, 32, 40
        ),
    },
    "sparse": {
        **{
            f"{kind}, {parts}, D={D}": always(sparse, kind, D, parts)
            for kind, parts, D in [
                ("fixed", "merged", 128), ("strided", "merged", 64), ("fixed", "far", 64), ("strided", "local", 128),
            ]
        },
        "op": op_of("sparse", tokens, pattern="fixed", stride=64, summary=8, groups=1, parts="merged"),
        "op, padded": op_of(
            "sparse", partial(tokens, B=2), True, pattern="strided", stride=64, summary=8, groups=1, parts="merged"
        ),
    },
}  # fmt: skip


# ---- what was launched ----------------------------------------------------------------------------------------------


def kernels() -> dict[str, str]:
    """What is launched by the host: module and name of every kernel of the package -> its name on the device."""
    found = {}
    for info in pkgutil.walk_packages(express_compile.kernels.__path__, "express_compile.kernels."):
        for name, x in vars(importlib.import_module(info.name)).items():
            fn = getattr(x, "fn", None)
            if name.endswith("kernel") and getattr(fn, "__module__", None) == info.name:
                found[f"{info.name.removeprefix('express_compile.kernels.')}.{name}"] = name
    return found


def launched() -> set[str]:
    names = {
        f"{fn.__module__.removeprefix('express_compile.kernels.')}.{fn.__name__}" for fn, *_ in launching._compiled
    }
    assert names <= {*kernels()}, f"{names - {*kernels()}}: kernels that the host launches have names that say so"
    return names


def run(group: str) -> int:
    """How many cases of a group fail; a line for each."""
    failed = 0
    for name, case in GROUPS[group].items():
        begin, code, error = time.perf_counter(), RUNS[0], "ok"
        for seed in SEEDS:
            prepared.forget()  # code of the same call by other kernels
            try:
                case(seed)
                torch.cuda.synchronize()
                error = "ok"
                break
            except AssertionError as wrong:
                error = f"WRONG: {str(wrong)[:200]}"
            except Exception as other:  # an error of the device is one of all cases that follow
                error = f"FAILED: {type(other).__name__}: {str(other)[:300]}"
                break
        failed += error != "ok"
        print(
            f"{group}: {name}: {error}, seed {seed}, {time.perf_counter() - begin:.1f} s, "
            f"{RUNS[0] - code} calls that were code", flush=True,
        )  # fmt: skip
    return failed


RUNS = [0]


def counting(code_of: Callable[..., Any]) -> Callable[..., Any]:
    """``prepared._code_of`` whose code counts in :data:`RUNS` how often it runs."""

    def code(*args: Any) -> Any:
        call = code_of(*args)

        def counted(*given: Any) -> Any:
            RUNS[0] += 1
            return call(*given)

        return None if call is None else counted

    return code


# ---- under the tool -------------------------------------------------------------------------------------------------

TOOLS = {
    "memcheck": "Invalid __global__ read",
    "racecheck": "Race reported",
    "initcheck": "Uninitialized __global__ memory read",
}
"""What each of them says of the mistake that is planted for it."""
PLANTED = "planted"


@gluon.jit
def read_behind(p_x, p_out, offset, LAYOUT: gl.constexpr):
    o_x = gl.arange(0, 128, LAYOUT)
    gl.store(p_out + o_x, gl.load(p_x + offset + o_x))


@gluon.jit
def _write(memory, x: gl.constexpr, LAYOUT: gl.constexpr):
    memory.store(gl.full([128], x, gl.float32, LAYOUT))


@gluon.jit
def write_twice(p_out, LAYOUT: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(_write, (memory, 1.0, LAYOUT)), (_write, (memory, 2.0, LAYOUT))], [4], [24])
    gl.store(p_out + gl.arange(0, 128, LAYOUT), memory.load(LAYOUT))


def plant(tool: str) -> None:
    """Run a kernel with the mistake that ``tool`` is there to find."""
    layout = gl.BlockedLayout([1], [32], [4], [0])
    x = torch.empty(128, device="cuda") if tool == "initcheck" else torch.zeros(128, device="cuda")
    if tool == "racecheck":
        write_twice[(1,)](x, layout, num_warps=4)
    else:
        read_behind[(1,)](x, torch.zeros_like(x), 4096 if tool == "memcheck" else 0, layout, num_warps=4)
    torch.cuda.synchronize()


def command(tool: str, group: str, port: int) -> list[str]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    names = "|".join(sorted({*kernels().values(), "read_behind", "write_twice"}))
    # what PyTorch's kernels write counts as written only where these are looked at, too
    only = [] if tool == "initcheck" else ["--kernel-name", f"regex=^({names})$"]
    said = ["--error-exitcode", "9", "--print-limit", "20", "--show-backtrace", "device"]
    among = ["--target-processes", "application-only", "--port", str(port)]
    own = ["--plant", tool] if group == PLANTED else [group]
    return [sanitizer, "--tool", tool, *said, *among, *only, sys.executable, __file__, *own]


def side_by_side(tool: str, groups: list[str], limit: float) -> bool:
    """Whether all is well with ``groups`` under ``tool``, and what was planted was found; said of each when it ends."""
    end, seen, bad = time.monotonic() + limit, set(), []
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for i, group in enumerate([PLANTED, *groups]):
            with Path(folder, group).open("w") as output:  # a pipe stays open as long as what the tool has started
                running[group] = subprocess.Popen(
                    command(tool, group, 49152 + 16 * i),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        while running:
            time.sleep(0.2)
            is_late = time.monotonic() > end
            for group, process in [(x, y) for x, y in running.items() if is_late or y.poll() is not None]:
                del running[group]
                said = Path(folder, group).read_text(errors="replace")
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    said += f"\n={group}: not done after {limit:.0f} s"
                for line in re.findall(r"^launched: (.*)$", said, re.MULTILINE):
                    seen.update(line.split())
                summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
                print(f"---- {tool}, {group}: exit status {process.poll()}, {'; '.join(summary)}", flush=True)
                print("\n".join(x for x in said.splitlines() if x.startswith(f"{group}:")), flush=True)
                if group == PLANTED:
                    if TOOLS[tool] not in said:
                        bad.append(f"what was planted was not found:\n{said[-3000:]}")
                elif process.poll() != 0:
                    bad.append(f"{group}:\n" + "\n".join(x for x in said.splitlines() if x.startswith("="))[:6000])
    print(*bad, sep="\n\n")
    return is_whole(seen, groups) and not bad


def is_whole(seen: set[str], groups: list[str]) -> bool:
    """Whether every kernel was launched, where all groups ran."""
    missing = {*kernels()} - seen if {*groups} == {*GROUPS} else set()
    if not hopper._is_hopper(torch.device("cuda")):
        missing -= {"attend.hopper.segment_kernel", "select.hopper.score_kernel"}
    print(
        f"{len(seen)} of {len(kernels())} kernels launched" + "".join(f"\nNEVER LAUNCHED: {x}" for x in sorted(missing))
    )
    return not missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}; all of them if none is named")
    parser.add_argument("--tool", choices=TOOLS, help="run each group in a process under this tool")
    parser.add_argument("--limit", type=float, default=500, help="seconds after which they are ended (default 500)")
    parser.add_argument("--plant", choices=TOOLS, help="run nothing but a kernel with a mistake for this tool")
    args = parser.parse_args()
    if args.plant:
        plant(args.plant)
        return 0
    groups = args.groups or [*GROUPS]
    if unknown := {*groups} - {*GROUPS}:
        parser.error(f"groups: {', '.join(sorted(unknown))}; must be some of {', '.join(GROUPS)}")
    if args.tool:
        return int(not side_by_side(args.tool, groups, args.limit))
    with (
        mock.patch.object(prepared, "ENABLED", True),
        mock.patch.object(prepared, "_code_of", counting(prepared._code_of)),
        mock.patch.object(hopper, "takes", lambda *_: False),
    ):
        failed = sum(run(group) for group in groups)
    seen = launched()
    print("launched:", *sorted(seen))
    return int(failed > 0 or not is_whole(seen, groups))


if __name__ == "__main__":
    sys.exit(main())
