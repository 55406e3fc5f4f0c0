"""A layer of an :class:`~.cache.ExpressCache`, by transformers' protocol for layers of a cache.

transformers hands new keys and values to a layer of the cache, and what that returns to the attention function. Until
something has to be thinned, a layer returns all tokens, as ``DynamicLayer`` does; afterwards :class:`Weighted`, which
only the attention function of this package knows, and which raises for everybody else. That function comes back to
:meth:`ExpressLayer.attend`, where the mask says which new tokens are padding: only then they are held. So a step has
two halves, and :class:`Step` knows which layers have both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from ...core.call import Call, call
from ...core.method import METHODS
from ...core.plan import Plan
from ...core.rows import describe, to_numbers
from ...core.shards import seed_of, shard_of
from ...core.spec import HeadShard, default_scale
from ...kernels.heads import PerHead, exact_up_to, groups
from ...kernels.held import STEP, Held, Real
from ...kernels.launch import Random
from ..tracers import untraced
from .proof import Given, Proof, is_proven, prove
from .sites import Site, site_of

_LAYER = "_express_compile_layer"  # an attribute of keys that a layer returned
_CHANGED = (
    ". Of models that compute keys and values anew from what a cache gives (latents of MLA, repeated heads) and of "
    "those that leave layers out, no tokens can be held"
)
_MEMO = "_express_compile_columns"  # an attribute of a mask: what was read of it


class Weighted(torch.Tensor):
    """What stands for keys or values of which a cache holds weighted rows: a shape, a dtype and a device.

    Whatever computes with it would ignore the weights, and raises ``RuntimeError``.
    """

    @staticmethod
    def __new__(cls: type[Weighted], shape: tuple[int, ...], like: torch.Tensor) -> Weighted:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _METADATA:
            cls._refuse()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        cls._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise RuntimeError(
            "ExpressCache: these keys and values are weighted rows, and the attention that runs would ignore the "
            "weights; use the cache with the model it was built for, whose attention is rewritten (restore_attention, "
            f"set_attn_implementation and torch.export undo that){_CHANGED}"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Weighted(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "device", "dtype", "ndim", "is_cuda", "is_cpu", "is_meta", "requires_grad")
} | {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "__hash__")}


def layer_of(key: torch.Tensor) -> ExpressLayer | None:
    """The layer that returned ``key`` as the keys of a call; None where it comes from elsewhere."""
    return getattr(key, _LAYER, None)


@dataclass
class Step:
    """Which layers of a cache have the tokens of the step that runs.

    layers: how many there are. done: those that have attended. open: the one that has the tokens and has not attended.
    changes: how often anything was done that is no replay. recorded: whether the launches of a step are being recorded,
    which is no step by itself.
    """

    layers: int = 0
    done: set[int] = field(default_factory=set)
    open: int | None = None
    changes: int = 0
    recorded: bool = False

    @property
    def whole(self) -> bool:
        return self.open is None and len(self.done) in (0, self.layers)

    def require_whole(self) -> None:
        """Raise ``RuntimeError`` unless the last step ran through all layers."""
        if not self.whole:
            at = "" if self.open is None else f", and in layer {self.open} its attention did not run"
            raise RuntimeError(
                f"ExpressCache: the last step ended half-way, after {len(self.done)} of {self.layers} layers{at}: it "
                "was interrupted, or the cache is used with a model that is not the rewritten one it was built for; "
                f"rollback() takes the step back, reset() empties the cache{_CHANGED}"
            )

    def begin(self, index: int) -> None:
        self.changes += 1
        if self.open is not None or index in self.done:
            self.require_whole()
            self.done.clear()
        self.open = index

    def end(self) -> None:
        assert self.open is not None
        self.done.add(self.open)
        self.open = None

    def clear(self) -> None:
        self.changes += 1
        self.done.clear()
        self.open = None


class Place(NamedTuple):
    """Which layer of which model: its number, the path of its module, the key of its random numbers, the module."""

    number: int
    path: str
    key: int
    module: Callable[[], torch.nn.Module | None]


class Like(NamedTuple):
    """What all tokens of a layer have in common."""

    batch: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor) -> Like:
        return cls(key.shape[0], key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)


class ExpressLayer(CacheLayerMixin):
    """The tokens of one layer: all of them while no head has to drop or thin one, then the rows that its plan holds.

    own: the rows of every KV head of the model's layer; ``shard``: those of them that this process has, if not all,
    whose rows are ``mine``. columns: how many tokens were seen, padding included. held: what is held once not
    all tokens are. Sequences that ``exact_up_to`` all heads hold are what a ``DynamicLayer`` would hold.
    """

    is_sliding = False
    is_croppable = True  # by the tokens of the last step, without a trace

    def __init__(self, place: Place, own: PerHead, seed: int, step: Step) -> None:
        super().__init__()
        self.place, self.own, self.seed, self.step = place, own, seed, step
        self.limit = min(map(exact_up_to, own.rows))
        self._empty()

    def _empty(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.columns = 0
        self.padded = 0  # columns from which on there was no padding, once not all tokens are held
        self.last = 0  # columns of the last step
        self.like: Like | None = None
        self.shard: HeadShard | None = None
        self.mine = self.own
        self.held: Held | None = None
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens that have not attended yet
        self.settling = False  # whether rows are being moved, so that an interruption leaves none as they were

    def __repr__(self) -> str:
        return f"ExpressLayer({describe(self.own.rows)}; {self.columns} tokens)"

    # -- transformers' protocol: adding tokens --------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        module, (_, H_kv, _, D) = self.place.module(), key_states.shape
        try:
            self.shard = shard_of(module, H_kv * getattr(module, "num_key_value_groups", 1), H_kv, D)
            whole = H_kv if self.shard is None else self.shard.of
            if len(self.own.rows) == whole * getattr(module, "num_key_value_groups", 1) != whole:
                raise ValueError(
                    f"rows lists {len(self.own.rows)} query heads; an ExpressCache holds rows by KV head, of which "
                    f"there are {whole}: give it a plan that was fitted without query_heads, "
                    "ExpressCache(model, plan=...), or rows= for every KV head or for all"
                )
            groups(self.own.rows, whole)
        except ValueError as error:
            raise ValueError(f"{self.place.path!r}: {error}") from None
        if self.shard is not None and len(self.own.rows) > 1:
            first = self.shard.first
            self.mine = replace(self.own, rows=self.own.rows[first : first + self.shard.heads])
        self.like = Like.of(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @untraced
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take ``[B, H_kv, n, D]`` and ``[B, H_kv, n, Dv]``: what the attention function gets as keys and values."""
        self._require_usable()
        # autocast leaves rotated keys in float32, values as a product gives them; DynamicLayer joins both in the former
        dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._require_alike(key_states, value_states)
        if not self.step.recorded:
            self.step.begin(self.place.number)
        if self.held is not None:  # the last step can no longer be undone
            self.keys = self.values = None
        total = self.columns + key_states.shape[2]
        if self.held is None and total <= self.limit:
            assert self.keys is not None and self.values is not None
            self.new = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            keys, values = (x.view(x.shape) for x in self.new)
        else:
            self.new = key_states, value_states
            keys, values = (Weighted((*x.shape[:2], total, x.shape[3]), x) for x in self.new)
        setattr(keys, _LAYER, self)
        return keys, values

    def attend(self, given: Given, weights: bool) -> torch.Tensor | None:
        """The attention of a call whose keys :meth:`update` returned, ``[B, H, n, Dv]``; None where those are all
        tokens. ``weights``: whether the call wants attention weights. Then the tokens are held."""
        site = site_of(given.module)
        if site is None or given.module is not self.place.module():
            raise ValueError(
                f"ExpressCache: the attention of another model, or of another layer, was given what the cache has for "
                f"{self.place.path!r}; a cache belongs to the model it was built for"
            )
        if self.new is None:
            raise RuntimeError(f"ExpressCache: {self.place.path!r} attends twice to the tokens of one step")
        key, value = self.new
        n = given.query.shape[2]
        self._require_new(given.mask, given.arguments.get("position_ids"), n)
        self._require_computable(given, site)
        if self.held is None and self.columns + n <= self.limit:
            self.keys, self.values = key, value
            self._end(n)
            return None
        if weights:
            raise ValueError(
                f"{self.place.path!r}: output_attentions: weighted rows have no attention weights per token"
            )
        if self.step.recorded:
            return self._record(given.query, key, value)
        out = self._attend(site, given, prove(site, given), key, value)
        self._end(n)
        return out

    def _end(self, n: int) -> None:
        self.columns, self.last, self.new = self.columns + n, n, None
        self.step.end()

    @torch.no_grad()
    def _attend(self, site: Site, given: Given, proof: Proof, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        n, scaling = key.shape[2], given.arguments.get("scaling")
        scale = float(default_scale(key.shape[3]) if scaling is None else scaling)
        self._require_causal(proof, n)
        past, real = self._read(given.mask, proof.padding, n)
        site.report(Plan("heads", "rewritten", "what an ExpressCache holds", rows=tuple(self.own.rows)))
        if self.held is None:
            out = self._fill(given, proof, scale, real)
        elif self.held.length != past:
            raise ValueError(
                f"ExpressCache: {self.place.path!r}: the mask shows {past} earlier tokens of the sequences, the cache "
                f"holds {self.held.length}; what was padding has to stay padding, and nothing else may be hidden"
            )
        else:
            is_single = real is None and given.query.is_cuda and n == 1 and self._fits_step(given.query)
            self.settling = True
            self.held.settle(is_single)
            self.settling = n > STEP
            if is_single:
                out = self.held.step(given.query, key, value)
            else:
                out = self.held.extend(given.query, key, value, real)
            self.settling = False
        if real is not None:
            self.padded = self.columns + max(max((i for i, x in enumerate(own, 1) if not x), default=0) for own in real)
        return out

    def _fill(self, given: Given, proof: Proof, scale: float, real: Real) -> torch.Tensor:
        """The first step after which not all tokens are held; a prompt attends by the plan, as the method ``heads``
        computes it."""
        assert self.new is not None and self.keys is not None and self.values is not None
        seed = self.seed_on(given.query.device)
        held = Held(self.mine, *self.new, Random(seed, self.place.key), scale, self.place.number)
        old = None if proof.padding is None else _tuples(proof.padding[:, : self.columns])
        held.fill(self.keys, self.values, old)
        self.padded = 0 if proof.padding is None else _last(proof.padding[:, : self.columns])
        if self.new[0].shape[2] <= STEP:
            self.held = held
            return held.extend(given.query, *self.new, real)
        keys, values = (torch.cat(pair, 2) for pair in zip((self.keys, self.values), self.new, strict=True))
        options = {"rows": to_numbers(self.mine.rows), **self.own.pack(), "min_length": 0}
        asked = Call(given.query, keys, values, proof.padding, seed, scale, self.place.key, options=options)
        out: torch.Tensor = call(METHODS["heads"].op, asked)[0]
        held.fill(*self.new, real)
        self.held, self.keys, self.values = held, None, None
        return out

    @torch.no_grad()
    def take(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold the tokens ``[B, H_kv, n, .]`` of another cache as if a first step had brought them; nothing attends."""
        self.lazy_initialization(key, value)
        self.columns = self.last = key.shape[2]
        if self.columns <= self.limit:
            self.keys, self.values = key, value
            return
        scaling = getattr(self.place.module(), "scaling", None)
        scale = float(default_scale(key.shape[3]) if scaling is None else scaling)
        random = Random(self.seed_on(key.device), self.place.key)
        self.held = Held(self.mine, key, value, random, scale, self.place.number)
        self.held.fill(key, value)
        self.keys = self.values = None

    def seed_on(self, device: torch.device) -> torch.Tensor:
        """The seed for the heads of this process."""
        return torch.tensor(seed_of(self.seed, self.shard), device=device)

    # -- steps that are recorded ----------------------------------------------------------------------------------

    def _fits_step(self, query: torch.Tensor) -> bool:
        assert self.held is not None and self.like is not None
        return query.dtype == self.like.dtype and self.held.fits_step(query.shape[1] // self.like.heads)

    def records(self, sequences: int) -> bool:
        """Whether a step of one token of every sequence can be recorded, or a record replayed."""
        if self.held is None or self.settling or self.shard is not None or len(self.held.length) != sequences:
            return False
        return self.held.fits_step(getattr(self.place.module(), "num_key_value_groups", 1))

    def _record(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The attention of a step that is recorded, which counts no token."""
        assert self.held is not None, "records() says so"
        if not self._fits_step(query):
            raise ValueError(f"ExpressCache: {self.place.path!r}: graphs=True: {query.dtype} queries of another shape "
                             "or dtype than the keys have cannot be recorded")  # fmt: skip
        self.new = None
        return self.held.launch_step(query, key, value)

    def settle_recorded(self, end: torch.Tensor) -> Any:
        """What has to be done before a replay that adds a token; see :meth:`Held.prepare_step`."""
        assert self.held is not None
        self._require_usable()
        self.settling = True
        self.held.settle(single=True)
        self.settling = False
        self.keys = self.values = None
        return self.held.prepare_step(end)

    def launch_due_recorded(self) -> None:
        """Let rows change places before the replay in which that is due."""
        assert self.held is not None
        self.held.launch_due()

    def look_ahead_recorded(self) -> None:
        """Decide what is due soon after a token that a replay adds and that is not counted yet."""
        assert self.held is not None
        self.held.look_ahead(1)

    def end_recorded(self) -> None:
        """Count the token that a replay added."""
        assert self.held is not None
        self.held.end_step()
        self.columns, self.last = self.columns + 1, 1

    def undo_recorded(self, columns: int) -> None:
        """Be as before a step that raised or was interrupted, when there were so many ``columns``."""
        assert self.held is not None
        self.new = None
        if self.columns > columns:
            self._drop(1)
        else:
            self.step.changes += 1
            self.held.drop(0, 1)

    # -- what cannot be computed ----------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        if self.settling:
            raise RuntimeError(
                f"ExpressCache: {self.place.path!r} was interrupted while rows were moved and holds no whole state; "
                "reset() empties the cache"
            )

    def _require_alike(self, key: torch.Tensor, value: torch.Tensor) -> None:
        now, like = Like.of(key, value), self.like
        assert like is not None
        words = ("sequences", "KV heads", "channels of keys", "channels of values", "dtype", "device")
        for what, mine, theirs in zip(words, like, now, strict=True):
            if mine != theirs:
                how = "; batch_repeat_interleave() and batch_select_indices() change that" if what == words[0] else ""
                raise ValueError(
                    f"ExpressCache: {self.place.path!r} has {what}: {mine}; the new tokens have {theirs}{how}"
                )

    def _require_new(self, mask: torch.Tensor | None, positions: Any, n: int) -> None:
        """Raise ``ValueError`` where every sequence begins at position 0 again behind tokens that the cache has."""
        known = isinstance(positions, torch.Tensor) and positions.dim() == 2
        if not known or not self.columns or n == 1 or self.step.done:
            return
        again = positions == 0
        if is_proven(mask) and mask.padding is not None:  # there may have been padding only, which has position 0, too
            old, new = mask.padding[:, : self.columns], mask.padding[:, self.columns :]
            new = new | ~new.any(1, keepdim=True)  # tokens that are added once more may all be beyond the mask
            again = (again & new)[old.any(1)]
        if len(again) and bool(again.any(1).all()):
            raise ValueError(
                f"ExpressCache: position_ids begin at 0 again, and the cache has {self.columns} tokens. generate() adds"
                " those of a conversation that the cache has not; with use_cache=False, and in assisted decoding with a"
                " cache that has tokens, transformers adds all of them once more. reset() empties the cache"
            )

    def _require_computable(self, given: Given, site: Site) -> None:
        """Raise ``ValueError`` for attention that weighted rows cannot stand in for, before they have to."""
        asked = given.arguments.get
        kinds = {"softcap": "a logit soft-cap", "s_aux": "attention sinks", "sinks": "attention sinks"}
        kinds |= {"position_bias": "a position bias", "cache": "a paged cache", "indices": "sparse indices"}
        found = [f"{words} ({name})" for name, words in kinds.items() if asked(name) is not None]
        if asked("sliding_window") is not None:
            found.append("a sliding window")
        if found and self.limit != float("inf"):
            raise ValueError(f"ExpressCache: {self.place.path!r} has {', '.join(found)}, which it does not compute")
        thins = self.held is not None or self.columns + given.query.shape[2] > self.limit
        if thins and asked("dropout"):
            raise ValueError(f"ExpressCache: {self.place.path!r} drops attention weights; call model.eval()")
        if thins and site.shadow is not None:
            raise ValueError(
                f"ExpressCache: {self.place.path!r} is watched, and what its error is cannot be known: exact attention "
                "needs all tokens, of which the cache holds a part; close() the watch, or generate with a DynamicCache"
            )
        if thins and torch.is_grad_enabled() and given.query.requires_grad:
            raise ValueError("ExpressCache: rows that are thinned give no gradient; run under torch.no_grad()")

    def _require_causal(self, proof: Proof, n: int) -> None:
        mask, total = proof.mask, self.columns + n
        reason = mask.unknown
        if reason is None and (mask.window is not None or mask.segments):
            reason = f"it is {mask}"
        if reason is None and n > 1 and not (mask.causal and proof.visible == total and mask.offset == total - n):
            reason = f"it is {mask} over {proof.visible} keys, not causal over all {total}"
        if reason is not None:
            raise ValueError(
                f"ExpressCache: {self.place.path!r}: from {int(self.limit) + 1} tokens on its mask must be causal and "
                f"hide nothing but padding, and that is not proven: {reason}"
            )

    def _read(self, mask: Any, padding: torch.Tensor | None, n: int) -> tuple[list[int], Real]:
        """How many earlier tokens of every sequence a mask shows, and which of the new columns are tokens; read back
        once for all layers."""
        if padding is None:
            assert self.like is not None
            return [self.columns] * self.like.batch, None
        known = getattr(mask, _MEMO, None)
        if known is None or known[0] != (self.columns, n):
            past = padding[:, : self.columns].sum(1)
            both = torch.cat([past[:, None], padding[:, self.columns :].to(past)], 1).tolist()
            rows = [tuple(map(bool, row[1:])) for row in both]
            known = (self.columns, n), [row[0] for row in both], None if all(map(all, rows)) else rows
            setattr(mask, _MEMO, known)
        return known[1], known[2]

    # -- transformers' protocol: sizes ------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are those of all tokens; what is held of them is no concern of the model."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no largest length."""
        return -1

    # -- transformers' protocol: taking tokens back -----------------------------------------------------------------

    @property
    def croppable(self) -> int:
        """How many of the last tokens can be taken back."""
        self._require_usable()
        if self.held is None:
            return self.columns
        return min(self.held.exact_tail, self.columns - self.padded)

    def require_croppable(self, count: int) -> None:
        """Raise ``ValueError`` where the last ``count`` tokens cannot be taken back."""
        if count < 0:
            raise ValueError(f"ExpressCache: crop({-count}): must be minus the number of tokens to take back")
        most = self.croppable
        if count > most:
            why = f"only the last {most} tokens are held as they are"
            if self.held is not None and self.columns - self.padded == most:
                why = f"before the last {most} tokens there is padding"
            raise ValueError(f"ExpressCache: crop({-count}): {why} in {self.place.path!r}")

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back. Raises ``ValueError`` where they are thinned already."""
        count = -int(tokens_to_remove)  # some versions give a tensor
        self.step.require_whole()
        self.require_croppable(count)
        if count and self.is_initialized:
            self._drop(count)

    def _drop(self, count: int) -> None:
        self.step.changes += 1
        self.columns -= count
        if self.keys is not None and self.values is not None and self.keys.shape[2] >= self.columns:
            self.held = None  # what there may be of it is of the last step alone
            self.keys, self.values = self.keys[:, :, : self.columns], self.values[:, :, : self.columns]
        elif self.held is not None:
            self.held.drop(count)
        self.last = max(0, self.last - count)

    @property
    def can_undo(self) -> bool:
        """Whether the last step can be taken back as if it had not been."""
        return not self.settling and (self.held is None or self.last <= STEP)

    def undo(self, attended: bool) -> None:
        """Take the last step back, whether it ``attended`` or not."""
        if attended:
            self._drop(self.last)
        elif self.held is not None and self.new is not None:
            if self.keys is not None:
                self.held = None
            else:
                self.held.drop(0, self.new[0].shape[2])
        self.new = None

    def reset(self) -> None:
        """Forget everything."""
        self._empty()

    # -- transformers' protocol: other batches, other devices ---------------------------------------------------------

    def _select(self, index: torch.Tensor) -> None:
        self.step.changes += 1
        self._require_usable()
        self.step.require_whole()
        if not self.is_initialized or self.like is None:
            return
        self.like = self.like._replace(batch=len(index))
        if self.keys is not None and self.values is not None:
            at = index.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)
        if self.held is not None:
            self.held.select(index)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The sequences at ``beam_idx`` int64 ``[B]``."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, side by side."""
        if self.like is not None:
            self._select(torch.arange(self.like.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The sequences at ``indices``: numbers, or a mask."""
        if self.like is not None:
            self._select(torch.arange(self.like.batch)[indices.cpu()])

    def offload(self) -> None:
        """Move what is held to the CPU; the next step needs :meth:`prefetch` before it."""
        self._to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move what is held back to the device of the tokens."""
        if self.like is not None:
            self._to(self.like.device)

    def _to(self, device: torch.device) -> None:
        self.step.changes += 1
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
        if self.held is not None:
            self.held.to(device)

    # -- what there is ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        plain = 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes
        return plain + (0 if self.held is None else self.held.nbytes)

    def rows(self) -> torch.Tensor:
        """How many rows every sequence and KV head holds: int64 ``[B, H_kv]``."""
        if self.held is not None:
            return self.held.rows()
        sizes = (0, 0) if self.like is None else self.like[:2]
        return torch.full(sizes, self.columns)


def _tuples(padding: torch.Tensor) -> list[tuple[bool, ...]]:
    return [tuple(row) for row in padding.tolist()]


def _last(padding: torch.Tensor) -> int:
    """The column behind the last padding of all sequences."""
    columns = (~padding).any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 0
