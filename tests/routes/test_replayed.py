"""``cuda_graphs=True``: what is replayed gives what runs eagerly, and what cannot be says why.

No GPU is needed: a replay is inductor's program here, or a stand-in that writes every result into the memory of the
first one, as a CUDA graph does.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from express_compile import is_rewritten, restore_attention, rewrite_attention, watch
from express_compile.routes import compile as backend
from express_compile.routes import replayed
from express_compile.routes.compile import express, split_options

N, C, H = 80, 16, 2
THIN: dict[str, Any] = {
    "methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0,
    "method_options": {"express": {"block": 16}},
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Parts(Attention):
    """Gives what shares memory, and a view of what it was given."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y[..., :4], y[..., 4:], x[:, 1:]


class Masked(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.ones(256, 256, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        mask = self.causal[: x.shape[1], : x.shape[1]]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def build(make: type[nn.Module] = Attention, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    return rewrite_attention(model, **THIN, **options)


def states(n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, n, C, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A stand-in for inductor with CUDA graphs. made: of every program, what it was compiled with; replays: of all."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.replays = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, patches: dict[str, Any]) -> Callable[..., Any]:
        self.made.append(patches)
        memory: dict[Any, list[torch.Tensor]] = {}

        def call(*args: Any) -> Any:
            self.replays += 1
            out, given = gm(*args), {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            own = memory.setdefault(tuple(x for x in args if type(x) is int), list(out))
            for x, y in zip(own, out, strict=True):
                if y.untyped_storage().data_ptr() not in given:
                    x.copy_(y)
            return [y if y.untyped_storage().data_ptr() in given else x for x, y in zip(own, out, strict=True)]

        return call


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed, "_RECORDS_ON", "cpu")


@pytest.fixture
def recorder(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(replayed, "compile_with_inductor", recorder)
    yield recorder


def said(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message).partition("without CUDA graphs: ")[2] for w in record if "cuda_graphs" in str(w.message)]


# ---- what is replayed ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_program_of_inductor_gives_the_bits_of_the_graph(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[Any] = []
    compiled = replayed._compiled
    monkeypatch.setattr(
        replayed,
        "_compiled",
        lambda *given: (lambda call: lambda *args: (replays.append(1), call(*args))[1])(compiled(*given)),
    )
    eager, model = build(seed=3), build(seed=3, cuda_graphs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for n in (N, N, N, 96, 96, 111, 96, N, N):
            x = states(n, seed=len(replays))
            assert torch.equal(model(x), eager(x))
    assert (
        len(replays) == 5
    )  # not the first of a length; the last two are of a graph of any length, the first three not
    assert not torch.equal(model(x), build(seed=4)(x))
    restore_attention(model)
    assert not torch.equal(model(x), eager(x))


@torch.no_grad()
def test_it_is_asked_for_cuda_graphs_of_what_runs_eagerly(recorder: Recorder) -> None:
    model = build(cuda_graphs=True)
    model(states())
    (patches,) = recorder.made
    assert patches["triton.cudagraphs"] and patches["triton.cudagraph_or_error"] and patches["fallback_by_default"]
    assert not recorder.replays
    build()(states())
    assert len(recorder.made) == 1  # off by default


@torch.no_grad()
def test_results_stay_when_the_next_call_comes(recorder: Recorder) -> None:
    eager, model = build(), build(cuda_graphs=True)
    inputs = [states(seed=i) for i in range(4)]
    results = [model(x) for x in inputs]
    assert recorder.replays == 3
    assert all(torch.equal(y, eager(x)) for x, y in zip(inputs, results, strict=True))
    assert not torch.equal(results[1], results[2])


@torch.no_grad()
def test_a_stand_in_whose_results_are_not_copied_writes_over_them(recorder: Recorder, monkeypatch: Any) -> None:
    """Negative control of the test before."""
    monkeypatch.setattr(replayed, "_copied", lambda out, given: tuple(out))
    model = build(cuda_graphs=True)
    results = [model(states(seed=i)) for i in range(4)]
    assert torch.equal(results[1], results[3]) and not torch.equal(results[0], results[3])


@torch.no_grad()
def test_results_share_the_memory_they_shared(recorder: Recorder) -> None:
    model, x = build(Parts, cuda_graphs=True), states()
    for _ in range(3):
        a, b, view = model(x)
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert a.stride() == (N * C, C, 1) and b.storage_offset() == 4
        assert torch.equal(torch.cat([a, b], -1), build()(x))
    assert recorder.replays == 2


@torch.no_grad()
@pytest.mark.parametrize("stand_in", [True, False])
def test_a_fresh_seed_is_drawn_at_every_replay(on_cpu: None, request: Any, stand_in: bool) -> None:
    recorder = request.getfixturevalue("recorder") if stand_in else None
    eager, model, x = build(seed=None), build(seed=None, cuda_graphs=True), states()
    torch.manual_seed(5)
    results = [model(x) for _ in range(4)]
    torch.manual_seed(5)
    assert all(torch.equal(y, eager(x)) for y in results)
    assert not any(torch.equal(results[i], results[j]) for i in range(4) for j in range(i))
    assert recorder is None or recorder.replays == 3


@torch.no_grad()
def test_a_changed_mask_buffer_is_looked_at_before_a_replay(recorder: Recorder) -> None:
    model, x = build(Masked, cuda_graphs=True), states()
    for _ in range(3):
        model(x)
    assert recorder.replays == 2
    model.causal.fill_(True)
    with pytest.warns(RuntimeWarning, match="a mask kept in a buffer changed"):
        out = model(x)
    assert recorder.replays == 2 and torch.equal(out, restore_attention(model)(x))


# ---- what is not, and why ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_on_a_cpu_it_runs_as_without_and_says_so_once() -> None:
    eager, model, x = build(), build(cuda_graphs=True), states()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert all(torch.equal(model(x), eager(x)) for _ in range(3))
    assert said(record) == ["it has tensors on cpu"]


@pytest.mark.parametrize("why", ["gradients flow through it", "the module is in training mode"])
def test_gradients_and_training_run_as_without(recorder: Recorder, why: str) -> None:
    eager, model = build(), build(cuda_graphs=True)
    grads = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for one in (eager, model):
            one.train("training" in why)
            for _ in range(3):
                one.zero_grad()
                with torch.set_grad_enabled("gradients" in why):
                    out = one(states())
                if out.requires_grad:
                    out.square().sum().backward()
            grads.append([p.grad for p in one.parameters()])
    assert said(record) == [why] and not recorder.replays and not recorder.made
    assert "training" in why or all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_sizes_that_come_once_cost_nothing_and_more_than_eight_run_as_without(recorder: Recorder) -> None:
    eager, model = build(), build(cuda_graphs=True)
    model(states(N))
    lengths = range(N + 1, N + 2 + replayed.SIZES)
    for n in lengths:
        model(states(n))
    assert not recorder.replays and len(recorder.made) == 2
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for n in lengths:
            assert torch.equal(model(states(n)), eager(states(n)))
    assert recorder.replays == replayed.SIZES and said(record) == [f"there are graphs of {replayed.SIZES} other sizes"]


@torch.no_grad()
def test_another_thread_and_forward_mode_run_as_without(recorder: Recorder) -> None:
    eager, model, x = build(), build(cuda_graphs=True), states()
    for _ in range(2):
        expected = model(x)
    found: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(model(x))

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert said(record) == ["another thread recorded it"] and recorder.replays == 1
    assert torch.equal(found[0], expected) and torch.equal(expected, eager(x))


@torch.no_grad()
def test_what_inductor_refuses_runs_as_without_and_tells_its_words(on_cpu: None, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("skipping cudagraphs due to multiple devices\nand a stack")

    monkeypatch.setattr(replayed, "compile_with_inductor", refuse)
    model, x = build(cuda_graphs=True), states()
    with pytest.warns(RuntimeWarning, match=r"Attention: cuda_graphs=True.*: RuntimeError: skipping.*devices$"):
        assert torch.equal(model(x), build()(x))


@torch.no_grad()
def test_what_pytorch_skips_when_it_runs_is_said_and_not_tried_again(recorder: Recorder, monkeypatch: Any) -> None:
    model, x = build(cuda_graphs=True), states()
    counts = iter([0, 1])
    monkeypatch.setattr(replayed, "skipped_graphs", lambda: next(counts))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        results = [model(x) for _ in range(4)]
    assert recorder.replays == 1 and said(record) == [replayed.SKIPPED]
    assert all(torch.equal(y, results[0]) for y in results)


@torch.no_grad()
def test_a_watched_model_is_watched(recorder: Recorder) -> None:
    model, x = build(cuda_graphs=True), states()
    for _ in range(3):
        model(x)
    with watch(model, fraction=1.0, threshold=float("inf")) as watched:
        model(x)
        model(x)  # by which the first sample is read
    assert recorder.replays == 2 and [len(errors) > 0 for errors in watched.errors.values()] == [True]
    model(x)
    assert recorder.replays == 3


@torch.no_grad()
def test_errors_name_the_option(recorder: Recorder, monkeypatch: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replayed, "_compiled", lambda *_: fail)
    model, x = build(cuda_graphs=True), states()
    model(x)
    with pytest.raises(RuntimeError, match="not permitted") as raised:
        model(x)
    assert any("cuda_graphs=True" in note for note in raised.value.__notes__)


def test_models_of_transformers_are_told_what_to_do() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    model = transformers.BertModel(config)
    with pytest.raises(ValueError, match=r"cuda_graphs=True: BertModel .* allowed are torch.compile\(model, backend="):
        rewrite_attention(model, cuda_graphs=True)
    assert not is_rewritten(model)


@torch.no_grad()
def test_a_model_whose_calls_were_replayed_is_freed(on_cpu: None) -> None:
    model = build(cuda_graphs=True)
    for _ in range(3):
        model(states())
    gone = weakref.ref(model), weakref.ref(model.qkv.weight)
    restore_attention(model)
    del model
    gc.collect()
    assert [x() for x in gone] == [None, None]


# ---- the backend ---------------------------------------------------------------------------------------------------


def test_the_backend_passes_the_option_on() -> None:
    policy, patches = split_options({"cuda_graphs": True})
    assert policy.cuda_graphs and patches == {"triton.cudagraphs": True}
    assert split_options({})[1] == {} and split_options({"cuda_graphs": True}, "reduce-overhead")[1] == patches
    with pytest.raises(ValueError, match="triton.cudagraphs=False: must be True beside cuda_graphs=True"):
        split_options({"cuda_graphs": True, "triton.cudagraphs": False})


@torch.no_grad()
def test_the_backend_says_what_it_compiles_without(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def compiled(gm: Any, inputs: Any, patches: dict[str, Any]) -> Any:
        given.append(patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_with_inductor", compiled)
    with pytest.warns(RuntimeWarning, match="cuda_graphs=True, but a graph is compiled without: it has no tensors on"):
        torch.compile(Attention(), backend=express, options={**THIN, "cuda_graphs": True})(states())
    assert given == [{"triton.cudagraphs": True}]
