"""Modules whose graphs are captured behave as eager modules do, whatever is done to them, around them or to Dynamo."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from express_compile import explain, is_rewritten, record_sites, restore_attention, rewrite_attention
from express_compile.routes.capture import is_captured
from express_compile.routes.dynamo import _TRIES, Compiled, is_converting

N, C, H = 80, 16, 2
THIN: dict[str, Any] = {
    "methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0,
    "method_options": {"express": {"block": 16}},
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout, self.factor = nn.Linear(C, 3 * C), nn.Linear(C, C), 0.0, 1.0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.dropout(self.out(y) * scale * self.factor, self.dropout, self.training)


class Two(nn.Module):
    """Two of them and something between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b = Attention(), nn.Linear(C, C), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x + self.mid(self.a(x)))


def build(make: Callable[[], nn.Module] = Two) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.5 / C**0.5)
    return model.eval()


def rewritten(model: nn.Module | None = None) -> nn.Module:
    return rewrite_attention(build() if model is None else model, **THIN)


def states(seed: int = 1, n: int = N) -> torch.Tensor:
    return torch.randn(2, n, C, generator=torch.Generator().manual_seed(seed))


def verdicts(run: Callable[[], Any]) -> list[str]:
    with record_sites() as sites:
        run()
    return [site.verdict for site in sites]


def gradients(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    run(model).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return build()(states()).detach()


@pytest.fixture(scope="module")
def thin() -> torch.Tensor:
    return rewritten()(states()).detach()


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


# ------------------------------------------------------------------------------------------ forward, and who sets it


@torch.no_grad()
def test_forward_called_by_itself_is_rewritten(exact, thin) -> None:
    model = build()
    bound, signature = model.forward, inspect.signature(model.a.forward)
    rewritten(model)
    assert inspect.signature(model.a.forward) == signature and model.forward.__code__ is Two.forward.__code__
    with record_sites() as sites:
        assert torch.equal(model.forward(states()), thin) and torch.equal(model(states()), thin)
    assert [(s.module, s.verdict) for s in sites] == [("a", "rewritten"), ("b", "rewritten")] * 2
    assert verdicts(lambda: model.a.forward(states(), scale=2.0)) == ["rewritten"]
    kept = model.forward
    restore_attention(model)
    assert torch.equal(kept(states()), exact) and torch.equal(bound(states()), exact)


@torch.no_grad()
def test_module_compile_before_and_after_leaves_it_rewritten(thin, exact) -> None:
    for before in (True, False):
        model = build()
        steps = [lambda model=model: model.compile(backend="eager"), lambda model=model: rewritten(model)]
        for step in steps if before else reversed(steps):
            step()
        compiled = model._compiled_call_impl
        with record_sites() as sites:
            assert torch.equal(model(states()), thin)
        assert [s.verdict for s in sites] == ["rewritten"] * 2 and is_rewritten(model)
        assert not is_rewritten(restore_attention(model)) and model._compiled_call_impl is compiled
        assert torch.allclose(model(states()), exact, atol=1e-6) and "forward" not in vars(model)


@torch.no_grad()
def test_a_forward_that_wraps_or_replaces_ours(thin) -> None:
    model = rewritten(build(Attention))
    ours = model.forward
    model.forward = functools.update_wrapper(functools.partial(lambda m, x: ours(x) * 2, model), ours)  # as accelerate
    assert is_rewritten(model) and verdicts(lambda: model(states())) == ["rewritten"]
    model.forward = lambda x: x
    assert not is_rewritten(model) and verdicts(lambda: model(states())) == []
    restore_attention(model)
    assert torch.equal(model(states()), states()), "what came later stays"
    del model.forward
    plain = model(states())

    first = lambda x: Attention.forward(model, x, scale=2.0)  # noqa: E731
    model.forward = first
    rewritten(model)
    assert verdicts(lambda: model(states())) == ["rewritten"]
    restore_attention(model)
    assert model.forward is first and torch.equal(model(states()), 2 * plain)


@torch.no_grad()
def test_shallow_copies_and_replicas_run_with_what_is_theirs() -> None:
    model = build(Attention)
    before = model(states())
    thinned = rewritten(model)(states())
    shallow, replica = copy.copy(model), model._replicate_for_data_parallel()
    shallow.factor = replica.factor = 2.0
    replica._parameters, replica._modules = dict(model._parameters), dict(model._modules)
    assert [is_rewritten(m) for m in (model, shallow, replica)] == [True, False, False]
    assert torch.equal(shallow(states()), 2 * before)
    assert ["DataParallel" in words for words in said(lambda: replica(states()))] == [True]
    assert torch.equal(replica(states()), 2 * before) and torch.equal(model(states()), thinned)

    whole = rewritten(build(Two))
    whole.b = copy.copy(whole.a)  # captured with the whole, and not as what it was copied from
    whole.b.factor = 2.0
    doubled = build(Two)
    doubled.b = copy.copy(doubled.a)
    doubled.b.factor = 2.0
    assert torch.equal(whole(states()), rewritten(doubled)(states()))


# -------------------------------------------------------------------------------------------------------------- hooks

HOOKS: dict[str, Callable[[nn.Module, Callable[..., Any]], Any]] = {
    "forward": lambda m, ran: m.register_forward_hook(lambda mod, args, out: ran(out * 2)),
    "forward with kwargs": lambda m, ran: m.register_forward_hook(
        lambda mod, args, kwargs, out: ran(out * 2), with_kwargs=True
    ),
    "pre": lambda m, ran: m.register_forward_pre_hook(lambda mod, args: ran((args[0] * 2,))),
    "global": lambda m, ran: torch_module.register_module_forward_hook(
        lambda mod, args, out: ran(out * 2) if mod is m else None
    ),
    "global pre": lambda m, ran: torch_module.register_module_forward_pre_hook(
        lambda mod, args: ran((args[0] * 2,)) if mod is m else None
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_hooks_added_after_the_first_call_run_once_and_count(hook, thin) -> None:
    ran: list[int] = []

    def run(value: Any) -> Any:
        ran.append(1)
        return value

    model, plain = rewritten(), build()
    model(states())
    for path in ("", "mid"):
        handles = [HOOKS[hook](m.get_submodule(path), run) for m in (model, plain)]
        with record_sites() as sites:
            hooked = model(states())
        assert ran == [1] and [s.verdict for s in sites] == ["rewritten"] * 2
        change, thinned = (plain(states()) - build()(states())).norm(), (hooked - thin).norm()
        assert 0.8 * change < thinned < 1.25 * change
        for handle in handles:
            handle.remove()
        assert torch.equal(model(states()), thin) and len(ran) == 2
        ran.clear()


@pytest.mark.parametrize("path", ["", "mid", "a"])
def test_backward_hooks_added_after_the_first_call_run_once_and_count(path) -> None:
    ran: list[int] = []

    def double(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        ran.append(1)
        return tuple(2 * x for x in inputs)

    model = rewritten()
    x = states().requires_grad_()
    (before,) = torch.autograd.grad(model(x).sum(), x)
    model.get_submodule(path).register_full_backward_hook(double)
    (after,) = torch.autograd.grad(model(x).sum(), x)
    assert ran == [1] and (after - before).norm() > 0.1 * before.norm()
    if not path:
        assert torch.allclose(after, 2 * before, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- what changes after the first call


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def replace(model: nn.Module) -> None:
    model.mid = nn.Sequential(nn.Linear(C, C, bias=False), nn.GELU())
    nn.init.eye_(model.mid[0].weight)


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model.a.qkv, "weight", Doubled())


def tied(model: nn.Module) -> None:
    model.b.qkv.weight = model.a.qkv.weight


def swapped(model: nn.Module) -> None:
    model.a, model.b = model.b, model.a


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a module is replaced": replace,
    "a weight is parametrized": parametrized,
    "weights are tied": tied,
    "modules are swapped": swapped,
    "a plain attribute is set": lambda m: setattr(m.a, "factor", 3.0),
    "a weight is written in place": lambda m: m.a.out.weight.data.mul_(2),
    "an attention module is replaced by another": lambda m: setattr(m, "b", Doubled()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_changes_after_the_first_call_counts(change, thin) -> None:
    model, other = rewritten(), build()
    model(states())
    change(model)
    change(other)
    plain = other(states())
    after = model(states())
    if change is not swapped:  # random numbers go by paths
        assert torch.equal(after, rewritten(other)(states()))
    assert not torch.equal(after, thin) and not torch.equal(after, plain)
    assert torch.equal(restore_attention(model)(states()), plain)


def test_training_mode_and_frozen_weights_count() -> None:
    model = build(Attention)
    model.dropout = 0.5
    rewritten(model)
    x, run = states(), lambda m: m(states())
    evaluated = model(x)
    model.train()
    torch.manual_seed(3)
    trained = model(x)
    assert 0.4 < (trained == 0).float().mean() < 0.6 and torch.equal(model.eval()(x), evaluated)
    assert len(gradients(model, run)) == 4
    model.qkv.requires_grad_(False)
    model.zero_grad()
    assert len(gradients(model, run)) == 2 and not model(x.detach()).detach().requires_grad
    model.requires_grad_(True)
    assert len(gradients(model, run)) == 4


def test_grad_modes_and_other_weights(thin) -> None:
    model = rewritten()
    with torch.inference_mode():
        assert torch.equal(model(states()), thin)
    with torch.no_grad():
        assert not model(states()).requires_grad
    with torch.device("cpu"):
        assert model(states()).requires_grad and len(gradients(model, lambda m: m(states()))) == 10
    other = {name: 2 * x.detach() for name, x in model.named_parameters()}
    changed = build()
    changed.load_state_dict(other)
    assert verdicts(lambda: torch.func.functional_call(model, other, (states(),))) == ["rewritten"] * 2
    assert torch.equal(torch.func.functional_call(model, other, (states(),)), rewritten(changed)(states()))
    assert torch.equal(model(states()), thin)


# -------------------------------------------------------------------------------------------------- Dynamo's failures


class OnlyTraced(Attention):
    """Goes wrong where Dynamo looks, and nowhere else; writes down that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(1)
        self.calls += 1
        if torch.compiler.is_compiling():
            x = x @ torch.ones(3, 3)
        return super().forward(x)


class Half(nn.Module):
    """A graph runs, then comes what Dynamo cannot trace, then attention that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.log = OnlyTraced(), Attention(), []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(1)
        noise = torch.rand(())
        torch._dynamo.graph_break()
        self.calls += 1
        return self.second(self.first(x) + noise)


def test_what_dynamo_raises_at_runs_as_untouched_once() -> None:
    model, plain = build(OnlyTraced), build(OnlyTraced)
    want = plain(states())
    rewritten(model)
    for turn in range(1, _TRIES + 3):
        with record_sites() as sites:
            warned = said(lambda: None) if turn > 1 else said(lambda: model(states()))
            out = model(states()) if turn > 1 else want
        assert torch.equal(out, want) and model.log == [1] * turn and model.calls == turn
        assert [(s.module, s.verdict, s.form) for s in sites] == [("", "refused", "not captured")]
        assert "OnlyTraced" in sites[0].reason or "TorchRuntimeError" in sites[0].reason
        assert len(warned) == (turn == 1)
    assert equal(gradients(model, lambda m: m(states())), gradients(plain, lambda m: m(states())))
    with pytest.raises(ValueError, match="strict=True: .*Dynamo captured no graph"):
        rewrite_attention(build(OnlyTraced), strict=True, **THIN)(states())


def test_a_failure_after_the_first_graph_repeats_nothing() -> None:
    model, plain = build(Half), build(Half)
    rewrite_attention(plain.second, **THIN)
    rewritten(model)
    for turn in (1, 2):
        torch.manual_seed(turn)
        want, state = plain(states()), torch.rand(())
        torch.manual_seed(turn)
        with record_sites() as sites:
            words = said(lambda: None)
            out = model(states())
        assert torch.equal(torch.rand(()), state) and words == []
        assert model.log == [1] * turn == model.first.log and model.calls == 2 * turn and model.first.calls == turn
        assert [(s.module, s.verdict) for s in sites] == [("first", "refused"), ("second", "rewritten")]
        assert out.shape == want.shape and not torch.equal(out, want), "random numbers go by paths"


class Loop(Attention):
    """Dynamo skips a frame that breaks inside a loop, and all that it computes itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(x)
        with torch.no_grad():
            for _ in range(2):
                torch._dynamo.graph_break()
                x = helper(x)
        return super().forward(x)


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Inside(nn.Module):
    """Its own frame holds attention and is skipped, while graphs of others run."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1):
            q, k, v = helper(self.qkv(x)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
            torch._dynamo.graph_break()
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x


@torch.no_grad()
def test_attention_in_a_frame_that_dynamo_skips_is_said_at_every_call() -> None:
    model = build(Inside)
    want = model(states())
    rewritten(model)
    first = said(lambda: model(states()))
    for _ in range(_TRIES + 1):
        with record_sites() as sites:
            after = model(states())
        if [s.verdict for s in sites] == ["refused"]:
            assert torch.equal(after, want) and len(first) == 1 and "forward" in sites[0].reason
        else:
            assert [s.verdict for s in sites] == ["rewritten"] and not torch.equal(after, want) and first == []
    other = rewritten(build(Inside))  # of the same code
    assert torch.equal(other(states()), model(states()))
    assert verdicts(lambda: other(states())) == verdicts(lambda: model(states()))
    looped = rewritten(build(Loop))
    assert verdicts(lambda: looped(states())) == ["rewritten"]


class Picky(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < 8:
            raise KeyError("too short")
        return super().forward(x)


@torch.no_grad()
def test_the_models_own_errors_stay_and_later_calls_are_rewritten() -> None:
    model = build(Picky)
    want = model(states())
    rewritten(model)
    for _ in range(_TRIES + 1):
        with pytest.raises(KeyError, match="too short"):
            model(states(n=4))
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            model(states()[..., :5])
    assert said(lambda: model(states())) == [] and verdicts(lambda: model(states())) == ["rewritten"]
    assert not torch.equal(model(states()), want)


def test_inside_torch_func_and_dispatch_modes_it_runs_exactly_and_later_rewritten(exact, thin) -> None:
    model = rewritten()
    x = states()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    with torch.no_grad():
        words = said(lambda: torch.func.vmap(model)(x.unsqueeze(0)))
        assert sum("torch.func" in word for word in words) == 2, "one for each part that holds attention"
        assert torch.allclose(torch.func.vmap(model)(x.unsqueeze(0))[0], exact, atol=1e-5)
        with FlopCounterMode(display=False), record_sites() as sites:
            assert torch.equal(model(x), exact)
        assert [s.verdict for s in sites] == ["refused"] * 2 and "TorchDispatchMode" in sites[0].reason
    found = torch.func.grad(loss)(parameters)
    plain = gradients(build(), lambda m: m(x))
    assert equal(list(found.values()), plain)
    assert torch.equal(model(x), thin) and verdicts(lambda: model(x)) == ["rewritten"] * 2
    strict = rewrite_attention(build(), strict=True, **THIN)
    with pytest.raises(ValueError, match="strict=True: a: .*torch.func"):
        torch.func.vjp(strict, x)


# ------------------------------------------------------------------------------------------- checkpoints around it


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_checkpoints_around_rewritten_modules(reentrant, warm) -> None:
    def run(model: nn.Module, wrap: Callable[..., Any]) -> list[list[torch.Tensor]]:
        steps = []
        for step in range(2):
            torch.manual_seed(step)
            x = states(step).requires_grad_()
            steps.append(gradients(model, lambda m, x=x: wrap(m, x)))
        return steps

    def once(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(m, x, use_reentrant=reentrant)

    def nested(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: m.b(y + m.mid(once(m.a, y))), x, use_reentrant=reentrant)

    def make() -> nn.Module:
        model = build().train()
        model.a.dropout = model.b.dropout = 0.3
        rewritten(model)
        if warm:
            gradients(model, lambda m: m(states()))
            with torch.no_grad():
                model(states())
        return model

    plain = run(make(), lambda m, x: m(x))
    for wrap in (once, nested) if warm == reentrant else (once,):
        model = make()
        assert all(equal(a, b) for a, b in zip(run(model, wrap), plain, strict=True))
        assert set(verdicts(lambda model=model, wrap=wrap: wrap(model, states()))) == {"rewritten"}


# ----------------------------------------------------------------------------------------- threads, memory, tracers


@torch.no_grad()
def test_eight_threads_on_a_cold_model(thin) -> None:
    model, barrier = rewritten(), Barrier(8)

    def run(turn: int) -> tuple[torch.Tensor, list[str]]:
        barrier.wait()
        with record_sites() as sites:
            out = model(states(n=N - turn % 2))
        return out, [s.verdict for s in sites]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(8)))
    shorter = rewritten()(states(n=N - 1))
    for turn, (out, found) in enumerate(results):
        assert found == ["rewritten"] * 2 and torch.equal(out, shorter if turn % 2 else thin)


@torch.no_grad()
def test_rewriting_and_explaining_again_and_again_leaves_nothing_behind() -> None:
    def growth(run: Callable[[], Any], rounds: int = 6) -> float:
        for _ in range(3):
            run()
        before = count()
        for _ in range(rounds):
            run()
        return (count() - before) / rounds

    def count() -> int:
        for _ in range(4):  # what dies in one is cleaned up after it
            gc.collect()
        return len(gc.get_objects())

    model, x = build(Attention), states(n=20)

    def again() -> None:
        rewritten(model)(x)
        restore_attention(model)

    assert growth(again) < 60  # it was 700
    assert growth(lambda: rewritten(build(Attention))(x)) < 100  # it was 700
    assert growth(lambda: explain(model, x, **THIN)) < 60  # it was 500
    for _ in range(10):  # more often than Dynamo's limit of recompilations
        rewritten(model)
        assert verdicts(lambda: model(states())) == ["rewritten"]
        restore_attention(model)


class Meanwhile(Attention):
    """Calls something between its products, where its graph breaks, or which is called while it is traced."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.between()
        return super().forward(x)


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lets a rewritten model that was called become garbage and be collected: gives how much of it Dynamo has freed."""
    dead, closed, close = [rewritten(build(Attention))], [], Compiled.close
    dead[0](states())
    gc.collect()  # of other tests
    monkeypatch.setattr(Compiled, "close", lambda self: (closed.append(self), close(self))[1])

    def die() -> int:
        dead.clear()
        gc.collect()
        return len(closed)

    return die


@pytest.mark.parametrize("where, freed", [("breaks", 0), ("traces", 0), ("disabled", 1)])
@torch.no_grad()
def test_what_dynamo_keeps_of_dead_models_is_not_freed_while_it_may_look_at_it(where, freed, dies) -> None:
    """That ended the process now and then, as garbage is collected at any moment."""
    seen: list[int] = []

    def between() -> None:
        if not seen and (is_converting() or where != "traces"):
            seen.append(dies())

    marks: dict[str, Callable[..., Any]] = {
        "breaks": functools.partial(torch.compiler.disable, recursive=False),
        "traces": torch.compiler.assume_constant_result,
        "disabled": torch.compiler.disable,
    }
    model = rewritten(Meanwhile(marks[where](between)).eval())
    model(states())
    assert seen == [freed] and dies() == 1


@torch.no_grad()
def test_it_is_freed_at_once_unless_another_thread_is_in_compiled_code(dies) -> None:
    inside, go = Event(), Event()

    @functools.partial(torch.compiler.disable, recursive=False)
    def wait() -> None:
        inside.set()
        assert go.wait(60)

    model = rewritten(Meanwhile(wait).eval())
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(torch.no_grad()(model), states())
        assert inside.wait(60) and dies() == 0
        go.set()
        called.result()
    assert dies() == 1


@torch.no_grad()
def test_it_is_freed_at_once_outside(dies) -> None:
    assert dies() == 1


@torch.no_grad()
def test_restoring_leaves_the_users_own_compilation_alone() -> None:
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    model = build(Attention)
    compiled = torch.compile(model, backend=backend)
    compiled(states())
    rewritten(other := build(Attention))(states())
    explain(other := restore_attention(other), states(), **THIN)
    compiled(states())
    assert len(graphs) == 1


class Parted(nn.Module):
    """A layer with a graph break behind its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attn(x)
        torch._dynamo.graph_break()
        return x + y


@torch.no_grad()
def test_more_layers_are_parted_by_graph_breaks_than_dynamo_makes_graphs_of_one_code() -> None:
    model = build(lambda: nn.Sequential(*(Parted() for _ in range(5))))
    want = model(states())
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        rewrite_attention(model, methods=["exact"], strict=True)
        for _ in range(2):
            with record_sites() as sites:
                assert (model(states()) - want).abs().max() < 1e-4 * want.abs().max()
            assert [site.module for site in sites] == [f"{i}.attn" for i in range(5)]


def _export_to_onnx(model: nn.Module) -> None:
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.onnx.export(model, (states(),), "never.onnx", dynamo=False)
    finally:
        torch.set_autocast_cache_enabled(cached)  # torch.onnx leaves it off where tracing fails


TRACERS: dict[str, Callable[[nn.Module], Any]] = {
    "jit.trace": lambda m: torch.jit.trace(m, (states(),)),
    "jit.trace of a function": lambda m: torch.jit.trace(lambda x: m(x), (states(),)),
    "jit.script": torch.jit.script,
    "fx": lambda m: torch.fx.symbolic_trace(nn.Sequential(m)),
    "fx of the model itself": torch.fx.symbolic_trace,
    "fx of the attention itself": lambda m: torch.fx.symbolic_trace([x for x in m.modules() if is_captured(x)][-1]),
    "make_fx": lambda m: torch.fx.experimental.proxy_tensor.make_fx(m)(states()),
    "onnx": _export_to_onnx,
}


@torch.no_grad()
def test_fx_may_leave_a_rewritten_module_as_a_leaf(thin) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Two)

    model = nn.Sequential(nn.Identity(), rewritten(build(Two)))
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(traced(states()), thin) and verdicts(lambda: traced(states())) == ["rewritten"] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
@torch.no_grad()
def test_tracers_say_to_restore_first(trace, thin) -> None:
    model = rewritten(build(Two))
    with pytest.raises(RuntimeError, match=r"would lose the rewriting; call restore_attention\(model\) before it"):
        trace(model)
    assert torch.equal(model(states()), thin) and verdicts(lambda: model(states())) == ["rewritten"] * 2
