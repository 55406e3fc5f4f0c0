"""Calls that became code give the bits that bodies give, with other tensors, layers and streams, and in CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from express_compile import METHODS, AttentionSpec, Mask, Policy, Rows, Site
from express_compile.kernels import op as ops
from express_compile.kernels import prepared

H, H_KV, D = 8, 4, 64
MIXED = (Rows(32, 64, selected=4), Rows(everything=True), Rows(4, 64, 16, 64), Rows(4, 64, 16))
CASES: dict[str, tuple[str, int, int, bool, dict[str, Any]]] = {
    "express": ("express", 1500, 1500, False, dict(budget=32, sinks=4, recent=64, protected=0)),
    "express, protected": ("express", 700, 1500, False, dict(budget=32, sinks=4, recent=64, protected=64)),
    "express, padded": ("express", 1500, 1500, True, dict(budget=32, sinks=4, recent=64, protected=64)),
    "heads": ("heads", 1500, 1500, False, dict(rows=MIXED)),
    "heads, last": ("heads", 1500, 1500, False, dict(rows=(*MIXED[:2], *MIXED[1:3]), last=5)),
    "heads, last, few others": ("heads", 100, 1500, False, dict(rows=MIXED, last=5)),
    "heads, last, no others": ("heads", 9, 1500, False, dict(rows=MIXED, last=17)),
    "thinformer": ("thinformer", 1024, 1024, False, dict(budget=64)),
    "sparse": ("sparse", 1024, 1024, False, dict(pattern="strided")),
    "santa": ("santa", 1, 2048, False, dict(budget=64)),
}


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ENABLED", True)


def call_of(case: str, dtype: torch.dtype, n: int) -> tuple[str, list[Any], dict[str, Any]]:
    """The name of an op and arguments of its n-th call, all of one kind and no two alike."""
    name, Lq, Lk, padded, options = CASES[case]
    torch.manual_seed(n)
    qkv = [torch.randn(2, h, L, D, device="cuda", dtype=dtype) for h, L in ((H, Lq), (H_KV, Lk), (H_KV, Lk))]
    padding = torch.arange(Lk, device="cuda") >= torch.tensor([[n * 100], [7 * n]], device="cuda") if padded else None
    mask = Mask() if name == "thinformer" else Mask(causal=True, offset=Lk - Lq)
    spec = AttentionSpec(2, H, H_KV, Lq, Lk, D, D, dtype, "cuda", 0.1, mask)
    policy = Policy(methods=(name,), min_length=0, method_options={name: options})
    return name, [*qkv, padding, torch.tensor(n, device="cuda"), 0.1, 11 * n + 3], METHODS[name].params(
        Site(spec, f"layers.{n}"), policy
    )  # fmt: skip


def counted() -> Any:
    """Counts the runs of code."""
    made, code_of = mock.Mock(), prepared._code_of

    def counting(*args: Any) -> Any:
        call = code_of(*args)
        assert call is not None, "the launchers of this Triton are known"
        return lambda *given: (made(), call(*given))[1]

    prepared.forget()
    return made, mock.patch.object(prepared, "_code_of", counting)


def body(name: str, *args: Any, **options: Any) -> Any:
    """What the body of an op gives; calls inside of it are no code either."""
    with mock.patch.object(prepared, "ENABLED", False):
        return ops._ON_CUDA[name].__wrapped__(*args, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_code_gives_the_bits_of_the_body(poison: None, case: str, dtype: torch.dtype) -> None:
    made, patched = counted()
    with patched, torch.no_grad():
        for n in range(6):
            name, args, options = call_of(case, dtype, n)
            outs = METHODS[name].op(*args, **options)
            expected = body(name, *args, **options)
            assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True)), n
    assert made.call_count == 3


@pytest.mark.parametrize("case", [case for case in CASES if "santa" not in case])
def test_code_of_gradients_gives_their_bits(case: str) -> None:
    made, patched = counted()
    with patched:
        for n in range(5):
            name, args, options = call_of(case, torch.bfloat16, n)
            leaves = [x.requires_grad_() for x in args[:3]]
            out, lse = METHODS[name].op(*args, **options)
            grad = torch.randn_like(out)
            found = torch.autograd.grad(out, leaves, grad)
            with torch.no_grad():
                expected = body(f"{name}_backward", grad, out, lse, *args, **options)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), n
    assert made.call_count == 4


@pytest.mark.parametrize("case", ["express, protected", "heads", "heads, last"])
def test_code_runs_in_cuda_graphs_and_on_other_streams(case: str) -> None:
    made, patched = counted()
    with patched, torch.inference_mode():
        name, args, options = call_of(case, torch.bfloat16, 0)
        op = METHODS[name].op
        for _ in range(4):
            expected = op(*args, **options)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = op(*args, **options)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(aside, expected, strict=True))
        with torch.cuda.graph(graph):
            outs = op(*args, **options)
        assert made.call_count == 3
        _, others, _ = call_of(case, torch.bfloat16, 1)
        for x, y in zip(args[:3], others[:3], strict=True):
            x.copy_(y)
        graph.replay()
        expected = body(name, *args, **options)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_code_takes_no_more_memory_than_the_body(case: str) -> None:
    """Of what is asked for: the allocator gives up to 1 MB more, by what is free."""
    made, patched = counted()
    name, args, options = call_of(case, torch.bfloat16, 0)
    taken = []
    with patched, torch.no_grad():
        for f in (*[functools.partial(body, name)] * 2, *[METHODS[name].op] * 5):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            out = f(*args, **options)
            taken.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
            del out
    assert made.call_count == 2
    assert taken[-1] <= 1.05 * taken[1], taken


@pytest.mark.parametrize("case", CASES)
def test_calls_past_the_dispatcher_give_the_bits_of_the_body(poison: None, case: str) -> None:
    """Of any layer, and without gradients only."""
    made, patched = counted()
    with patched:
        with torch.no_grad():
            for n in range(5):
                name, args, options = call_of(case, torch.bfloat16, n)
                METHODS[name].op(*args, **options)
            expected = []
            for n in range(5, 8):
                name, args, options = call_of(case, torch.bfloat16, n)
                expected.append((args, options, body(name, *args, **options)))
            never = mock.Mock(side_effect=AssertionError("a call went through the dispatcher"))
            with mock.patch.object(ops, "_is_next", never):
                for args, options, outs in expected:
                    found = METHODS[name].op(*args, **options)
                    assert all(torch.equal(a, b) for a, b in zip(found, outs, strict=True))
        assert made.call_count == 5
        if case != "santa":
            args, options, outs = expected[0]
            leaf = args[0].detach().requires_grad_()
            out, _ = METHODS[name].op(leaf, *args[1:], **options)
            assert torch.equal(out, outs[0]) and out.requires_grad
