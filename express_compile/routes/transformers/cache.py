"""A cache of transformers that holds the rows of a plan: :class:`ExpressCache`."""

from __future__ import annotations

import copy
import json
import os
import uuid
import weakref
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ...core.plan import SavedPlan
from ...core.policy import Policy
from ...core.rows import Rows, describe
from ...core.rows import heads as rows_of_heads
from ...core.spec import Site as Where
from ...core.spec import floor_power_of_two, layer_key
from ...kernels.express import Express
from ...kernels.heads import EVERYTHING, PerHead, exact_up_to
from ...kernels.held import Held, HeldRows
from ...kernels.launch import Random
from ...passes.place import named_modules
from ...planning.choose import methods_of
from ..eager import rewrite_attention, rewritten_sites, uncompiled
from .layers import ExpressLayer, Place, Step
from .masks import BY_PLACES
from .sites import find_sites
from .steps import Steps, let_generate_keep, let_generate_record

_TOKENS = 2**31  # more than positions can count: such a head grows with its text, and places are not reserved
_ROWS = ("budget", "sinks", "recent", "protected")
_OTHERS = ("halving", "inflation", "flatten", "block", "last")
_BY_ROWS = ("heads", "express")  # methods
_VERSION = 4
_SHAPE = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_parameters",
)  # fmt: skip


class ExpressCache(Cache):
    """A cache for ``generate()`` and for calls of a model that holds the rows of a plan, whatever the length.

    >>> cache = ExpressCache(model, budget=512)
    >>> model.generate(**inputs, past_key_values=cache, max_new_tokens=4096)

    model: a causal language model of transformers, compiled or not. If it is not rewritten yet, it is, by
        ``rewrite_attention(model, methods=["exact"])``: nothing else that it computes changes.
    plan: a :class:`SavedPlan` or the path of a file with one. Layers that are not in it hold everything.
    rows: instead, the :class:`Rows` of every KV head, one for all, or a mapping of module paths to these, as for
        ``PerHead``; layers that a mapping does not name hold everything.
    options: instead, one plan for all heads: ``budget`` (512; s of a coreset of fewer than 6 s rows, rounded down to
        a power of two, or 0 for none), ``sinks`` (32), ``recent`` (256), ``protected`` (256). And beside these or
        ``rows``, what ``PerHead`` takes: ``halving``, ``inflation``, ``flatten``, ``block``, ``last``. With none of all
        these, the rows of the policy by which the model is rewritten, ``ValueError`` where it says none.
    seed: of the random numbers that thinning takes; None draws one from torch's default generator.
    graphs: whether ``model.generate()`` on a GPU records a step of one token as a CUDA graph and replays it; in a loop
        of your own, ``cache.steps(model, inputs)`` does. Elsewhere steps run eagerly, as without.

    Heads that hold everything, and heads with ``selected`` blocks, which are chosen among all tokens, grow with the
    length; nothing else does. In steps of up to 32 tokens, selecting heads read the pages of 64 tokens that hold sinks
    and recent tokens and the ``selected`` best ones, by the means of eight keys each, an eighth more keys to hold; in
    longer ones (another turn of a chat) all tokens. Sequences that all heads hold whole are what ``DynamicCache`` makes
    of them, bit for bit. Layers with a sliding window, of linear attention or of both kinds are
    those of transformers, unchanged.

    Left padding and padding in between take no rows. ``crop`` takes back tokens that are still held as they are, the
    last ``recent`` ones at least in every head. A step that raised or was interrupted makes the next one raise until
    :meth:`rollback` or :meth:`reset`. ``copy.deepcopy`` copies a prefix; :meth:`save` writes it to a file.

    Raises ``TypeError`` or ``ValueError`` that name the argument, its value and what is allowed; ``ValueError`` for a
    model of which no layer could hold less than everything; ``RuntimeError`` beside a transformers that is too old.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        plan: SavedPlan | str | PathLike[str] | None = None,
        rows: Any = None,
        seed: int | None = 0,
        graphs: bool = False,
        **options: Any,
    ) -> None:
        seed = Policy(seed=seed).seed  # checks it
        model = _checked(model)
        sites = _sites(model)
        self._build(model, sites, _planned(model, sites, plan, rows, options), seed, graphs)

    def _build(
        self, model: PreTrainedModel, sites: Mapping[str, int], own: Mapping[str, PerHead], seed: int | None,
        graphs: bool,
    ) -> None:  # fmt: skip
        if not isinstance(graphs, bool):
            raise TypeError(f"graphs={graphs!r}: must be True or False")
        if not rewritten_sites(model):  # last, so that a cache which is refused leaves the model as it was
            rewrite_attention(model, methods=["exact"])
        self.seed = int(torch.randint(0, 2**31 - 1, ())) if seed is None else seed
        self._step = Step(len(sites))
        self.steps = Steps(graphs)
        let_generate_keep(model)
        if graphs:
            let_generate_record(model)
        self._model = _shape_of(model)
        layers, modules = DynamicCache(config=model.config).layers, dict(named_modules(model))
        for path, index in sites.items():
            place = Place(index, path, layer_key(path), weakref.ref(modules[path]))
            layers[index] = ExpressLayer(place, own[path], self.seed, self._step)
        super().__init__(layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpressCache:
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "ExpressCache: cannot be pickled, for it belongs to a model in memory; save() writes it to a file, and "
            "copy.deepcopy copies it"
        )

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for layer in self.express_layers:
            words = describe(layer.own.rows)
            kinds[words] = kinds.get(words, 0) + 1
        rows = "; ".join(f"{count} layers: {words}" for words, count in kinds.items())
        return f"ExpressCache({self.get_seq_length()} tokens; {rows})"

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def express_layers(self) -> list[ExpressLayer]:
        """The layers that hold the rows of a plan; the others are those of transformers."""
        return [layer for layer in self.layers if isinstance(layer, ExpressLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of what the layers of a plan hold."""
        return sum(layer.nbytes for layer in self.express_layers)

    @property
    def rows_held(self) -> float:
        """Rows that a KV head of a layer with a plan holds of a sequence, on average; 0 before the first tokens."""
        counts = [layer.rows() for layer in self.express_layers]
        total = sum(x.numel() for x in counts)
        return sum(int(x.sum()) for x in counts) / total if total else 0.0

    # -- tokens of another cache --------------------------------------------------------------------------------------

    def take(self, full: Cache) -> None:
        """Hold the rows of the plan of all tokens in a ``full`` cache of the same model, none of which is padding.

        For a prompt that another attention has read: exactly, or by a method of this package. ``full`` is as before.
        Raises ``RuntimeError`` where this cache has tokens already, and ``ValueError`` for a ``full`` cache that does
        not hold all tokens of every layer, and for a model that has other layers than those of full attention.
        """
        if self.get_seq_length():
            raise RuntimeError(f"ExpressCache: has {self.get_seq_length()} tokens; reset() empties it")
        if others := sorted({type(x).__name__ for x in self.layers if not isinstance(x, ExpressLayer)}):
            raise ValueError(f"ExpressCache: {', '.join(others)} cannot take tokens; only layers of full attention can")
        plain = (x for x in getattr(full, "layers", ()) if type(x) is DynamicLayer)
        given = [(x.keys, x.values) for x in plain if x.keys is not None and x.values is not None and x.keys.shape[2]]
        sizes = {key.shape[2] for key, _ in given}
        if len(given) != len(self.layers) or len(sizes) != 1:
            raise ValueError(
                f"full={type(full).__name__}: must be a DynamicCache, the same tokens in {len(self.layers)} layers; "
                f"it has {len(given)} of {', '.join(map(str, sorted(sizes))) or 0} tokens"
            )
        for layer, (key, value) in zip(self.express_layers, given, strict=True):
            layer.take(key, value)

    # -- steps that did not end -------------------------------------------------------------------------------------

    def rollback(self) -> None:
        """Take back a step that raised or was interrupted; nothing happens if the last step ended.

        The cache is as it was before that step if it had at most 32 tokens, or if all tokens were still held.
        Raises ``RuntimeError`` otherwise: then only :meth:`reset` helps.
        """
        if self._step.whole:
            return
        layers = self.express_layers
        others = sorted({type(x).__name__ for x in self.layers if not isinstance(x, ExpressLayer)} - {"DummyLayer"})
        stuck = [
            x.place.path for x in layers if not (x.can_undo if x.place.number in self._step.done else not x.settling)
        ]
        if others or stuck:
            why = f"{', '.join(others)} cannot go back" if others else f"{stuck[0]!r} has moved rows of it already"
            raise RuntimeError(f"ExpressCache: the step cannot be taken back, {why}; reset() empties the cache")
        for layer in layers:
            if layer.place.number in self._step.done or layer.place.number == self._step.open:
                layer.undo(layer.place.number in self._step.done)
        self._step.clear()

    def reset(self) -> None:
        """Forget everything, also a step that was interrupted."""
        super().reset()
        self._step.clear()
        self.steps.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back, of all layers or of none: ``ValueError`` where a head has
        thinned or dropped one of them, and what layers of transformers raise that cannot go back."""
        self._step.require_whole()
        for layer in self.express_layers:
            layer.require_croppable(-int(tokens_to_remove))
        layers: list[Any] = sorted(self.layers, key=lambda x: isinstance(x, ExpressLayer))  # others can still raise
        for each in layers:
            each.crop(tokens_to_remove)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file of safetensors, in one step: the rows, and as JSON in its header the plan and the
        shape of the model.

        Raises ``RuntimeError`` after a step that was interrupted, ``ValueError`` for a cache with layers of
        transformers or without tokens, ``OSError`` if the file cannot be written.
        """
        self._step.require_whole()
        if others := sorted({type(x).__name__ for x in self.layers if not isinstance(x, ExpressLayer)}):
            raise ValueError(f"ExpressCache: {', '.join(others)} cannot be saved; only layers of full attention can")
        layers: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        for layer in self.express_layers:
            if layer.like is None:
                raise ValueError("ExpressCache: there are no tokens to save")
            data, own = _saved(layer)
            layers.append(data)
            tensors |= {f"{layer.place.number}.{name}": x.detach().contiguous().cpu() for name, x in own.items()}
        weights = _checksum([layer.place.module() for layer in self.express_layers])
        header = {"version": _VERSION, "model": self._model, "weights": weights, "seed": self.seed, "layers": layers}
        target = Path(os.path.realpath(path))
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            save_file(tensors, part, {"express_compile": json.dumps(header)})
            os.replace(part, target)
        except SafetensorError as error:
            raise OSError(f"ExpressCache: {str(path)!r} cannot be written: {error}") from None
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: PreTrainedModel, *, graphs: bool = False, **options: Any
    ) -> ExpressCache:
        """The cache in a file that :meth:`save` wrote, for ``model`` and on its device. ``options``, if given, are
        those of the class; then the file must have the same plan. ``graphs``, as of the class, is in no file.

        Raises ``ValueError`` that says what does not fit: the model, its dtype or the plan; ``OSError`` if the file
        cannot be read.
        """
        name, model = f"ExpressCache: {str(path)!r}", _checked(model)
        with open(path, "rb"):  # a clear error for a file that cannot be read
            pass
        try:
            with safe_open(path, "pt", str(model.device)) as file:
                header = json.loads((file.metadata() or {})["express_compile"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']}")
        except Exception as error:
            raise ValueError(f"{name}: is no file that save() of this version wrote: {error}") from None
        _require_fits(name, header, model)
        entries = {entry["path"]: entry for entry in header["layers"]}
        sites = _sites(model)
        if {path: entry["index"] for path, entry in entries.items()} != sites:
            raise ValueError(f"{name}: has the layers {', '.join(entries)}; the model has {', '.join(sites)}")
        modules = dict(named_modules(model))
        here = _checksum([modules[path] for path in sites])
        if None not in (here, header["weights"]) and here != header["weights"]:
            raise ValueError(f"{name}: was saved from another model: its weights of attention were others")
        own = {
            path: PerHead(rows_of_heads(entry["options"]["rows"]), **{k: entry["options"][k] for k in _OTHERS})
            for path, entry in entries.items()
        }
        if options:
            seed = Policy(seed=options.pop("seed", header["seed"])).seed
            given = options.pop("plan", None), options.pop("rows", None), options
            for path, asked in _planned(model, sites, *given).items():
                if asked != own[path] or seed != header["seed"]:
                    raise ValueError(
                        f"{name}: {path!r} holds {describe(own[path].rows)} (seed {header['seed']}), asked is "
                        f"{describe(asked.rows)} (seed {seed})"
                    )
        cache = cls.__new__(cls)
        cache._build(model, sites, own, header["seed"], graphs)
        for layer in cache.express_layers:
            prefix = f"{layer.place.number}."
            mine = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            _restore(layer, entries[layer.place.path], mine)
        return cache


# ---- what was asked for ---------------------------------------------------------------------------------------------


def _planned(
    model: PreTrainedModel, sites: Iterable[str], plan: Any, rows: Any, options: Mapping[str, Any]
) -> dict[str, PerHead]:
    """What the arguments of a cache say of every site, or the policy by which the model is rewritten."""
    asked, known = _asked(plan, rows, options), rewritten_sites(model)
    if asked is None and all(methods_of(site.plans.policy, site.path) == ("exact",) for site in known.values()):
        asked = Policy(methods=("heads",))
    own = {path: (asked, path) if asked else (known[path].plans.policy, known[path].path) for path in sites}
    found = {path: _rows_at(*each) for path, each in own.items()}
    if not any(found.values()):
        says = "the policy by which the model is rewritten says" if asked is None else "plan: has"
        raise ValueError(
            f"{says} no rows for {', '.join(sites)}; give budget=, rows= or plan= (all tokens: "
            "rows=Rows(everything=True))"
        )
    if unknown := sorted(set(rows) - set(sites) if isinstance(rows, Mapping) else ()):
        raise ValueError(
            f"rows: no full-attention layer at {', '.join(map(repr, unknown))}; there are {', '.join(sites)}"
        )
    return {path: x or PerHead((EVERYTHING,)) for path, x in found.items()}


def _asked(plan: Any, rows: Any, options: Mapping[str, Any]) -> Policy | None:
    """The policy that arguments mean; None where nothing is asked for."""
    if unknown := sorted(set(options) - {*_ROWS, *_OTHERS}):
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}: allowed are {', '.join((*_ROWS, *_OTHERS))}")
    if plan is not None:
        if rows is not None or options:
            given = [*(["rows"] if rows is not None else []), *options]
            raise TypeError(f"{', '.join(given)}: not allowed beside plan, which says it for each head")
        return Policy(plan=plan)
    named = [name for name in _ROWS if name in options]
    if rows is not None and named:
        raise TypeError(f"{', '.join(named)}: not allowed beside rows, which say it for each head")
    if rows is None and not options:
        return None
    if rows is None:
        budget, *others = (options.get(name, x) for name, x in zip(_ROWS, (512, 32, 256, 256), strict=True))
        if isinstance(budget, bool) or not isinstance(budget, int) or (budget < 2 and budget != 0):
            raise ValueError(f"budget={budget!r}: must be a number of rows, 2 or more, or 0 for no thinned rows")
        rows = Rows(thinned=floor_power_of_two(budget) if budget else 0, **dict(zip(_ROWS[1:], others, strict=True)))
    own = PerHead(rows, **{name: options[name] for name in _OTHERS if name in options})
    return Policy(methods=("heads",), method_options={"heads": own.data()})


def _rows_at(policy: Policy, path: str) -> PerHead | None:
    """What the KV heads of a module see by a policy; None where it says nothing of rows."""
    choices = []
    if policy.plan is not None:
        entries = [entry for entry in policy.plan.at(path) if entry.rows]
        choices = [(entry.method, policy.of_entry(entry)) for entry in entries]
    else:
        choices = [(method, policy.at(path)) for method in methods_of(policy, path) if method in _BY_ROWS][:1]
    found = [_per_head(own.of(method), path) for method, own in choices if method in _BY_ROWS]
    if any(own != found[0] for own in found):
        raise ValueError(f"plan: {path!r} has entries of different rows; a cache has one for all calls")
    return found[0] if found else None


def _per_head(own: PerHead | Express, path: str) -> PerHead:
    if isinstance(own, Express):
        rows = Rows(own.sinks, own.recent, own.s, own.protected)
        return PerHead((rows,), own.halving, own.M, own.flatten, own.block)
    found = own.at(Where(path=path)) or (EVERYTHING,)
    return replace(own, rows=tuple(EVERYTHING if exact_up_to(rows) >= _TOKENS else rows for rows in found))


def _checked(model: Any) -> PreTrainedModel:
    """The model, without what ``torch.compile`` has put around it; an error for one that no cache can be made for."""
    if BY_PLACES:
        raise RuntimeError(f"an ExpressCache needs transformers 5.17 or newer: this is {transformers.__version__}")
    model = uncompiled(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={type(model).__name__}: must be a PreTrainedModel of transformers")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model={type(model).__name__}: has an encoder and a decoder; only decoders alone are supported"
        )
    return model


def _sites(model: PreTrainedModel) -> dict[str, int]:
    """Module path -> number of the layer, for the layers whose tokens a plan may thin."""
    found: dict[str, int] = {}
    plain = [type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers]
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if shared := [i for i, kind in enumerate(kinds) if kind == "full_attention" and not any(plain[i : i + 1])]:
        raise ValueError(
            f"model={type(model).__name__}: layers {shared} attend to the keys and values that earlier ones have in "
            "the cache (Gemma 3n); such models are not supported"
        )
    modules = dict(named_modules(model))
    for path in rewritten_sites(model) or find_sites(model):
        index = getattr(modules[path], "layer_idx", None)
        if isinstance(index, int) and index < len(plain) and plain[index]:
            found[path] = index
    numbers = sorted(found.values())
    if several := [path for path, index in found.items() if numbers.count(index) > 1]:
        raise ValueError(
            f"model={type(model).__name__}: {', '.join(several[:2])}, ... share the layers of a cache, as with cross "
            "attention; such models are not supported"
        )
    if numbers != [index for index, is_plain in enumerate(plain) if is_plain]:
        raise ValueError(
            f"model={type(model).__name__}: layers {[i for i, x in enumerate(plain) if x]} have full attention, and "
            f"transformers lets {numbers} of them be told another attention; the others would ignore weights"
        )
    if not found:
        raise ValueError(f"model={type(model).__name__}: has no layer of full attention; use DynamicCache")
    return found


# ---- files --------------------------------------------------------------------------------------------------------


def _shape_of(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    return {**shape, "dtype": str(model.dtype).removeprefix("torch.")}


def _checksum(modules: Iterable[torch.nn.Module | None]) -> int | None:
    """Of some values of every parameter, by which other weights of the same shapes are told apart; None where they
    cannot be read."""
    checksum = 0
    for module in modules:
        for x in [] if module is None else module.parameters():
            if type(x) is torch.nn.Parameter and not x.is_meta:
                some = x.detach().flatten()[:: max(1, x.numel() // 8)]
                checksum = zlib.crc32(some.double().cpu().numpy().tobytes(), checksum)
    return checksum or None


def _require_fits(name: str, header: Mapping[str, Any], model: PreTrainedModel) -> None:
    mine, theirs = header["model"], _shape_of(model)
    if wrong := [
        f"{key}={mine.get(key)!r}, the model has {theirs[key]!r}" for key in theirs if mine.get(key) != theirs[key]
    ]:
        raise ValueError(f"{name}: was saved from another model: {'; '.join(wrong)}")


def _saved(layer: ExpressLayer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A layer as plain data and tensors."""
    assert layer.like is not None
    data = {
        "path": layer.place.path,
        "index": layer.place.number,
        "options": layer.own.data(),
        "columns": layer.columns,
        "padded": layer.padded,
        "heads": layer.shard and list(layer.shard),
    }
    if layer.held is None:
        assert layer.keys is not None and layer.values is not None
        return data, {"keys": layer.keys, "values": layer.values}
    held = {"length": layer.held.length, "left": [part.left for part in layer.held.parts]}
    held["scale"] = layer.held.parts[0].scale
    tensors: dict[str, torch.Tensor] = {}
    for i, part in enumerate(layer.held.parts):
        tensors |= {f"{i}.{name}": getattr(part, name) for name in HeldRows.TENSORS}
    return {**data, "held": held}, tensors


def _initialize(layer: ExpressLayer, data: Mapping[str, Any], key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises ``ValueError`` where processes share the heads otherwise than those that saved did."""
    layer.lazy_initialization(key, value)
    saved, here = data.get("heads"), layer.shard and list(layer.shard)
    if saved != here:
        words = [f"heads {x[0]} to {x[0] + x[1] - 1} of {x[2]}" if x else "all heads" for x in (saved, here)]
        raise ValueError(f"{data['path']!r}: {words[0]} were saved, and this process has {words[1]}")


def _restore(layer: ExpressLayer, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put what :func:`_saved` gave into an empty layer."""
    layer.columns, layer.padded = data["columns"], data["padded"]
    if "held" not in data:
        _initialize(layer, data, tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        return
    held, parts = data["held"], range(len(data["held"]["left"]))
    H_kv = sum(tensors[f"{i}.key"].shape[1] for i in parts)
    key, value = (tensors[f"0.{name}"][:, :1, :0].expand(-1, H_kv, -1, -1) for name in ("key", "value"))
    _initialize(layer, data, key, value)
    layer.keys = layer.values = None
    random = Random(layer.seed_on(key.device), layer.place.key)
    layer.held = Held(layer.mine, key, value, random, held["scale"], layer.place.number)
    layer.held.length = held["length"]
    for i, part in enumerate(layer.held.parts):
        part.left = held["left"][i]
        for name in HeldRows.TENSORS:
            setattr(part, name, tensors[f"{i}.{name}"])
