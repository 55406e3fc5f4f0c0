"""Steps of decoding with an ExpressCache as CUDA graphs, where ``graphs=True`` asks for it: :class:`Steps`.

generate() asks a model for the compiled form of its call wherever a cache allows that. What the model of a cache with
``graphs=True`` gives it is no program of torch.compile: once the layers hold rows of a plan, a step of one token is
recorded as one CUDA graph of the model as it runs eagerly, or as it was compiled by ``model.compile()``, and replayed
for the tokens that follow. Where rows are and how many tokens there are stands in memory that does not move, so a graph
serves until memory has to grow, which only heads that hold all tokens need. What has to be thinned is decided behind a
replay, and rows move by one launch of their layer before the replay in which they are due (:mod:`..kernels.due`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .layers import ExpressLayer
from .sites import installed

if TYPE_CHECKING:
    from .cache import ExpressCache

_TOKENS = ("input_ids", "position_ids", "attention_mask", "past_key_values")
_RECORDS_ON = "cuda"  # a type of device
_WARM_UP = 2
_CACHE = object()  # stands for the cache in what a step gives


def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A replay of the launches of ``run`` on ``device``, and what it returned, which replays write again. ``run`` is
    called a few times before, and must not mind that."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()  # the stream that torch takes if it is told none is that of the first device
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # others may use the device
            out = run()
    return graph.replay, out


class Steps:
    """Calls of a model with one new token of every sequence, each the replay of a graph where that is possible.

    graphs: whether it is asked for; otherwise, and on other devices than a GPU, a call is that of the model.
    """

    def __init__(self, graphs: bool) -> None:
        self.graphs = graphs
        self.clear()

    def clear(self) -> None:
        """Forget the graph; the next step records another one."""
        self.known: Any = None  # what the graph was recorded for
        self.replay: Callable[[], None] | None = None
        self.out: Any = None
        self.model: Callable[[], Any] = lambda: None
        self.weights: tuple[int, ...] = ()  # where the model has them
        self.places: list[Any] = []  # of every layer, where its memory is
        self.due: list[int] = []  # of every layer, how many columns there are when next something comes before a replay
        self.behind: list[int] = []  # the same for what is due in one, or decided behind it
        self.changes = -1  # of the cache, the last time that its state was looked at
        self.end = torch.empty(0, dtype=torch.int32)  # of every sequence, its tokens with the new one

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return Steps(self.graphs)

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """What ``model(**inputs)`` gives. Raises ``ValueError`` for a mask that hides tokens that are held, and for
        ``past_key_values`` that are not the cache of these steps, and what a model raises that cannot be recorded; then
        the step has not been."""
        cache = inputs.get("past_key_values")
        if getattr(cache, "steps", None) is not self:
            raise ValueError(f"past_key_values={cache!r}: must be the cache whose steps these are")
        assert cache is not None
        if not (self.graphs and self._is_single(model, inputs) and self._is_recordable(model, cache, inputs)):
            return model(**inputs)
        with torch.inference_mode(False), torch.no_grad():
            return self._replayed(model, cache, inputs)

    def _replayed(self, model: PreTrainedModel, cache: ExpressCache, inputs: dict[str, Any]) -> Any:
        ids, positions, layers = inputs["input_ids"], inputs["position_ids"], cache.express_layers
        before = layers[0].columns
        cache._step.require_whole()
        if cache._step.changes != self.changes:
            self._look(model, cache, inputs)
        for i, layer in enumerate(layers):
            if layer.columns >= self.due[i]:
                self.places[i] = layer.settle_recorded(self.end)
                self._plan(i, layer)
        held = layers[0].held
        assert held is not None
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        held.count_into(self.end)
        given = {name: x for name, x in inputs.items() if name not in _TOKENS}
        known = [self.weights, given, *self.places]
        try:
            behind = [(i, layer) for i, layer in enumerate(layers) if layer.columns >= self.behind[i]]
            for _, layer in behind:
                layer.launch_due_recorded()
            if known != self.known or self.replay is None:
                self.replay = self.out = None
                self.replay, out = record(lambda: self._run(model, cache, given), ids.device)
                self.out = _mapped(out, lambda x: _CACHE if x is cache else x)  # or it would hold itself
                self.known = known
            self.replay()
            for _, layer in behind:  # the host decides what is next while the device is at this step
                layer.look_ahead_recorded()
            for layer in layers:
                layer.end_recorded()
            for i, layer in behind:
                self._plan(i, layer)
        except BaseException as error:
            if self.replay is None:
                error.add_note(f"while an ExpressCache with graphs=True recorded a step of {type(model).__name__}")
            for layer in layers:
                layer.undo_recorded(before)
            raise
        cache._step.done = {layer.place.number for layer in layers}
        return _mapped(self.out, lambda x: cache if x is _CACHE else x.clone() if isinstance(x, torch.Tensor) else x)

    def _plan(self, i: int, layer: ExpressLayer) -> None:
        """Learn when layer i next has something to do."""
        assert layer.held is not None
        self.due[i], self.behind[i] = layer.columns + layer.held.rest(), layer.columns + layer.held.idle()

    def _look(self, model: PreTrainedModel, cache: ExpressCache, inputs: dict[str, Any]) -> None:
        """Learn what may have changed since the last replay."""
        ids, positions, layers = inputs["input_ids"], inputs["position_ids"], cache.express_layers
        self._require_shown(layers[0], inputs.get("attention_mask"))
        if self.model() is not model or len(self.end) != len(ids) or self.end.device != ids.device:
            self.clear()
            self.model = weakref.ref(model)
            self.ids, self.positions = ids.clone(), positions.clone()
            self.end = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
        plain = (x for x in (*model.parameters(), *model.buffers()) if type(x) in (torch.Tensor, nn.Parameter))
        self.weights = tuple(x.data_ptr() for x in plain)
        self.places, self.due, self.behind = [None] * len(layers), [0] * len(layers), [0] * len(layers)
        self.changes = cache._step.changes

    def _is_single(self, model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
        """Whether it is a call that a graph can stand for: one token of every sequence, and nothing else that could be
        different the next time, asked or computed."""
        ids, positions, mask = (inputs.get(name) for name in _TOKENS[:3])
        others = {name: x for name, x in inputs.items() if name not in _TOKENS}
        return (
            ids is not None
            and positions is not None
            and ids.shape[1] == 1
            and positions.shape == ids.shape
            and (mask is None or mask.shape == (len(ids), inputs["past_key_values"].get_seq_length() + 1))
            and all(x is None or isinstance(x, (bool, int)) for x in others.values())
            and not any(others.get(name) for name in ("output_attentions", "output_hidden_states"))
            and others.get("use_cache") is not False
            and not (model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type))
        )

    def _is_recordable(self, model: PreTrainedModel, cache: ExpressCache, inputs: dict[str, Any]) -> bool:
        """Whether graphs of the model can be, with what the cache holds now."""
        ids, layers = inputs["input_ids"], cache.express_layers
        if ids.device.type != _RECORDS_ON or len(layers) < len(cache.layers):
            return False
        is_known = cache._step.changes == self.changes and self.model() is model
        if not all(layer.records(len(ids)) for layer in (layers[:1] if is_known else layers)):
            return False
        if is_known:
            return True
        devices = {x.device for x in model.parameters()}
        quantizer = getattr(model, "hf_quantizer", None)
        return (
            devices == {ids.device}
            and (quantizer is None or quantizer.is_compileable)
            and all(site.shadow is None for site in installed(model))
        )

    @staticmethod
    def _require_shown(layer: ExpressLayer, mask: torch.Tensor | None) -> None:
        """The first step since others ran: its mask has to show what is held, as that of a step that is not recorded
        (``ValueError``); masks that follow from it are those that generate() makes."""
        assert layer.held is not None
        shown = [layer.columns + 1] * len(layer.held.length)
        if mask is not None:
            shown = mask.sum(1).tolist() if bool(mask[:, -1].all()) else []
        if shown != [n + 1 for n in layer.held.length]:
            raise ValueError(
                f"ExpressCache: the mask shows {shown or 'no'} tokens of the sequences with the new ones, the cache "
                f"holds {layer.held.length}; what was padding has to stay padding, and nothing else may be hidden"
            )

    def _run(self, model: PreTrainedModel, cache: ExpressCache, given: dict[str, Any]) -> Any:
        """The call that is recorded. A mask of this form is handed on as it is, and looked at by nobody."""
        step, mask = cache._step, torch.ones(len(self.ids), 1, 1, 1, dtype=torch.bool, device=self.ids.device)
        step.recorded = True
        try:
            tokens = dict(input_ids=self.ids, position_ids=self.positions, attention_mask=mask)
            with _every_layer(model, len(cache.layers)):
                return model(**tokens, past_key_values=cache, **given)
        finally:
            step.recorded = False


def _every_layer(model: nn.Module, layers: int) -> AbstractContextManager[Any]:
    """Dynamo compiles what lies between the attention of each of the ``layers`` for itself, where it would run layers
    eagerly from the ninth one on."""
    if not any(module._compiled_call_impl for module in model.modules()):
        return nullcontext()
    config = torch._dynamo.config
    limits = ("recompile_limit", "accumulated_recompile_limit")
    return config.patch({name: getattr(config, name) + 4 * layers for name in limits})


def _mapped(out: Any, function: Callable[[Any], Any]) -> Any:
    """What a model gave with ``function`` of everything in it."""
    if isinstance(out, ModelOutput):
        return type(out)(**{name: _mapped(x, function) for name, x in out.items()})
    return tuple(_mapped(x, function) for x in out) if type(out) is tuple else function(out)


# ---- generate() ---------------------------------------------------------------------------------------------------


def let_generate_record(model: PreTrainedModel) -> None:
    """Let ``model.generate()`` run its steps by :class:`Steps` with a cache for which graphs are asked, on a GPU and
    unless it is told ``disable_compile``. Nothing changes for other models and caches."""
    for method in (_valid_auto_compile_criteria, get_compiled_call):
        setattr(model, method.__name__, MethodType(method, model))  # which copies of the model copy with it


def let_generate_keep(model: PreTrainedModel) -> None:
    """Let ``model.generate()`` go on with an ExpressCache where the model puts another in its place: Phi 3 does so for
    long prompts, and once in a text, when its RoPE comes to other factors."""
    if model.can_generate() and hasattr(model.config, "original_max_position_embeddings"):
        setattr(model, prepare_inputs_for_generation.__name__, MethodType(prepare_inputs_for_generation, model))


def prepare_inputs_for_generation(
    self: PreTrainedModel,
    input_ids: Any,
    past_key_values: Any = None,
    inputs_embeds: Any = None,
    **kwargs: Any,  # by this name generate() knows that others are taken
) -> dict[str, Any]:
    kind: Any = type(self)
    given = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, **kwargs}
    inputs: dict[str, Any] = kind.prepare_inputs_for_generation(self, input_ids, **given)
    if isinstance(getattr(past_key_values, "steps", None), Steps) and inputs.get("past_key_values") is None:
        past_key_values.reset()
        given |= {"past_key_values": None, "next_sequence_length": None}
        inputs = kind.prepare_inputs_for_generation(self, input_ids, **given)
        inputs["past_key_values"] = past_key_values
    return inputs


def _steps_of(cache: Any) -> Steps | None:
    steps = getattr(cache, "steps", None)
    return steps if isinstance(steps, Steps) and steps.graphs else None


def _valid_auto_compile_criteria(self: PreTrainedModel, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    if _steps_of(model_kwargs.get("past_key_values")) is not None:
        return self.device.type == _RECORDS_ON and not generation_config.disable_compile
    kind: Any = type(self)
    return bool(kind._valid_auto_compile_criteria(self, model_kwargs, generation_config))


def get_compiled_call(self: PreTrainedModel, compile_config: Any) -> Callable[..., Any]:
    def call(*args: Any, **inputs: Any) -> Any:
        steps = _steps_of(inputs.get("past_key_values"))
        if steps is not None:
            return steps(self, inputs)
        return type(self).get_compiled_call(self, compile_config)(*args, **inputs)

    return call
