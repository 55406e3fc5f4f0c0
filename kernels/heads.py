"""Plans per head: each one attends to the rows that its own :class:`~express_compile.core.rows.Rows` say.

    out_i = sum_{j in S_i} w_j exp(scale <q_i, k_j>) v_j / sum_{j in S_i} w_j exp(scale <q_i, k_j>)

where S_i is what the head of query i sees: all tokens (exact attention), or sinks and recent tokens, and with them
thinned and protected rows (``express``), or blocks of 64 keys that the queries choose (``select.blocks``); w is 1, and
2^m for a thinned row. Heads differ: some need a window and nothing else, some single facts from far away, and few all
tokens. Heads with equal rows choose and thin together, with the random numbers of their own places in the layer, so
that equal rows for all heads are Express bit for bit. On CUDA all heads but the exact ones attend in one launch
(:mod:`.attend.mixed`), in which nothing is copied to lie beside its like.

The heads are KV heads, each with all its query heads, or query heads, which differ, too, in how many rows they need.
What is thinned, protected and chosen is of the KV head: query heads of one with equal rows share them, and of blocks,
which all its query heads put in one order, each takes as many of the first as its own rows say.

A head is exact while the sequence has no more tokens than its rows: ``sinks + recent``, and with it ``protected``, and
``4 thinned``, and ``64 selected``. The error of thinned rows is that of ``express``; a query with selected rows loses
the mass of the blocks that it did not choose. The choice is held fixed in gradients. The ``last`` queries of a call can
be exact in all heads: what a question at the end asks for is seldom among few rows. On CUDA they are among what attends
in the one launch, and with padding, or where there is little else to do, steps of decoding (:mod:`.attend.last`).

Supports causal self-attention (also continuing a cache), grouped queries, Dv != D, any length, key padding on any
side, float16, bfloat16, float32 (float64 on a CPU). Refuses what ``express`` refuses.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import sympy
import torch

from express_compile.core import cost as c
from express_compile.core.call import Call
from express_compile.core.method import Method, Refusal, cost_at, register
from express_compile.core.options import NUMBER, WHOLE, Kind, Options, option
from express_compile.core.plain import about, number
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows, from_numbers, to_numbers
from express_compile.core.rows import heads as rows_of_heads
from express_compile.core.spec import AttentionSpec, Site

from .attend import hopper
from .attend.last import attend_last, last_gradients
from .attend.mixed import Buffers, Chosen, HeadRows, Mixture, Place, mixed_attention_triton
from .attend.segments import (
    COMPACTED,
    TOKENS,
    Outputs,
    SegmentTable,
    Sources,
    causal_table,
    segment_attention,
    spanned_outputs,
)
from .exact import exact_attention
from .express import (
    BLOCK,
    Express,
    Layout,
    Unthinned,
    attend,
    backward,
    gradients,
    make_layout,
    of_heads,
    packed,
    packed_backward,
    packing_cost,
    prefill_only,
)
from .launch import Random, constant, jit, launch, load_rows, next_power_of_two, processors, sequence, strided, tl
from .op import define_attention
from .select.blocks import KEYS, BlockConfig, Choosers, query_blocks, select_blocks, select_blocks_triton
from .select.contest import CONTEST, Contestants, compete_kinds_into, saved_together
from .select.halving import RULE, Decider, get_rule
from .select.schedule import check_budget
from .select.thinning import Part, describe_launches, thin_into, thin_parts_into, zeros_for, zeros_for_parts

_Tensors = tuple[torch.Tensor, ...]
EVERYTHING = Rows(everything=True)


def _rows(name: str, value: Any) -> Any:
    """Rows of every KV head or query head, or one for all, or a mapping of module paths to these."""
    if isinstance(value, Mapping):
        for path in value:
            if not isinstance(path, str):
                raise TypeError(f"{name}: {path!r}: must be a module path, such as 'model.layers.0.self_attn'")
        return {path: _of_site(f"{name}[{path!r}]", x) for path, x in value.items()}
    return _of_site(name, value)


def _of_site(name: str, value: Any) -> tuple[Rows, ...]:
    with about(name):
        rows = (value,) if isinstance(value, Rows) else rows_of_heads(value)
    if not rows:
        raise ValueError(f"{name}=(): must have an entry for every KV head or query head, or one for all")
    for i, x in enumerate(rows):
        if x.selected and (x.thinned or x.protected):
            raise ValueError(
                f"{name}[{i}]: {x}; selected rows take sinks and recent ones beside them only: a row that is also "
                "thinned or protected would count twice"
            )
        if x.thinned == 1:
            raise ValueError(f"{name}[{i}]: thinned=1; must be 0, or a power of two from 2 on")
    return rows


def _last(name: str, value: Any) -> int:
    if not 0 <= number(name, value, int) <= MOST_LAST:
        raise ValueError(f"{name}={value!r}: must be 0 to {MOST_LAST} queries")
    return int(value)


MOST_LAST = 256
LAST = Kind(f"0 to {MOST_LAST}", "int", _last)


@dataclass(frozen=True)
class PerHead(Options):
    """Which rows every head sees."""

    rows: Any = option(
        (Rows(32, 256, 512, 256),), "the rows of every KV head of a site, or of every query head, or of all of them; a "
        "site that a mapping does not name stays exact", schema="int[] rows", pack=lambda rows: {},
        kind=Kind("`Rows`, a list of one per KV head or query head, or a mapping of module paths to these", "", _rows),
    )  # fmt: skip
    halving: str = option("balanced", "name of a registered halving rule, for thinned rows", RULE, shared="halving")
    inflation: int | None = option(
        None, "M of the paper, for thinned rows; None is h - 2 for 2**h of them", WHOLE,
        pack=lambda M: {"inflation": -1 if M is None else M}, shared="inflation",
    )  # fmt: skip
    flatten: float = option(
        0.0, "factor of the exponent in the kernel of the halving rule; 0 is the rule's own", NUMBER
    )
    block: int = option(128, "queries that see the same rows of the past", BLOCK)
    last: int = option(
        0, "queries at the end of a call that see all tokens, whatever the rows, such as a question behind a long text",
        LAST, schema="int last=0",
    )  # fmt: skip

    def check(self) -> None:
        for rows in self.rows.values() if isinstance(self.rows, Mapping) else [self.rows]:
            for x in rows:
                self.config(x)

    @classmethod
    def by_layer(cls, given: Mapping[str, Any]) -> bool:
        return isinstance(given.get("rows"), Mapping)

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {path: f"['rows'][{path!r}]" for path in given["rows"]} if cls.by_layer(given) else {}

    @classmethod
    def at_module(cls, given: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        if not cls.by_layer(given):
            return given
        return {**given, "rows": {own: rows for own, rows in given["rows"].items() if own == path}}

    @classmethod
    def of_rows(cls, rows: Sequence[Rows]) -> dict[str, Any]:
        return {"rows": [x.to_data() for x in rows]}

    def data(self) -> dict[str, Any]:
        if isinstance(self.rows, Mapping):
            return {**super().data(), "rows": {path: self.of_rows(own)["rows"] for path, own in self.rows.items()}}
        return {**super().data(), **self.of_rows(self.rows)}

    def at(self, site: Site) -> tuple[Rows, ...]:
        """The rows of every KV head or query head of a site, or one for all; none where a mapping does not name it."""
        found: tuple[Rows, ...] = site.entry(self.rows, ()) if isinstance(self.rows, Mapping) else self.rows
        return found

    def config(self, rows: Rows) -> Express | BlockConfig | None:
        """What computes these rows; None is exact attention. Raises ``ValueError`` for an ``inflation`` that does not
        fit."""
        return _config(rows, self.halving, self.inflation, self.flatten, self.block)

    def config_at(self, rows: Rows, Lk: int) -> Express | BlockConfig | None:
        """The same for ``Lk`` tokens, which have no more blocks than these to select."""
        config, most = self.config(rows), -(-Lk // KEYS)
        return replace(config, blocks=most) if isinstance(config, BlockConfig) and config.blocks > most else config


@functools.lru_cache(maxsize=1024)
def _config(
    rows: Rows, halving: str, inflation: int | None, flatten: float, block: int
) -> Express | BlockConfig | None:
    if rows.everything:
        return None
    if rows.selected:
        return BlockConfig(rows.selected, rows.sinks, rows.recent, block=block)
    if not rows.thinned:
        return Unthinned(2, rows.sinks, rows.recent, rows.protected, block=block)
    if inflation is not None:
        check_budget(rows.thinned, inflation)
    return Express(rows.thinned, rows.sinks, rows.recent, rows.protected, halving, inflation, flatten, block)


def exact_up_to(rows: Rows) -> float:
    """Sequences of at most this many tokens get exact attention in such a head."""
    if rows.everything:
        return math.inf
    return rows.sinks + rows.recent + rows.protected + 4 * rows.thinned + KEYS * rows.selected


# ---------------------------------------------------------------------------------------------------------------
# Selected rows, as segments that are read through an index


@functools.lru_cache(maxsize=64)
def blocks_table(config: BlockConfig, Lq: int, Lk: int) -> tuple[SegmentTable, np.ndarray]:
    """Sinks, tail and chosen blocks of keys. The rows of all choices lie side by side, those of the first block of
    queries first: int64 ``[A, 3]`` has the block of queries, the place among its choices and the key in it."""
    layout = query_blocks(config, Lq, Lk)
    count = np.minimum(layout.candidates, config.blocks)
    chosen = np.arange(config.blocks) < count[:, None]
    rows = np.stack([x.flatten() for x in np.indices((*chosen.shape, KEYS))], 1)[np.repeat(chosen.flatten(), KEYS)]
    first = KEYS * (count.cumsum() - count)
    zero = np.zeros_like(count)
    sinks = np.stack([zero + TOKENS, zero, np.where(count, config.sinks, 0)], -1)
    blocks = np.stack([zero + COMPACTED, first, KEYS * count], -1)
    segments = np.stack([sinks, blocks], 1)
    segments[segments[:, :, 2] == 0] = 0
    weights = np.zeros((len(count), 2))
    return SegmentTable(config.block, layout.q_offset, segments, weights, layout.tail, layout.shift), rows


@functools.lru_cache(maxsize=64)
def _rows_on(config: BlockConfig, Lq: int, Lk: int, device: torch.device) -> torch.Tensor:
    return constant(blocks_table(config, Lq, Lk)[1].T.copy(), device)


def chosen_rows(call: Call, config: BlockConfig, chosen: torch.Tensor) -> torch.Tensor:
    """The token of every row of :func:`blocks_table` for what ``select_blocks`` gives: int32 ``[B, H_kv, A]``."""
    block, place, key = _rows_on(config, call.Lq, call.Lk, call.key.device)
    return (config.sinks + KEYS * chosen[:, :, block, place] + key).to(torch.int32)


def _selected(call: Call, config: BlockConfig, chosen: torch.Tensor) -> tuple[Sources, torch.Tensor, SegmentTable]:
    index = chosen_rows(call, config, chosen)
    tokens = Sources.tokens(call.key, call.value)
    return tokens._replace(index=index), index, blocks_table(config, call.Lq, call.Lk)[0]


# ---------------------------------------------------------------------------------------------------------------
# All heads of a layer: those with equal rows together


@dataclass(frozen=True)
class Group:
    """KV heads of which query heads see the same rows, as many of each: ``queries``, by KV head. None: all of them."""

    rows: Rows
    heads: tuple[int, ...] | None
    queries: tuple[int, ...] | None = None

    def on(self, device: torch.device) -> torch.Tensor | None:
        return None if self.heads is None else _constant(self.heads, device)

    def take(self, x: torch.Tensor, H_kv: int) -> torch.Tensor:
        """The KV heads of the group of ``x`` ``[B, H, ..]``, each with all its query heads."""
        return of_heads(x, H_kv, self.on(x.device))

    def take_queries(self, x: torch.Tensor) -> torch.Tensor:
        """The query heads of the group of ``x`` ``[B, H, ..]``."""
        return x if self.queries is None else x.index_select(1, _constant(self.queries, x.device))

    def of(self, call: Call) -> Call:
        """The call of these heads alone."""
        key, value = (self.take(x, x.shape[1]) for x in (call.key, call.value))
        return replace(call, query=self.take_queries(call.query), key=key, value=value)


@functools.lru_cache(maxsize=1024)
def _constant(numbers: tuple[int, ...], device: torch.device, dtype: type[np.integer] = np.int32) -> torch.Tensor:
    return constant(np.array(numbers, dtype), device)


@functools.lru_cache(maxsize=1024)
def groups(rows: tuple[Rows, ...], H_kv: int, H: int | None = None) -> tuple[Group, ...]:
    """The groups of ``H`` query heads, ``H_kv`` unless given, in the order of their first ones. Raises ``ValueError``
    unless ``rows`` has one entry, or one for every KV head, or one for every query head."""
    H = H_kv if H is None else H
    if len(rows) not in (1, H_kv, H):
        raise ValueError(f"rows lists {len(rows)} heads, the call has {_either(H_kv, H)}")
    members: dict[Rows, list[int]] = {}
    for query in range(H):
        members.setdefault(rows[query * len(rows) // H], []).append(query)
    if len(members) == 1:
        return (Group(rows[0], None),)
    return tuple(Group(x, *own) for x, queries in members.items() for own in _alike(queries, H // H_kv))


def _either(H_kv: Any, H: Any) -> str:
    return f"{H_kv} KV heads" + ("" if H == H_kv else f" and {H} query heads")


def _alike(queries: Iterable[int], G: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """KV heads, of ``G`` query heads each, that have as many of ``queries``, and which these are."""
    of_head: dict[int, list[int]] = {}
    for query in queries:
        of_head.setdefault(query // G, []).append(query)
    counts = dict.fromkeys(map(len, of_head.values()))
    found = ({head: own for head, own in of_head.items() if len(own) == count} for count in counts)
    return [(tuple(x), tuple(itertools.chain(*x.values()))) for x in found]


def _joined(parts: Sequence[tuple[Group, torch.Tensor]]) -> torch.Tensor:
    """What the groups gave, ``[B, query heads of the group, ..]`` each, as the heads of the layer lie."""
    (group, first), *_ = parts
    if group.queries is None:
        return first
    back = _places(tuple(group.queries or () for group, _ in parts), first.device)
    return torch.cat([x for _, x in parts], 1).index_select(1, back)


def _summed(parts: Sequence[tuple[Group, torch.Tensor]], H_kv: int) -> torch.Tensor:
    """What the groups gave, ``[B, KV heads of the group, ..]`` each, for every KV head of the layer."""
    (group, first), *_ = parts
    if group.heads is None:
        return first
    whole = first.new_zeros(len(first), H_kv, *first.shape[2:])
    for group, x in parts:
        whole.index_add_(1, _constant(group.heads or (), x.device), x)
    return whole


@functools.lru_cache(maxsize=1024)
def _places(heads: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Where each head of a layer lies among the heads of its groups, one group behind the other."""
    order = [head for of_group in heads for head in of_group]
    return _constant(tuple(sorted(range(len(order)), key=order.__getitem__)), device)


def _forward_group(call: Call, own: PerHead, group: Group, choices: Choices) -> _Tensors:
    config = own.config_at(group.rows, call.Lk)
    if isinstance(config, Express):
        return attend(replace(call, query=group.take_queries(call.query)), config, group.on(call.key.device))
    call = group.of(call)
    if config is None:
        return exact_attention(call.query, call.key, call.value, call.scale)
    sources, _, table = _selected(call, config, choices[group])
    return segment_attention(call.query, sources, table, call.scale)


def _backward_group(call: Call, own: PerHead, group: Group, results: _Tensors, choices: Choices) -> _Tensors:
    config = own.config_at(group.rows, call.Lk)
    if isinstance(config, Express):
        call = replace(call, query=group.take_queries(call.query))
        return backward(call, config, results, group.on(call.key.device))
    call = group.of(call)
    sources, table = Sources.tokens(call.key, call.value), causal_table(call.Lq, call.Lk)
    index = torch.empty(*call.key.shape[:2], 0, dtype=torch.int32, device=call.key.device)
    if config is not None:
        sources, index, table = _selected(call, config, choices[group])
    return gradients(call.query, sources, index, table, call.scale, results)


def _forward(call: Call, own: PerHead, start: torch.Tensor | None, last: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``last``: queries at the end that see everything, on CUDA only."""
    of_layer = groups(own.rows, call.key.shape[1], call.query.shape[1])
    if call.key.is_cuda and (len(of_layer) > 1 or of_layer[0].rows.selected or last):
        return together(call, own, start, last)
    choices = _choices(call, own, start)
    parts = [(group, _forward_group(call, own, group, choices)) for group in of_layer]
    out, lse = (_joined([(group, x[i]) for group, x in parts]) for i in range(2))
    return out, lse


def _backward(call: Call, own: PerHead, results: _Tensors, start: torch.Tensor | None) -> _Tensors:
    H_kv, parts = call.key.shape[1], []
    choices = _choices(call, own, start)
    for group in groups(own.rows, H_kv, call.query.shape[1]):
        of_group = tuple(group.take_queries(x) for x in results)
        parts.append((group, _backward_group(call, own, group, of_group, choices)))
    d_query, d_key, d_value = ([(group, x[i]) for group, x in parts] for i in range(3))
    return _joined(d_query), _summed(d_key, H_kv), _summed(d_value, H_kv)


# ---------------------------------------------------------------------------------------------------------------
# On CUDA: one launch for all heads, on Hopper exact ones among them, which reads and writes where the heads lie

Choices: TypeAlias = Mapping[Group, torch.Tensor]
"""What the KV heads of a group chose: int32 ``[B, heads, blocks of queries, blocks]``."""


@dataclass(frozen=True, eq=False)
class Family:
    """KV heads that choose from the same blocks of keys, in one pass: those of some groups one behind the other, one
    that is of several as often, and ``config`` with the most blocks and recent tokens of any."""

    groups: tuple[Group, ...]
    config: BlockConfig
    heads: tuple[int, ...]
    rows: tuple[Rows, ...]

    def at(self, group: Group) -> slice:
        """Where the heads of ``group`` are among all."""
        first = sum(len(x.heads or ()) for x in self.groups[: self.groups.index(group)])
        return slice(first, first + len(group.heads or self.heads))


@functools.lru_cache(maxsize=1024)
def _families(own: PerHead, H_kv: int, H: int, Lk: int) -> tuple[Family, ...]:
    """Of the heads with selected rows that are not exact for ``Lk`` tokens."""
    members: dict[BlockConfig, list[Group]] = {}
    for group in groups(own.rows, H_kv, H):
        config = own.config(group.rows)
        if isinstance(config, BlockConfig) and Lk > exact_up_to(group.rows):
            alike = replace(config, blocks=1, recent=config.recent % config.block)  # whose blocks begin together
            members.setdefault(alike, []).append(group)
    found = []
    for config, of_config in members.items():
        heads, rows = zip(*((head, x.rows) for x in of_config for head in x.heads or range(H_kv)), strict=True)
        most = replace(config, blocks=max(x.selected for x in rows), recent=max(x.recent for x in rows))
        found.append(Family(tuple(of_config), most, heads, rows))
    return tuple(found)


def _choose(call: Call, family: Family, start: torch.Tensor | None) -> torch.Tensor:
    """int32 ``[B, heads of the family, blocks of queries, most blocks]``, by kernels."""
    choosers = of = None
    if len(family.groups) > 1 or family.groups[0].heads is not None:
        heads = tuple(dict.fromkeys(family.heads))
        blocks, held = (x.selected for x in family.rows), (x.sinks + x.recent for x in family.rows)
        choosers = Choosers(*(_constant(tuple(x), call.key.device) for x in (heads, blocks, held)))
        if len(heads) < len(family.heads):
            of = _constant(tuple(map(heads.index, family.heads)), call.key.device)
    return select_blocks_triton(call.query, call.key, family.config, call.scale, start, choosers, of)


def _choices(call: Call, own: PerHead, start: torch.Tensor | None) -> Choices:
    """Of all groups with selected rows, what :func:`_forward` attends to. All query heads of a KV head have their say
    in the order of its blocks; a group takes as many of the first as its rows say."""
    H, H_kv = call.query.shape[1], call.key.shape[1]
    found: dict[Group, torch.Tensor] = {}
    if call.key.is_cuda:
        for family in _families(own, H_kv, H, call.Lk):
            chosen = _choose(call, family, start)
            found |= {x: chosen[:, family.at(x), :, : x.rows.selected] for x in family.groups}
    for group in groups(own.rows, H_kv, H):
        config = own.config_at(group.rows, call.Lk)
        if isinstance(config, BlockConfig) and group not in found:
            query, key = (group.take(x, H_kv) for x in (call.query, call.key))
            found[group] = select_blocks(query, key, config, call.scale, start)
    return found


@dataclass(frozen=True, eq=False)
class Thinned:
    """KV heads with a coreset or protected rows, and where in flat buffers their rows and their index begin."""

    heads: tuple[int, ...]
    layout: Layout
    copies: int
    index: int

    @property
    def halves(self) -> bool:
        """Whether there is a coreset, not protected rows alone."""
        return bool(self.layout.schedule.launches or self.layout.schedule.subsamples)

    @functools.cached_property
    def part(self) -> Part:
        """What is thinned beside others."""
        layout = self.layout
        return Part(self.heads, layout.schedule, layout.config.sinks, layout.size, (self.index, self.copies))

    @functools.cached_property
    def kind(self) -> Contestants:
        """What competes beside others; without protected rows there is no contest."""
        layout = self.layout
        sinks, protected = layout.config.sinks, layout.config.protected
        return Contestants(self.heads, sinks, layout.contests, protected, layout.size, self.index)


@dataclass(frozen=True, eq=False)
class Together:
    """What a call with such sizes does: which heads are exact, which ones thin and choose, what the others see, and the
    lengths of the buffers for compacted rows and their index."""

    exact: tuple[Group, ...]
    thinned: tuple[Thinned, ...]
    families: tuple[Family, ...]
    mixture: Mixture | None
    copied: int
    indexed: int


def _beside_chosen(config: BlockConfig, Lq: int, Lk: int) -> tuple[SegmentTable, np.ndarray]:
    """What a head sees beside the blocks that it chooses, and how many these are for every block of queries."""
    blocks = query_blocks(config, Lq, Lk)
    sinks = np.where(blocks.candidates > 0, config.sinks, 0)
    segments = np.stack([np.zeros_like(sinks), np.zeros_like(sinks), sinks], -1)[:, None]
    weights = np.zeros((len(sinks), 1))
    table = SegmentTable(config.block, blocks.q_offset, segments, weights, blocks.tail, blocks.shift)
    return table, np.minimum(blocks.candidates, config.blocks)


@functools.lru_cache(maxsize=256)
def _together(own: PerHead, B: int, G: int, H_kv: int, Lq: int, Lk: int, mixed: bool, last: int = 0) -> Together:
    """``mixed``: exact heads are beside the others, if there are others. ``last``: of these so many queries at the end
    see everything."""
    exact: list[int] = []
    thinned, families, shares = [], [], []
    copied = indexed = chosen = 0
    every, every_query = tuple(range(H_kv)), tuple(range(G * H_kv))
    for rows, alike in itertools.groupby(groups(own.rows, H_kv, G * H_kv), key=lambda group: group.rows):
        parts = [(group.heads or every, group.queries or every_query) for group in alike]
        heads, queries = (tuple(itertools.chain(*x)) for x in zip(*parts, strict=True))
        config = own.config(rows)
        if Lk <= exact_up_to(rows):
            exact += queries
        elif isinstance(config, Express):  # thinned together, however many query heads of each there are
            layout, first = make_layout(config, Lq, Lk), 0
            A, I = layout.copied, layout.size - layout.copied  # noqa: E741
            if layout.size:
                thinned.append(Thinned(heads, layout, copied, indexed))
            for few, its in parts:
                begin = (copied, A), (indexed, layout.size)
                copies, listed = (Place(x + first * each, each, each * len(heads)) for x, each in begin)
                shares.append(HeadRows(len(few), its, layout.table, A, I, copies, listed, left=last))
                first += len(few)
            copied += B * len(heads) * A  # no gaps: what lies in them would be read
            # multiples of 16 bytes: kernels are compiled once more for memory that begins elsewhere
            indexed += -(-B * len(heads) * layout.size // 4) * 4
    for family in _families(own, H_kv, G * H_kv, Lk):
        each = len(query_blocks(family.config, Lq, Lk).begin) * family.config.blocks
        for group in family.groups:
            config = own.config(group.rows)
            assert isinstance(config, BlockConfig)
            table, count = _beside_chosen(config, Lq, Lk)
            place = Place(chosen + family.at(group).start * each, each, each * len(family.heads))
            beside = Chosen(group.rows.sinks, count, place, family.config.blocks)
            queries = group.queries or every_query
            shares.append(HeadRows(len(group.heads or every), queries, table, chosen=beside, left=last))
        families.append(family)
        chosen += B * len(family.heads) * each
    if last and shares:
        late = causal_table(last, Lk, own.block)
        others = _alike(sorted(itertools.chain(*(share.queries for share in shares))), G)
        shares += [HeadRows(len(heads), queries, late, first=Lq - last) for heads, queries in others]
    apart = _alike(sorted(exact), G)
    if mixed and shares:
        shares += [HeadRows(len(heads), queries, causal_table(Lq, Lk, own.block)) for heads, queries in apart]
        apart = []
    mixture = Mixture(tuple(shares), Lq, Lk) if shares else None
    return Together(
        tuple(Group(EVERYTHING, *x) for x in apart), tuple(thinned), tuple(families), mixture, copied, indexed
    )


def _mixes_exact(call: Call, own: PerHead) -> bool:
    """Whether exact heads are beside the others: the kernel for Hopper is as fast as cuDNN's, for which heads that are
    no neighbours are copied."""
    return hopper.takes(call.query, call.key, call.value, own.block)


def _last_beside(call: Call, own: PerHead, last: int) -> bool:
    """Whether the ``last`` queries are jobs of the launch for all others. Each reads all tokens one after the other, so
    that the others have to take half as long at least; else steps of decoding are faster, of which many programs share
    one."""
    if not call.key.is_cuda or call.padding is not None or last >= call.Lq:
        return False
    rows = sum(min(exact_up_to(x), call.Lk) for x in own.rows) / len(own.rows)
    scores = call.query.shape[0] * call.query.shape[1] * (call.Lq - last) * rows
    return 2 * scores >= processors(call.key.device) * hopper.QUERIES * call.Lk


def together(call: Call, own: PerHead, start: torch.Tensor | None, last: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`heads_reference` with the kernels, all heads of the layer in one launch, but for exact ones where another
    kernel is the faster one for them: same results up to rounding. ``last``: queries at the end that see everything,
    fewer than there are."""
    query, key, value, H_kv = call.query, call.key, call.value, call.key.shape[1]
    B, G, device = len(key), query.shape[1] // H_kv, key.device
    what = _together(own, B, G, H_kv, call.Lq, call.Lk, _mixes_exact(call, own), last)
    if what.mixture is None:
        return exact_attention(query, key, value, call.scale)
    outputs = Outputs.of(query, value.shape[3])
    index = copies = None
    if what.indexed:
        index = torch.empty(what.indexed, dtype=torch.int32, device=device)
    if what.copied:
        copies = tuple(x.new_empty(what.copied, x.shape[3]) for x in (key, value))
    for group in what.exact:  # the longest ones
        _exact_heads(call, group, outputs)
    if what.thinned:
        _thin(call, what.thinned, index, copies)
    found = [_choose(call, family, start).flatten() for family in what.families]
    chosen = None if not found else found[0] if len(found) == 1 else torch.cat(found)
    read = index if any(x.layout.config.protected for x in what.thinned) else None
    mixed_attention_triton(query, key, value, Buffers(copies, read, chosen), what.mixture, call.scale, outputs)
    return outputs


def _thin(call: Call, all_of_them: tuple[Thinned, ...], index: torch.Tensor | None, copies: _Tensors | None) -> None:
    """What these heads keep, into their parts of the buffers: their rows compete, and those with a coreset are thinned,
    side by side."""
    assert index is not None
    key, value, random = call.key, call.value, Random(call.seed, call.layer)
    copies = tuple(x.new_empty(0, x.shape[3]) for x in (key, value)) if copies is None else copies
    halved, kinds = [x for x in all_of_them if x.halves], tuple(x.kind for x in all_of_them)
    if not halved:
        compete_kinds_into(index, key, kinds)
        return
    own, rule = halved[0], halved[0].layout.config.rule
    if len(halved) > 1:
        parts = tuple(x.part for x in halved)
        zeros = compete_kinds_into(index, key, kinds, zeros_for_parts(parts, rule, key, value))
        thin_parts_into((index, *copies), key, value, parts, Decider(rule, call.scale, random), zeros)
        return
    B, H, layout = len(key), len(own.heads), own.layout
    zeros = compete_kinds_into(index, key, kinds, zeros_for(layout.schedule, rule, key, value, B * H))
    kept = tuple(
        x[own.copies : own.copies + B * H * layout.copied].view(B, H, layout.copied, x.shape[1]) for x in copies
    )
    listed = index[own.index : own.index + B * H * layout.size].view(B, H, layout.size)
    heads = None if own.heads == tuple(range(key.shape[1])) else _constant(own.heads, key.device)
    decider = Decider(rule, call.scale, random._replace(heads=heads))
    thin_into((listed, *kept), key, value, layout.schedule, layout.config.sinks, decider, zeros=zeros)


def _exact_heads(call: Call, group: Group, outputs: Outputs) -> None:
    """Exact attention of these heads into ``outputs``; of neighbours without copies of what they read."""
    qkv, heads, queries = (call.query, call.key, call.value), group.heads or (), group.queries or ()
    lists = queries, heads, heads
    read = [x[:, own[0] : own[-1] + 1] for x, own in zip(qkv, lists, strict=True)]
    if apart := [i for i, own in enumerate(lists) if read[i].shape[1] > len(own)]:
        for i in apart:
            read[i] = read[i].new_empty(len(read[i]), len(lists[i]), *read[i].shape[2:])
        _copy_heads(tuple(qkv[i] for i in apart), [read[i] for i in apart], [lists[i] for i in apart], into=False)
    query, key, value = read
    _copy_heads(exact_attention(query, key, value, call.scale), outputs, (queries, queries), into=True)


def _copy_heads(
    sources: _Tensors, targets: Sequence[torch.Tensor], heads: Sequence[tuple[int, ...]], into: bool
) -> None:
    """Copies of each source ``[B, H, L, ..]`` its ``heads`` to its target, which has these alone. ``into``: to these
    heads of the target, from a source that has them alone."""
    few = sources if into else targets
    sizes, widths = tuple(tuple(x.shape[:3]) for x in few), tuple(math.prod(x.shape[3:]) for x in few)
    programs = max(x.shape[0] * x.shape[1] for x in few), -(-max(x.shape[2] for x in few) // COPIED), len(few)
    numbers = tuple(_constant(own, x.device) for own, x in zip(heads, few, strict=True))
    launch(_copy_heads_kernel, programs, tuple(map(strided, sources)), tuple(map(strided, targets)), numbers, sizes,
        WIDTHS=widths, TILES=tuple(map(next_power_of_two, widths)), INTO=into, BM=COPIED, num_warps=4,
    )  # fmt: skip


COPIED = 128  # rows that a program copies


@jit(general="sizes")
def _copy_heads_kernel(
    sources, targets, p_heads, sizes,
    WIDTHS: tl.constexpr, TILES: tl.constexpr, INTO: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(WIDTHS)):
        if tl.program_id(2) == i:
            _copy_head(sources[i], targets[i], p_heads[i], sizes[i], WIDTHS[i], TILES[i], INTO, BM)


@jit
def _copy_head(x, y, p_heads, size, D: tl.constexpr, BD: tl.constexpr, INTO: tl.constexpr, BM: tl.constexpr):
    B, n, L = size
    i_seq = tl.program_id(0)
    if i_seq < B * n:
        i_b, i_few = i_seq // n, i_seq % n
        i_h = tl.load(p_heads + i_few)
        o_row, o_d = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BD)
        p_x, stride_x = sequence(x, i_b, i_few if INTO else i_h)
        p_y, stride_y = sequence(y, i_b, i_h if INTO else i_few)
        b_x = load_rows(p_x, stride_x, o_row, o_row < L, D, BD)
        p_y += o_row.to(tl.int64)[:, None] * stride_y + o_d[None, :]
        tl.store(p_y, b_x, mask=(o_row < L)[:, None] & (o_d < D)[None, :])


def heads_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Sequence[Rows] | PerHead,
    scale: float,
    seed: torch.Tensor,
    layer: int = 0,
    block: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every head to its own ``rows``, one entry for each KV head, for each query head or for all (or all
    options, with a ``block`` of their own).

    ``query`` ``[B, H, Lq, D]``, ``key`` ``[B, H_kv, Lk, D]``, ``value`` ``[B, H_kv, Lk, Dv]``; query i is token
    ``Lk - Lq + i``. ``seed`` is a 0-dim int64 tensor. Returns ``out`` ``[B, H, Lq, Dv]`` and the log-sum-exp
    ``[B, H, Lq]`` in float32 (float64 for float64 inputs). In plain PyTorch on a CPU, where it is the definition of
    correct; with the kernels on CUDA. No gradient: that is of the op ``express_compile::heads``. Raises ``ValueError``
    or ``TypeError`` for rows that do not fit.
    """
    own = rows if isinstance(rows, PerHead) else PerHead(rows, block=block)
    with torch.no_grad():
        return _attended(Call(query, key, value, None, seed, scale, layer), own)


# ---------------------------------------------------------------------------------------------------------------
# Op


@functools.lru_cache(maxsize=1024)
def _options(rows: tuple[int, ...], inflation: int, **same: Any) -> PerHead:
    return PerHead(from_numbers(rows), inflation=None if inflation < 0 else inflation, **same)


def options_at(Lk: int, min_length: int, rows: Sequence[int], **others: Any) -> PerHead:
    """The options that those of the op mean for ``Lk`` keys; exact for fewer than ``min_length``."""
    return _options(tuple(to_numbers([EVERYTHING]) if Lk < min_length else rows), **others)


def _exact_up_to(own: PerHead) -> int:
    least = min(map(exact_up_to, own.rows))
    return 1 << 62 if math.isinf(least) else int(least)


def _last_of(own: PerHead, Lk: int) -> int:
    """How many queries at the end see more than the others; none where all heads are exact."""
    return own.last if Lk > _exact_up_to(own) else 0


def _attended(call: Call, own: PerHead) -> tuple[torch.Tensor, torch.Tensor]:
    """What all queries give, the last ones among the others or after them."""
    last = _last_of(own, call.Lk)
    beside = last if last and _last_beside(call, own, last) else 0
    if last >= call.Lq:
        outputs: tuple[torch.Tensor, torch.Tensor] = spanned_outputs(call.query, call.value)
    else:
        outputs = packed(call, _exact_up_to(own), lambda real, start: _forward(real, own, start, beside))
    if last > beside:
        attend_last(call, last, outputs)
    return outputs


def _body(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return _attended(call, options_at(call.Lk, **call.options))


def _backward_body(call: Call, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> _Tensors:
    own, added = options_at(call.Lk, **call.options), None
    if _last_of(own, call.Lk):
        grad, added = last_gradients(call, own.last, grad, out, lse)
    grads = packed_backward(
        call, (grad, out, lse), _exact_up_to(own), lambda real, results, start: _backward(real, own, results, start)
    )
    return grads if added is None else tuple((x + y).to(x.dtype) for x, y in zip(grads, added, strict=True))


OP, BACKWARD = define_attention("heads", PerHead, _body, _backward_body)


# ---------------------------------------------------------------------------------------------------------------
# Method


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    own: PerHead = policy.of("heads")  # a bad value is reported whatever is refused
    listed = [len(x) for x in own.rows.values()] if isinstance(own.rows, Mapping) else [len(own.rows)]
    reason = prefill_only(spec, "heads")
    if reason is None and not listed:
        reason = "its rows have no entry for this module"
    if reason is None and (other := [n for n in listed if n not in (1, spec.H_kv, spec.H)]):
        reason = f"rows lists {other[0]} heads, the site has {_either(spec.H_kv, spec.H)}"
    return None if reason is None else Refusal("heads", reason)


def _params(site: Site, policy: Policy) -> dict[str, Any]:
    own: PerHead = policy.of("heads")
    return {"rows": to_numbers(own.at(site)), **own.pack(), "min_length": policy.min_length or 0}


def rows_seen(own: PerHead, n: int) -> np.ndarray:
    """Rows that each query of a prefill of ``n`` tokens attends to, itself included, for every entry of ``own.rows``:
    int64 ``[entries, n]``."""

    def of(rows: Rows) -> np.ndarray:
        config = own.config(rows)
        if config is None:
            return every
        if isinstance(config, Express):
            return make_layout(config, n, n).table.rows_seen(n)
        return query_blocks(config, n, n).rows_seen(n)

    every = np.arange(1, n + 1)
    seen = np.stack([of(rows) for rows in own.rows])
    return np.where(every > n - own.last, every, seen)


@functools.lru_cache(maxsize=1024)
def _few_cost(rows: Rows, block: int) -> c.Cost:
    """Selected rows, or sinks, recent and protected ones alone: what a query sees once there is more, on average over
    its block; and the contests, which read every key twice."""
    every = KEYS if rows.selected else CONTEST if rows.protected else 1  # tokens that leave the tail at a time
    late = max(0, every - block) + block + 1
    held = rows.sinks + rows.recent + rows.protected + KEYS * rows.selected + late / sympy.Integer(2)

    def seen(queries: sympy.Expr) -> sympy.Expr:
        first = sympy.Min(queries, held)
        return first * (first + 1) / 2 + held * (queries - first)

    attention = c.dense_cost(seen(c.Lk) - seen(c.Lk - c.Lq))
    if not rows.protected:
        return attention
    keys = 2 * c.B * c.H_kv * c.D * (c.Lk - rows.sinks - rows.recent)
    return attention + c.Cost(sympy.Integer(0), c.itemsize * keys, launches=sympy.Integer(3))


def _choice_cost(spec: AttentionSpec, block: int) -> c.Cost:
    """The choice of blocks: one query of ``block`` of every head against all keys before it."""
    pairs = spec.B * spec.H * spec.Lq / block * (spec.Lk - spec.Lq / 2)
    return c.Cost(2 * pairs * spec.D, 0, 0, 2, pairs, 0)


def _last_cost(spec: AttentionSpec, last: int, H: int) -> c.Cost:
    """Of ``H`` heads that are not exact, beside the queries before them, or of all heads in launches of their own."""
    apart = spec.mask.padding or last >= spec.Lq
    pairs, width = spec.B * (spec.H if apart else H) * min(last, spec.Lq) * spec.Lk, spec.D + spec.Dv
    read = spec.dtype.itemsize * spec.B * spec.H_kv * spec.Lk * width
    return c.Cost(2 * pairs * width, read * apart, 0, 2 * apart, pairs, 0)


def _costs(spec: AttentionSpec, params: Mapping[str, Any]) -> dict[str, c.Cost]:
    """What the heads cost that are exact, and what the others do, with padding that they are packed.

    What is done for a KV head counts once, however many of its query heads have such rows: to read its keys and values,
    to thin and to let rows compete. All its query heads score its blocks, once for all rows whose choices go together.
    """

    def priced(method: str, at: AttentionSpec, options: Mapping[str, Any]) -> c.Cost:
        cost = cost_at(method, at, options)
        assert cost is not None, "methods whose kernels these are say what they cost"
        return cost

    priced("exact", spec, {})  # raises for sizes that are no numbers
    own, n = options_at(spec.Lk, **params), spec.Lk
    each = len(own.rows) // spec.H_kv if len(own.rows) == spec.H else 1  # entries of a KV head
    bare = replace(spec, mask=replace(spec.mask, padding=False))

    def part(entries: Sequence[int], all_queries: bool = False) -> AttentionSpec:
        """The KV heads of these entries, and their query heads, or all that the KV heads have."""
        H_kv = spec.H_kv * len({i // each for i in entries}) * each // len(own.rows)
        H = H_kv * spec.H // spec.H_kv if all_queries else spec.H * len(entries) // len(own.rows)
        return replace(bare, H=H, H_kv=H_kv)

    members: dict[Rows, list[int]] = {}
    families: dict[tuple[int, int], list[int]] = {}
    for i, rows in enumerate(own.rows):
        exact = n <= exact_up_to(rows)
        members.setdefault(EVERYTHING if exact else rows, []).append(i)
        if rows.selected and not exact:
            families.setdefault((rows.sinks, rows.recent % own.block), []).append(i)
    exact_heads, found = members.pop(EVERYTHING, []), list[c.Cost]()
    for rows, entries in members.items():
        config = own.config(rows)
        if isinstance(config, Express) and rows.thinned:
            found.append(priced("express", part(entries), {**config.pack(), "min_length": 0}))
        else:
            found.append(_few_cost(rows, own.block).at(part(entries), 1))
    found += [_choice_cost(part(entries, all_queries=True), own.block) for entries in families.values()]
    if own.last and members:
        found.append(_last_cost(spec, own.last, part([*itertools.chain(*members.values())]).H))
    if spec.mask.padding:
        found.append(c.Cost(0, c.itemsize * packing_cost(), launches=0).at(spec, 1))
    costs = {"exact": priced("exact", part(exact_heads), {})} if exact_heads else {}
    if found:
        few = functools.reduce(operator.add, found)
        together = max(0, len(members) - 1) + _thinned_together(own, [rows for rows in members if rows.thinned])
        kinds = [_contestants(own, x, {i // each for i in its}, n) for x, its in members.items() if x.protected]
        competing, contests = saved_together(kinds)
        read = 2 * spec.dtype.itemsize * spec.B * spec.D * CONTEST * contests
        # they attend in one launch
        costs["express"] = replace(few, bytes=few.bytes - read, launches=few.launches - together - competing)
    return costs


def _contestants(own: PerHead, rows: Rows, heads: Iterable[int], n: int) -> Contestants:
    """Heads with protected rows in a prefill of ``n`` tokens."""
    contests = max(0, n - 1 - rows.sinks - rows.recent) // own.block * own.block // CONTEST
    protected = min(rows.protected, n)
    losers = max(0, contests * CONTEST - protected) if rows.thinned else 0
    return Contestants(tuple(heads), rows.sinks, contests, protected, losers + contests * protected, 0)


def _thinned_together(own: PerHead, thinned: Sequence[Rows]) -> int:
    """Launches that rows with coresets do without, as all are thinned in the same ones."""
    coin = math.isinf(get_rule(own.halving, own.flatten).gain(2, 0.5))
    describe = [0 if coin else int(describe_launches(4 * rows.thinned)) for rows in thinned]
    return max(0, len(thinned) - 1) + sum(describe) - max(describe, default=0)


def _approximates(params: Mapping[str, Any], Lk: int) -> bool:
    return Lk > _exact_up_to(options_at(Lk, **params))


METHOD = register(
    Method(
        name="heads",
        summary="causal attention to other rows in every head: a window, a coreset, selected blocks or everything",
        supports="causal self-attention (also continuing a cache), GQA, Dv != D, key padding, any length",
        refuses="non-causal masks, windows, packed sequences, biases, dropout, decoding from a full cache",
        refuse=_refuse,
        options=PerHead,
        params=_params,
        sees=lambda own, site: own.at(site),
        padding_cost=True,
        shares=_costs,
        approximates=_approximates,
        per_head={"rows": len(fields(Rows))},
    )
)
