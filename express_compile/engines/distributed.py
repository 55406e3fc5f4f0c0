"""Models on several devices: heads that processes share, and sequences in parts.

**Heads** (tensor parallel) need no call: shard the model by transformers' ``tp_plan`` or by ``parallelize_module``,
then :func:`express_compile.rewrite_attention` it or compile it as ever. Which heads a process has is seen by its
DTensors, and N processes give the bits of one. Where weights are plain tensors, :func:`shard_heads` says it.

**Sequences**: :func:`shard_sequence` after :func:`express_compile.rewrite_attention`. Each process has ``n / N``
consecutive tokens of every sequence. With ``"all_to_all"`` (DeepSpeed-Ulysses, arXiv 2309.14509) it computes attention
of all tokens for a part of the heads; with ``"coresets"`` of its tokens to themselves and to what
:mod:`express_compile.kernels.express_chunks` keeps of those before. Only attention sees that the sequence is in parts;
the rest of a model goes token by token, but for positions: give it :func:`position_ids`.

Through ``torch.distributed`` alone: any backend with ``all_to_all_single`` and ``all_gather_into_tensor``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..core.method import METHODS
from ..core.shards import declare
from ..core.spec import AttentionSpec, HeadShard, Mask
from ..kernels.express import Express, config_at
from ..kernels.express_chunks import Chunk, attend_chunk, make_coreset
from ..kernels.launch import Random
from ..routes.capture import captures_of
from ..routes.eager import rewritten_sites

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..routes.transformers.attention import Part, Result

Model = TypeVar("Model", bound=nn.Module)
HOW = ("all_to_all", "coresets")


def shard_heads(model: Model, mesh: DeviceMesh) -> Model:
    """Say that the heads of every attention module in ``model`` are the part of all heads that its place on ``mesh`` of
    one dimension says: process i of N has the i-th N-th of the KV heads, and their query heads. Returns ``model``.

    Only for weights that are plain tensors, in models that run eagerly or by ``backend="express"``; it goes before what
    DTensors say. Raises ``ValueError`` for a mesh of more dimensions.
    """
    _one_dimension(mesh)
    declare(model, mesh.get_local_rank(), mesh.size())
    return model


def position_ids(tokens: int, mesh: DeviceMesh, device: Any = None) -> torch.Tensor:
    """Positions of the tokens of this process, ``tokens`` of them, int64 ``[1, tokens]``: what a model of transformers
    takes as ``position_ids``."""
    _one_dimension(mesh)
    first = mesh.get_local_rank() * tokens
    return torch.arange(first, first + tokens, device=device)[None]


def shard_sequence(model: Model, mesh: DeviceMesh, how: str = "all_to_all") -> Model:
    """Let the attention of a rewritten model know that every process on ``mesh`` has a part of each sequence. Returns
    ``model``.

    Process i of N is given tokens ``i n / N`` to ``(i + 1) n / N - 1`` of all ``n`` (their ``input_ids`` and their
    :func:`position_ids`), and returns what belongs to these. Calls are prefills and training steps without key padding,
    windows and attention sinks, causal or, by all-to-all, without a mask; any other raises ``RuntimeError`` with its
    reason, for what a part of the tokens gives would be wrong. Pass ``use_cache=False``: a cache would hold the part.

    model: one whose attention modules choose their attention by name in transformers, after ``rewrite_attention``.
    mesh: of one dimension; each process has the same number of tokens.
    how: ``"all_to_all"``: each process gets all tokens of its part of the heads, attends as the policy says, and gives
        the results back: what one process computes, with gradients. N divides the KV heads, or they divide N; and it
        divides the heads. ``"coresets"``: each process sends ``O(s)`` rows per KV head instead. For Express, forward
        only; what the policy leaves exact runs by all-to-all.

    ``restore_attention`` and rewriting the model anew undo it. Raises ``ValueError`` for another ``how``, a mesh of
    more dimensions, a model that is not rewritten, or one with attention that writes itself.
    """
    _one_dimension(mesh)
    if how not in HOW:
        raise ValueError(f"how={how!r}: must be one of {', '.join(map(repr, HOW))}")
    sites = rewritten_sites(model)
    if captured := captures_of(model):
        raise ValueError(
            f"model: attention in {', '.join(repr(path or '(root)') for path in captured)} is no call that "
            "transformers chooses by name; only such calls can be given parts of a sequence"
        )
    if not sites:
        raise ValueError(
            f"model: {type(model).__name__} has no rewritten attention; call rewrite_attention(model) first"
        )
    parts = SequenceParts(mesh.get_group(), mesh.get_local_rank(), mesh.size(), how, next(iter(sites)))
    for site in sites.values():
        site.spread = parts
    return model


def sequence_of(model: nn.Module) -> list[SequenceParts]:
    """What :func:`shard_sequence` made of a model: one for each call of it, with the bytes that were sent."""
    found = {id(site.spread): site.spread for site in rewritten_sites(model).values() if site.spread is not None}
    return list(found.values())


def _one_dimension(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        names = ", ".join(map(repr, mesh.mesh_dim_names or ())) or "without names"
        raise ValueError(f"mesh: {mesh.ndim} dimensions ({names}); must be one, such as mesh['sequence']")


# ---- bytes -----------------------------------------------------------------------------------------------------------


def bytes_of_ring(spec: AttentionSpec, ranks: int) -> float:
    """Bytes that a process sends in ring attention: keys and values of its part, to all others in turn. ``spec``: of
    the whole sequence."""
    return (ranks - 1) / ranks * spec.B * spec.H_kv * spec.Lk * (spec.D + spec.Dv) * spec.dtype.itemsize


def bytes_of_all_to_all(spec: AttentionSpec, ranks: int) -> float:
    """Bytes that a process sends by all-to-all: queries, keys, values and results of its part, but what is its own."""
    H_kv = max(spec.H_kv, ranks)
    width = spec.H * (spec.D + spec.Dv) + H_kv * (spec.D + spec.Dv)
    return (ranks - 1) / ranks**2 * spec.B * spec.Lk * width * spec.dtype.itemsize


def bytes_of_coresets(spec: AttentionSpec, ranks: int, rows: int, halo: int) -> float:
    """Bytes that a process sends of a coreset of ``rows`` rows, to all others, and of its last ``halo`` tokens, to the
    next one."""
    return ((ranks - 1) * rows + halo) * spec.B * spec.H_kv * (spec.D + spec.Dv) * spec.dtype.itemsize


def bytes_of_tensor_parallel(spec: AttentionSpec, ranks: int, features: int) -> float:
    """Bytes that a process sends by tensor parallel, in a layer of a decoder with ``features``: two sums over all
    processes, of the features of all tokens, in rings."""
    return 2 * 2 * (ranks - 1) / ranks * spec.B * spec.Lq * features * spec.dtype.itemsize


# ---- what attention does ---------------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """Part j of ``x`` ``[ranks, ..]`` to process j, and the parts that the others have for this; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


@dataclass
class SequenceParts:
    """The processes that have a sequence in parts, for all sites of a model: what :attr:`Site.spread` is.

    sent: bytes that this process has sent to others so far, forward. Copies of a model have the same one; it cannot be
    pickled.
    """

    group: Any
    rank: int
    ranks: int
    how: str
    first: str
    sent: float = 0.0

    def __deepcopy__(self, memo: Any) -> SequenceParts:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model that has a part of its sequences (shard_sequence) cannot be pickled; its state_dict can"
        )

    def __call__(self, part: Part) -> Result:
        """A call of attention with this process's tokens."""
        site, given = part.site, part.given
        self._check(part)
        if site.path == self.first:
            self._require_equal(given.key.shape[2], given.key.device)
        if self.how == "coresets":
            n = given.key.shape[2] * self.ranks
            spec = replace(part.proof.spec(given), Lq=n, Lk=n)
            plan = site.plans(site.path, spec, given.gradient)
            if plan.verdict == "rewritten":
                self._check_coresets(part, plan.method)
                site.report(plan, spec)
                config = config_at(n, **METHODS[plan.method].part(plan.params, spec.shard))
                return self._by_coresets(part, config, spec.scale)
        return self._by_all_to_all(part)

    def _check(self, part: Part) -> None:
        """Raise ``RuntimeError`` for a call of which the part does not say what the whole is."""
        site, given, mask = part.site, part.given, part.proof.mask
        (Lq, Lk), window = (given.query.shape[2], given.key.shape[2]), given.arguments.get("sliding_window")
        reasons = {
            f"its mask is not proven: {mask.unknown}": mask.unknown is not None,
            f"it has {Lq} queries and {Lk} keys, so it continues a cache": not Lq == Lk == part.proof.visible,
            "some of its tokens are padding": part.proof.padding is not None,
            f"its mask is {mask}": mask not in (Mask(causal=True), Mask()),
            f"it has a window of {window} tokens": window is not None and window < Lk * self.ranks,
            "it has attention sinks": given.arguments.get("s_aux") is not None,
            "the call asks for attention weights": part.wants_weights,
            "it is not causal, so that no part comes before another": self.how == "coresets" and not mask.causal,
        }
        reason = next((words for words, here in reasons.items() if here), None)
        if reason is not None:
            raise RuntimeError(
                f"{site.path!r} has a part of its sequence (shard_sequence) and cannot attend to the others: {reason}; "
                "needed are whole prefills, causal or without a mask, use_cache=False"
            )

    def _check_coresets(self, part: Part, method: str) -> None:
        given, reason = part.given, None
        if torch.is_grad_enabled() and any(x.requires_grad for x in (given.query, given.key, given.value)):
            reason = "has no gradient, and one is needed; use how='all_to_all', or torch.no_grad()"
        elif method != "express":
            reason = f"is for Express, and its plan has {method}; use how='all_to_all'"
        elif part.site.shadow is not None:
            reason = "cannot be watched; use how='all_to_all'"
        if reason is not None:
            raise RuntimeError(f"{part.site.path!r}: how='coresets' {reason}")

    def _require_equal(self, tokens: int, device: torch.device) -> None:
        """Raise on every process unless all have as many tokens: collectives would wait for ever."""
        own = torch.tensor([tokens], device=device)
        every = torch.empty(self.ranks, dtype=own.dtype, device=device)
        dist.all_gather_into_tensor(every, own, group=self.group)
        if len(set(numbers := every.tolist())) > 1:
            raise RuntimeError(f"processes have parts of {numbers} tokens; all must have as many (shard_sequence)")

    # -- all-to-all ------------------------------------------------------------------------------------------------

    def _by_all_to_all(self, part: Part) -> Result:
        _, query, key, value, *_ = given = part.given
        H, H_kv, ranks = query.shape[1], key.shape[1], self.ranks
        copies = 1 if H_kv % ranks == 0 else ranks // H_kv
        if H_kv * copies % ranks or H % (H_kv * copies):
            raise RuntimeError(
                f"{part.site.path!r}: {H} heads and {H_kv} KV heads for {ranks} processes (shard_sequence); their "
                "number must divide the KV heads, or be a multiple of them that divides the heads"
            )
        if copies > 1:
            key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
        first, _, of = given.shard or HeadShard(0, H_kv, H_kv)
        shard = HeadShard(first + self.rank * H_kv // ranks, H_kv * copies // ranks, of)
        out, weights = part.run(self._all_tokens(query, key, value), shard)
        # [B, n, H / ranks, Dv] -> [B, n / ranks, H, Dv]
        back = self._exchanged(out.unflatten(1, (ranks, -1)).movedim(1, 0))
        return back.movedim(0, 2).flatten(2, 3).contiguous(), weights

    def _all_tokens(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """``[B, h, n / ranks, D]`` of this process's tokens -> ``[B, h / ranks, n, D]`` of its heads, at once."""
        parts = [x.unflatten(1, (self.ranks, -1)).movedim(1, 0) for x in tensors]
        sizes = [x[0].numel() for x in parts]
        mine = self._exchanged(torch.cat([x.flatten(1) for x in parts], 1)).split(sizes, 1)
        return [x.view(part.shape).movedim(0, 2).flatten(2, 3) for x, part in zip(mine, parts, strict=True)]

    def _exchanged(self, parts: torch.Tensor) -> torch.Tensor:
        self.sent += parts[0].numel() * parts.element_size() * (self.ranks - 1)
        exchanged: torch.Tensor = _Exchange.apply(parts.contiguous(), self.group)
        return exchanged

    # -- coresets --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _by_coresets(self, part: Part, config: Express, scale: float) -> Result:
        given, random = part.given, Random(part.seed, part.site.layer)
        chunk = Chunk(config, given.key.shape[2], self.rank, self.ranks)
        own = self._with_halo(given, chunk)
        mine = torch.cat(make_coreset(own, chunk, scale, random), 3)
        every = mine.new_empty(self.ranks, *mine.shape)
        dist.all_gather_into_tensor(every, mine[None], group=self.group)
        self.sent += mine.numel() * mine.element_size() * (self.ranks - 1)
        out, _ = attend_chunk(given.query, own, self._split(every, given), chunk, scale, random)
        return out.transpose(1, 2).contiguous(), None

    def _with_halo(self, given: Any, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of this process, behind those of the one before that are its halo."""
        first = chunk.tokens - min(chunk.config.recent, chunk.tokens)
        last = torch.cat([x[:, :, first:] for x in (given.key, given.value)], 3)
        to, of = ([last.numel() * (i == self.rank + step) for i in range(self.ranks)] for step in (1, -1))
        halo = last.new_empty(sum(of))
        dist.all_to_all_single(halo, last.flatten()[: sum(to)], of, to, group=self.group)
        self.sent += sum(to) * last.element_size()
        if not self.rank:
            return given.key, given.value
        before = self._split(halo.view_as(last), given)
        key, value = (torch.cat(pair, 2) for pair in zip(before, (given.key, given.value), strict=True))
        return key, value

    @staticmethod
    def _split(rows: torch.Tensor, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = rows.split([given.key.shape[3], given.value.shape[3]], -1)
        return key, value
