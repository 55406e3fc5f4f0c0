"""Steps of decoding with an ExpressCache as CUDA graphs: :class:`Steps`, which ``generate()`` calls by itself.

generate() asks a model for the compiled form of its call wherever a cache allows that. What a rewritten model gives it
for an ExpressCache is no program of torch.compile: once the layers hold rows of a plan, a step of one token is recorded
as one CUDA graph of the model as it runs eagerly, and replayed for the tokens that follow. Where rows are and how many
tokens there are stands in memory that does not move, so a graph serves until memory has to grow, which only heads that
hold all tokens need. What has to be moved or thinned runs between replays (:meth:`..kernels.held.Held.settle`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin

from .layers import ExpressLayer
from .sites import installed

if TYPE_CHECKING:
    from .cache import ExpressCache

_TOKENS = ("input_ids", "position_ids", "attention_mask", "past_key_values")
_WARM_UP = 2


def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """A replay of the launches of ``run`` on ``device``, and what it returned, which replays write again."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
    return graph.replay, out


class Steps:
    """Calls of a model with one new token of every sequence, each the replay of a graph where that is possible."""

    def __init__(self, cache: ExpressCache) -> None:
        self.cache = cache
        self.clear()

    def clear(self) -> None:
        """Forget the graph; the next step records another one."""
        self.known: Any = None  # what the graph was recorded for
        self.replay: Callable[[], None] | None = None
        self.out: Any = None
        self.due: list[int] = []  # of every layer, how many columns there are when it next has something to do
        self.changes = -1  # of the cache, the last time that its state was looked at
        self.end = torch.empty(0, dtype=torch.int32)  # of every sequence, its tokens with the new one

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        return Steps(copy.deepcopy(self.cache, memo))

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """What ``model(**inputs)`` gives."""
        layers = self.cache.express_layers
        if not self._can_replay(model, layers, inputs):
            return model(**inputs)
        with torch.inference_mode(False), torch.no_grad():
            return self._replayed(model, layers, inputs)

    def _replayed(self, model: PreTrainedModel, layers: list[ExpressLayer], inputs: dict[str, Any]) -> Any:
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        self.cache._step.require_whole()
        if self.cache._step.changes != self.changes:
            self._require_shown(layers[0], inputs.get("attention_mask"))
            self.due = [0] * len(layers)
            if self.known is None or len(self.end) != len(ids):
                self.ids, self.positions = ids.clone(), positions.clone()
                self.end = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
                self.known = None
            self.changes = self.cache._step.changes
        given = {name: x for name, x in inputs.items() if name not in _TOKENS}
        known = [given, *self._settled(layers)]
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        held = layers[0].held
        assert held is not None
        self.end.copy_(torch.tensor([n + 1 for n in held.length], dtype=torch.int32), non_blocking=True)
        if known != self.known or self.replay is None:
            self.replay, self.out = record(lambda: self._run(model, given), ids.device)
            self.known = known
        self.replay()
        for layer in layers:
            layer.end_recorded()
        self.cache._step.done = {layer.place.number for layer in layers}
        values = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.out.items()}
        return type(self.out)(**values)

    def _can_replay(self, model: PreTrainedModel, layers: list[ExpressLayer], inputs: dict[str, Any]) -> bool:
        ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
        others = {name: x for name, x in inputs.items() if name not in _TOKENS}
        return (
            ids is not None
            and positions is not None
            and ids.shape[1] == 1
            and positions.shape == ids.shape
            and not model.training
            and (self.cache._step.changes == self.changes or all(site.shadow is None for site in installed(model)))
            and all(x is None or isinstance(x, (bool, int)) for x in others.values())
            and not any(others.get(name) for name in ("output_attentions", "output_hidden_states"))
            and all(others.get(name) is not False for name in ("use_cache", "return_dict"))
            and len(layers) == len(self.cache.layers)
            and all(layer.records(len(ids)) for layer in layers)
        )

    @staticmethod
    def _require_shown(layer: ExpressLayer, mask: torch.Tensor | None) -> None:
        """The first step since others ran: its mask has to show what is held, as that of a step that is not recorded
        (``ValueError``); masks that follow from it are those that generate() makes."""
        assert layer.held is not None
        shown = [layer.columns + 1] * len(layer.held.length)
        if mask is not None and mask.dim() == 2:
            shown = mask.sum(1).tolist() if bool(mask[:, -1].all()) else []
        if shown != [n + 1 for n in layer.held.length]:
            raise ValueError(
                f"ExpressCache: the mask shows {shown or 'no'} tokens of the sequences with the new ones, the cache "
                f"holds {layer.held.length}; what was padding has to stay padding, and nothing else may be hidden"
            )

    def _settled(self, layers: list[ExpressLayer]) -> list[Any]:
        """Do what is due in every layer; what a graph depends on."""
        known = self.known[1:] if self.known is not None else [None] * len(layers)
        for i, layer in enumerate(layers):
            if layer.columns >= self.due[i]:
                known[i] = layer.settle_recorded(self.end)
                assert layer.held is not None
                self.due[i] = layer.columns + layer.held.rest()
        return known

    def _run(self, model: PreTrainedModel, given: dict[str, Any]) -> Any:
        """The call that is recorded. A mask of this form is handed on as it is, and looked at by nobody."""
        step, mask = self.cache._step, torch.ones(len(self.ids), 1, 1, 1, dtype=torch.bool, device=self.ids.device)
        step.recorded = True
        try:
            tokens = dict(input_ids=self.ids, position_ids=self.positions, attention_mask=mask)
            return model(**tokens, past_key_values=self.cache, **given)
        finally:
            step.recorded = False


def let_generate_record(kind: type[ExpressCache]) -> None:
    """Let ``generate()`` run the steps of a rewritten model with such a cache on a GPU by :class:`Steps`, unless it is
    told ``disable_compile``. Nothing changes for other models and caches."""
    may_compile, compiled = GenerationMixin._valid_auto_compile_criteria, PreTrainedModel.get_compiled_call

    @wraps(may_compile)
    def _valid_auto_compile_criteria(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        if isinstance(model_kwargs.get("past_key_values"), kind) and self.device.type == "cuda":
            return not generation_config.disable_compile
        return may_compile(self, model_kwargs, generation_config)

    @wraps(compiled)
    def get_compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
        if not installed(self):
            return compiled(self, compile_config)

        def call(*args: Any, **inputs: Any) -> Any:
            cache = inputs.get("past_key_values")
            if isinstance(cache, kind):
                return cache.steps(self, inputs)
            return compiled(self, compile_config)(*args, **inputs)

        return call

    GenerationMixin._valid_auto_compile_criteria = _valid_auto_compile_criteria  # type: ignore[method-assign]
    PreTrainedModel.get_compiled_call = get_compiled_call  # type: ignore[method-assign]
