"""Steps of an ExpressCache that are recorded once and replayed give what steps that run eagerly give.

A replay is here the same step again, by the reference; on a GPU it is a CUDA graph (tests/gpu/test_cache.py).
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from express_compile.core.rows import Rows
from express_compile.kernels import held
from express_compile.kernels.attend import places
from express_compile.kernels.select import pages
from express_compile.routes.transformers import steps as S
from express_compile.routes.transformers.cache import ExpressCache

ROWS = (Rows(2, 9), Rows(2, 9, 2, 4), Rows(everything=True), Rows(0, 12, 4), Rows(2, 5, selected=1))


def make_model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=40, intermediate_size=16, num_hidden_layers=layers, vocab_size=31, head_dim=8)
    config = LlamaConfig(**sizes, num_attention_heads=10, num_key_value_heads=5, max_position_embeddings=4096)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replays every record had."""
    counts: list[int] = []

    def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        run()
        out, mine = run(), len(counts)
        counts.append(0)

        def replay() -> None:
            counts[mine] += 1
            for old, new in zip(tree_leaves(dict(out)), tree_leaves(dict(run())), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, out

    monkeypatch.setattr(S, "record", record)
    monkeypatch.setattr(S, "_RECORDS_ON", "cpu")
    return counts


def prompt(model: LlamaForCausalLM, n: int, pads: tuple[int, ...] = (0, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 31, (len(pads), n), generator=draw)
    return ids, torch.stack([torch.arange(n) >= pad for pad in pads]).long()


def inputs(ids: torch.Tensor, mask: torch.Tensor, cache: ExpressCache) -> dict[str, Any]:
    positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("pads", [(0, 0), (0, 33)])
def test_replayed_steps_are_eager_steps(model, recorded: list[int], pads: tuple[int, ...]) -> None:
    ids, mask = prompt(model, 420, pads)
    cache = ExpressCache(model, rows=ROWS, graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    other = copy.deepcopy(cache)
    for i in (*range(120, 135), *range(376, 392)):
        if i == 376:  # a longer piece in between
            for x in (cache, other):
                model(**inputs(ids[:, 135:376], mask[:, :376], x))
        step = ids[:, i : i + 1], mask[:, : i + 1]
        out = cache.steps(model, inputs(*step, cache))
        expected = model(**inputs(*step, other))
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == other.get_seq_length() == i + 1
        assert out.past_key_values is cache
    assert sum(recorded) == 31 and len(recorded) <= 4  # memory of the growing heads moves with the longer piece
    assert cache.rows_held == other.rows_held
    for one, two in zip(cache.express_layers, other.express_layers, strict=True):
        assert one.held.length == two.held.length and one.held.exact_tail == two.held.exact_tail


@torch.no_grad()
def test_steps_of_a_compiled_model_are_recorded_with_what_was_compiled_of_every_layer(recorded: list[int]) -> None:
    torch.compiler.reset()
    model, rotated = make_model(layers=10), list[int]()  # Dynamo gives up on a ninth one
    ids, mask = prompt(model, 124)
    cache = ExpressCache(model, rows=Rows(2, 9, 8), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    other = copy.deepcopy(cache)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        rotated.append(sum(node.name.startswith("neg") for node in graph.graph.nodes))
        return graph

    model.compile(backend=backend)
    for i in range(120, 124):
        step = ids[:, i : i + 1], mask[:, : i + 1]
        out = cache.steps(model, inputs(*step, cache)).logits
        torch.testing.assert_close(out, model.forward(**inputs(*step, other)).logits, rtol=1e-4, atol=1e-5)
    assert len(recorded) == 1 and sum(rotated) == 2 * 10, "queries and keys of every layer"


@torch.no_grad()
def test_what_is_due_is_decided_while_a_replay_runs_and_not_before_one(model, recorded, monkeypatch) -> None:
    ids, mask = prompt(model, 440)
    cache = ExpressCache(model, rows=Rows(2, 9, 8), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    leave, replayed, behind = held.HeldRows._leave, list[int](), list[bool]()

    def counted(self: Any, *args: Any) -> None:
        assert self.touched is not None, "it is a copy, of which what has changed is kept for its time"
        behind.append(sum(recorded) > sum(replayed))
        leave(self, *args)

    monkeypatch.setattr(held.HeldRows, "_leave", counted)
    for i in range(120, 440):
        replayed[:] = recorded
        cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache))
    assert len(behind) >= 20 and all(behind)


@torch.no_grad()
@pytest.mark.parametrize("pads", [(0, 0), (0, 33)])
def test_rows_move_before_the_replay_in_which_that_is_due(model, recorded, monkeypatch, pads: tuple[int, ...]) -> None:
    """By the kernel; a replay finds nothing due, as a graph holds no launch for it. What stops the step then loses
    nothing, before the replay and in it."""
    ids, mask = prompt(model, 200, pads)
    monkeypatch.setattr(held, "_by_kernels", lambda x: True)
    move, moved, failed = held.do_what_is_due, list[int](), 0

    def counted(*args: Any) -> None:
        moved.append(int(args[4].max()))
        move(*args)

    def is_due(x: held.Held) -> bool:
        return any(part.does(slice(*b), x.length[b[0]]) for part in x.parts for b in part.ahead)

    def settled(self: held.Held, *args: torch.Tensor) -> torch.Tensor:
        assert not is_due(self)
        return held.Held._step_reference(self, *args)

    monkeypatch.setattr(held, "do_what_is_due", counted)
    monkeypatch.setattr(held.Held, "launch_step", settled)
    cache = ExpressCache(model, rows=Rows(2, 9, 8), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    other = copy.deepcopy(cache)
    for i in range(120, 200):
        step = ids[:, i : i + 1], mask[:, : i + 1]
        if i > 122 and failed < 2 and is_due(cache.express_layers[failed].held):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
                patch.setattr(*((cache.steps, "replay", stop) if failed else (model.lm_head, "forward", stop)))
                cache.steps(model, inputs(*step, cache))
            failed += 1
        out = cache.steps(model, inputs(*step, cache))
        torch.testing.assert_close(out.logits, model(**inputs(*step, other)).logits, rtol=1e-4, atol=1e-5)
    assert failed == 2 and len(set(moved)) > 4
    assert_same(cache, other)


@torch.no_grad()
def test_a_step_that_was_replayed_can_be_cropped_and_the_next_one_counts_on(model, recorded: list[int]) -> None:
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    first = [cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache)).logits for i in range(120, 125)]
    cache.crop(-3)
    again = [cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache)).logits for i in range(122, 125)]
    torch.testing.assert_close(torch.cat(again), torch.cat(first[2:]))
    assert sum(recorded) == 8 and len(recorded) == 1


@torch.no_grad()
def test_masks_that_hide_what_is_held_are_refused_and_what_cannot_be_recorded_runs_eagerly(model, recorded) -> None:
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    cache.steps(model, inputs(ids[:, :120], mask[:, :120], cache))
    hidden = mask.clone()
    hidden[1, 5] = 0
    with pytest.raises(ValueError, match=r"shows \[121, 120\] tokens .* holds \[120, 120\]"):
        cache.steps(model, inputs(ids[:, 120:121], hidden[:, :121], cache))
    out = cache.steps(model, dict(inputs(ids[:, 120:121], mask[:, :121], cache), output_hidden_states=True))
    assert len(out.hidden_states) == 3 and not recorded


def assert_same(one: ExpressCache, other: ExpressCache) -> None:
    """What both hold once what is due has left."""
    one, other = copy.deepcopy(one), copy.deepcopy(other)
    assert one.get_seq_length() == other.get_seq_length()
    for mine, its in zip(one.express_layers, other.express_layers, strict=True):
        mine.held.settle()
        its.held.settle()
        assert mine.held.length == its.held.length and mine.croppable == its.croppable
        for part, theirs in zip(mine.held.parts, its.held.parts, strict=True):
            assert part.left == theirs.left and torch.equal(part.log_weight, theirs.log_weight)
            there = part.log_weight > -torch.inf
            for name in ("token", "key", "value"):
                torch.testing.assert_close(getattr(part, name)[there], getattr(theirs, name)[there])


class Stop(BaseException):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Stop


@torch.no_grad()
@pytest.mark.parametrize("replays", [0, 3])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("counted", [False, True])
def test_a_step_that_raises_or_is_interrupted_has_not_been(model, recorded, replays, layer, counted) -> None:
    """Where a model raises while it is recorded or replayed, or an interrupt comes while tokens are counted, the cache
    is as before: what follows, of one token or of more, is what follows without the step."""
    ids, mask = prompt(model, 160, (0, 33))
    cache = ExpressCache(model, rows=ROWS, graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    for i in range(120, 120 + replays):
        cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache))
    n, other = 120 + replays, copy.deepcopy(cache)
    with pytest.MonkeyPatch.context() as patch:
        if counted:
            patch.setattr(cache.express_layers[layer], "end_recorded", stop)
            handle = None
        else:
            handle = model.model.layers[layer].mlp.register_forward_hook(stop)
        with pytest.raises(Stop):
            cache.steps(model, inputs(ids[:, n : n + 1] * 0, mask[:, : n + 1], cache))
        if handle is not None:
            handle.remove()
    assert_same(cache, other)
    for own in (x.held for x in cache.express_layers):
        for part in (x for x in own.parts if x.drops):  # what is not held any more has been counted
            expected = torch.tensor(own.length) - torch.tensor(part.left)
            assert torch.equal((part.log_weight > -torch.inf).sum(2)[:, 0], expected)
    for width in (5, 1, 1):
        outs = []
        for x, run in ((cache, cache.steps), (other, lambda model, given: model(**given))):
            outs.append(run(model, inputs(ids[:, n : n + width], mask[:, : n + width], x)).logits)
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        n += width


@torch.no_grad()
def test_steps_run_eagerly_unless_graphs_are_asked_for_and_can_be(model, recorded: list[int], monkeypatch) -> None:
    ids, mask = prompt(model, 140)
    plain, cache = (ExpressCache(model, rows=ROWS, graphs=graphs) for graphs in (False, True))
    for x in (plain, cache):
        model(**inputs(ids[:, :120], mask[:, :120], x))
    step = ids[:, 120:121], mask[:, :121]
    plain.steps(model, inputs(*step, plain))
    assert not recorded and plain.get_seq_length() == 121
    with torch.autocast("cpu", dtype=torch.bfloat16):  # weights that it has cast are memory that it frees
        cache.steps(model, inputs(*step, cache))
    assert not recorded and cache.get_seq_length() == 121
    cache.crop(-1)
    with torch.enable_grad(), pytest.raises(ValueError, match="give no gradient"):
        cache.steps(model, inputs(*step, cache))
    cache.rollback()
    assert not recorded
    monkeypatch.setattr(S, "_RECORDS_ON", "cuda")
    cache.steps(model, inputs(*step, cache))
    assert not recorded and cache.get_seq_length() == 121
    with pytest.raises(TypeError, match="graphs=1: must be True or False"):
        ExpressCache(model, rows=ROWS, graphs=1)


@torch.no_grad()
def test_a_graph_is_recorded_again_where_weights_have_moved_and_for_another_model(recorded: list[int]) -> None:
    model = make_model()
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    step = [inputs(ids[:, i : i + 1], mask[:, : i + 1], cache) for i in range(120, 124)]
    cache.steps(model, step[0])
    cache.crop(-1)
    cache.steps(model, step[0])
    assert recorded == [2]
    cache.crop(-1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    once = cache.steps(model, step[0]).logits
    assert recorded == [2, 1]
    cache.crop(-1)
    torch.testing.assert_close(model(**step[0]).logits, once)
    with pytest.raises(ValueError, match="a cache belongs to the model it was built for"):
        cache.steps(copy.deepcopy(model), step[1])


@torch.no_grad()
def test_what_a_step_gave_stays_as_it_was(recorded: list[int]) -> None:
    model = make_model()
    model.config.output_hidden_states = True
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    outs = [cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache)) for i in range(120, 123)]
    assert len(recorded) == 1
    for out in outs:
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    assert not torch.equal(outs[0].logits, outs[1].logits)


def test_only_the_model_of_such_a_cache_answers_generate_otherwise_and_its_copies_do_by_themselves(monkeypatch) -> None:
    model, names = make_model(), ("get_compiled_call", "_valid_auto_compile_criteria")
    ExpressCache(model, rows=ROWS)
    assert not set(names) & set(vars(model))
    cache = ExpressCache(model, rows=ROWS, graphs=True)
    twin = copy.deepcopy(model)
    assert all(getattr(twin, name).__self__ is twin for name in names)
    read = pickle.loads(pickle.dumps(model))
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    config = model.generation_config
    assert not model._valid_auto_compile_criteria({"past_key_values": cache}, config)  # no GPU
    monkeypatch.setattr(S, "_RECORDS_ON", "cpu")
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, config)
    for other in (ExpressCache(model, rows=ROWS), None):
        assert not model._valid_auto_compile_criteria({"past_key_values": other}, config)
    config.disable_compile = True
    assert not model._valid_auto_compile_criteria({"past_key_values": cache}, config)
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, _: lambda **inputs: (self, sorted(inputs)))
    assert twin.get_compiled_call(None)(input_ids=None) == (twin, ["input_ids"])


def test_generate_writes_with_recorded_steps_what_it_writes_without(model, recorded, tmp_path: Path) -> None:
    ids, mask = prompt(model, 120, (0, 33))
    more = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    outs = []
    for graphs, disable in ((True, False), (True, True), (False, False)):
        cache = ExpressCache(model, rows=ROWS, graphs=graphs)
        outs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, disable_compile=disable, **more))
        assert cache.get_seq_length() == 139 and sum(recorded) == 19
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[2])
    cache.save(tmp_path / "cache")
    for graphs in (True, False):
        again = ExpressCache.load(tmp_path / "cache", model, graphs=graphs, rows=ROWS)
        whole = torch.ones(2, 140, dtype=torch.long)
        whole[:, :120] = mask
        outs.append(model.generate(outs[2], attention_mask=whole, past_key_values=again, **more))
        assert again.get_seq_length() == 159
    assert torch.equal(outs[3], outs[4]) and sum(recorded) > 19


@torch.no_grad()
def test_a_graph_is_recorded_again_for_other_sequences_and_masks_of_other_shapes_run_eagerly(model, recorded) -> None:
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    cache.steps(model, inputs(ids[:, 120:121], mask[:, :121], cache))
    cache.batch_select_indices(torch.tensor([1]))
    one = cache.steps(model, inputs(ids[1:, 121:122], mask[1:, :122], cache)).logits
    assert recorded == [1, 1]
    short = dict(inputs(ids[1:, 122:123], mask[1:, :123], cache), attention_mask=mask[1:, :5])
    with pytest.raises(ValueError):
        cache.steps(model, short)
    cache.rollback()
    other = ExpressCache(model, rows=Rows(2, 9, 2, 4))
    model(**inputs(ids[1:, :120], mask[1:, :120], other))
    for i in (120, 121):
        expected = model(**inputs(ids[1:, i : i + 1], mask[1:, : i + 1], other)).logits
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


class Asks(TorchDispatchMode):
    """What a launch of a graph cannot hold: the device is asked for a value, or memory of the host is read."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "unique", "masked_select", "item")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        is_indexed_by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.FORBIDDEN or is_indexed_by_mask:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_is_recorded_asks_the_device_nothing_and_reads_no_memory_of_the_host(model, recorded, monkeypatch) -> None:
    """The whole model with the launches of the kernels, which compute nothing here."""
    for module in (places, pages):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    ids, mask = prompt(model, 140, (0, 33))
    cache = ExpressCache(model, rows=ROWS, graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    monkeypatch.setattr(held.Held, "_step_reference", held.Held.step_triton)
    run, asks, ran = S.Steps._run, Asks(), []

    def watched(*args: Any) -> Any:
        with asks:
            ran.append(1)
            return run(*args)

    monkeypatch.setattr(S.Steps, "_run", watched)
    for i in (120, 121):
        cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache))
    assert len(ran) == 4 and not asks.names
    with Asks() as other:  # it sees what it should
        (ids[ids > 3].sum() + torch.tensor(3)).item()
    assert {"index", "lift_fresh", "_local_scalar_dense"} <= set(other.names)


@torch.no_grad()
def test_a_cache_that_nobody_has_any_more_is_freed_at_once(model, recorded, monkeypatch) -> None:
    monkeypatch.setattr(S, "record", lambda run, device: (lambda: None, run()))  # a graph holds no Python
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4), graphs=True)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    cache.steps(model, inputs(ids[:, 120:121], mask[:, :121], cache))
    with pytest.raises(ValueError, match="must be the cache whose steps these are"):
        cache.steps(model, inputs(ids[:, 121:122], mask[:, :122], copy.deepcopy(cache)))
    last = weakref.ref(cache.express_layers[0].held.parts[0].key)
    gc.disable()
    try:
        del cache
        assert last() is None
    finally:
        gc.enable()
