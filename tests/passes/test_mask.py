"""The mask prover against brute force: what it claims is what the mask is, and what it should know it knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.spec import Mask
from express_compile.passes.mask import Padding
from express_compile.passes.match import find_sites
from express_compile.passes.site import AttentionSite
from express_compile.passes.symbolic import HIDDEN

B, H, D = 2, 2, 4
LOWEST = torch.finfo(torch.float32).min


class Values(torch.fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def padding_of(padding: Padding, values: dict[torch.fx.Node, Any]) -> torch.Tensor:
    """The key padding ``[B, Lk]`` that a recipe stands for."""
    if padding.last_row is not None:
        mask = values[padding.last_row]
        mask = mask[(None,) * (4 - mask.dim())][:, 0, -1]
        return (mask if mask.dtype == torch.bool else mask == 0).expand(B, -1)
    result = torch.tensor(True)
    for term in padding.terms:
        row = getattr(torch, term.relation)(values[term.node][term.index], term.constant)
        result = result & (row if term.has_batch else row[None])
    return result.expand(B, -1)


def dense(
    mask: Mask, padding: torch.Tensor | None, Lq: int, Lk: int, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, Lq, Lk]`` by the definition in ``spec.Mask``, for packed sequences numbered by ``segments`` ``[B, Lk]``."""
    i, j = torch.arange(Lq)[:, None], torch.arange(Lk)
    seen = torch.ones(B, Lq, Lk, dtype=torch.bool)
    if mask.causal:
        seen &= j <= i + int(mask.offset)
    if mask.window is not None:
        back = i + int(mask.offset) - j
        seen &= (back if mask.causal else back.abs()) < mask.window
    if mask.segments:
        seen = seen & (segments[:, :Lq, None] == segments[:, None, :])
    return seen if padding is None else seen & padding[:, None]


def prove(
    make: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    Lq: int = 6,
    Lk: int = 6,
    segments: torch.Tensor | None = None,
) -> Mask:
    """Compile attention with ``make(*inputs)`` as its mask; whatever is proven must equal the mask that arrives."""
    found: list[AttentionSite] = []
    values: dict[torch.fx.Node, Any] = {}

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        found.extend(find_sites(gm))

        def run(*args: Any) -> Any:
            interpreter = Values(gm)
            result = interpreter.run(*args)
            values.update(interpreter.env)
            return result

        return run

    def attend(q: torch.Tensor, k: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = make(*inputs)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask), mask

    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, Lq, D, generator=generator)
    k = torch.randn(B, H, Lk, D, generator=generator)
    _, actual = torch.compile(attend, backend=backend, fullgraph=True)(q, k, *inputs)
    (site,) = found
    mask = site.spec.mask
    if mask.unknown is None:
        assert (site.padding is not None) == mask.padding
        padding = padding_of(site.padding, values) if site.padding is not None else None
        seen = actual if actual.dtype == torch.bool else actual > HIDDEN
        if actual.dtype != torch.bool:  # whatever is added where it shows, a query adds it to all keys
            added = [actual.masked_fill(~seen, fill) for fill in (-math.inf, math.inf)]
            assert torch.equal(added[0].amax(-1)[seen.any(-1)], added[1].amin(-1)[seen.any(-1)])
        seen = seen[(None,) * (4 - seen.dim())].expand(B, H, Lq, Lk)
        claimed = dense(mask, padding, Lq, Lk, segments)
        for h in range(H):
            assert torch.equal(claimed, seen[:, h]), f"claimed {mask}"
    return mask


Q, K = (lambda n: torch.arange(n)[:, None]), (lambda n: torch.arange(n)[None, :])

CAUSAL: dict[str, Callable[[int], torch.Tensor]] = {
    "k <= q": lambda n: K(n) <= Q(n),
    "q >= k": lambda n: torch.ge(Q(n), K(n)),
    "k < q + 1": lambda n: K(n).lt(Q(n) + 1),
    "not k > q": lambda n: ~(K(n) > Q(n)),
    "logical_not": lambda n: torch.logical_not(K(n).gt(other=Q(n))),
    "k - q <= 0": lambda n: K(n) - Q(n) <= 0,
    "-q <= -k": lambda n: -Q(n) <= -K(n),
    "tril": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "torch.tril of ones": lambda n: torch.tril(torch.ones(n, n)) == 1,
    "tril bool cast": lambda n: torch.tril(torch.ones(n, n)).bool(),
    "not triu": lambda n: ~torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1),
    "triu transposed": lambda n: torch.ones(n, n, dtype=torch.bool).triu().mT.transpose(0, 1).transpose(0, 1),
    "permuted": lambda n: (Q(n)[None] <= K(n)[None]).permute(0, 2, 1)[0],
    "full -inf triu": lambda n: torch.full((n, n), float("-inf")).triu(1),
    "full min triu": lambda n: torch.triu(torch.full((n, n), LOWEST), diagonal=1),
    "where": lambda n: torch.where(K(n) <= Q(n), 0.0, LOWEST),
    "where other polarity": lambda n: torch.where(K(n) > Q(n), float("-inf"), 0.0),
    "x.where": lambda n: torch.zeros(n, n).where(K(n) <= Q(n), float("-inf")),
    "masked_fill": lambda n: torch.zeros(n, n).masked_fill(K(n) > Q(n), float("-inf")),
    "masked_fill of cast": lambda n: torch.zeros(n, n).masked_fill((K(n) <= Q(n)).logical_not(), LOWEST),
    "(1 - m) * min": lambda n: (1.0 - (K(n) <= Q(n)).float()) * LOWEST,
    "4-D": lambda n: (K(n) <= Q(n))[None, None].expand(B, 1, n, n),
    "view": lambda n: (K(n) <= Q(n)).view(1, 1, n, n),
    "arange step and start": lambda n: torch.arange(2, 2 * n + 2, 2)[None] <= 2 * torch.arange(1, n + 1)[:, None],
    "new_ones and": lambda n: K(n).new_ones((), dtype=torch.bool) & (K(n) <= Q(n)),
    "bool sum": lambda n: ((K(n) < Q(n)) | (K(n) == Q(n))) & (K(n) <= Q(n)),
    "int32": lambda n: torch.arange(n, dtype=torch.int32)[None] <= torch.arange(n, dtype=torch.int32)[:, None],
    "indexed": lambda n: torch.arange(n)[None].expand(2, n)[:1, K(n)[0]] <= torch.arange(n)[Q(n)],
    "sliced": lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[None, None, :n, :n],
    "sliced later": lambda n: torch.ones(2 * n, 2 * n, dtype=torch.bool).tril()[n:, n:],
}


def steps(n: int) -> torch.Tensor:
    mask = torch.empty(n, n)
    mask.fill_(-math.inf)
    mask.triu_(1)
    return mask


def old_transformers(n: int) -> torch.Tensor:
    mask = torch.full((n, n), LOWEST)
    place = torch.arange(mask.size(-1))
    mask.masked_fill_(place < (place + 1).view(mask.size(-1), 1), 0)
    return mask.to(torch.float32)[None, None].expand(B, 1, n, n)


def assigned(n: int) -> torch.Tensor:
    mask = torch.zeros(n, n)
    mask[K(n) > Q(n)] = -math.inf
    return mask


def read_before(n: int) -> torch.Tensor:
    """What is copied before a write is what it was."""
    mask = torch.ones(n, n)
    mask.tril_()
    kept = mask + 0
    mask[:] = 1.0
    mask *= 0.0
    return kept == 1


def a_term_of_before(n: int) -> torch.Tensor:
    """A sum of what is written later."""
    hidden = torch.full((n, n), -math.inf).triu(1)
    mask = hidden + torch.arange(n).sin()[:, None]
    hidden.zero_()
    return mask


CAUSAL |= {
    "written by steps": steps,
    "a term that is written later": a_term_of_before,
    "written as in old transformers": old_transformers,
    "assigned": assigned,
    "read before it is written": read_before,
    "zeros filled": lambda n: torch.triu(torch.zeros(n, n).fill_(-math.inf), 1),
    "ones less": lambda n: torch.ones(n, n).sub_(torch.ones(n, n).tril()).mul_(-1e9),
    "(1 - tril) * -1e9": lambda n: (1 - torch.ones(n, n).tril()) * -1e9,
    "integers times min": lambda n: (1 - torch.ones(n, n, dtype=torch.long).tril()) * LOWEST,
    "booleans times -1e9": lambda n: ~torch.ones(n, n, dtype=torch.bool).tril() * -1e9,
    "the lowest of bfloat16": lambda n: torch.where(K(n) <= Q(n), 0.0, torch.finfo(torch.bfloat16).min),
    "tril == 0": lambda n: torch.zeros(n, n).masked_fill(torch.ones(n, n).tril() == 0, -math.inf),
    "log": lambda n: torch.ones(n, n).tril().log(),
    "divided": lambda n: (1 - torch.ones(n, n).tril()) / -1e-10,
    "clamped": lambda n: torch.full((n, n), -math.inf).triu(1).clamp(min=LOWEST),
    "the smaller of two": lambda n: torch.minimum(torch.zeros(n, n), torch.where(K(n) > Q(n), LOWEST, 0.0)),
    "the larger of two": lambda n: torch.max(torch.full((n, n), -math.inf).triu(1), torch.tensor(LOWEST)),
    "logical": lambda n: torch.logical_or(K(n) < Q(n), torch.eye(n) == 1).logical_and(K(n) <= Q(n)),
    "merged and parted": lambda n: (K(n) <= Q(n)).expand(B, H, n, n).reshape(B * H, n, n).view(B, H, n, n),
    "flat": lambda n: (K(n) <= Q(n)).reshape(-1).view(n, n),
    "repeated": lambda n: (K(n) <= Q(n))[None].repeat(B * H, 1, 1).unflatten(0, (B, H)),
    "interleaved": lambda n: (K(n) <= Q(n))[None].repeat_interleave(B, 0)[:, None],
    "tiled": lambda n: (K(n) <= Q(n)).tile(B, H, 1, 1),
    "put together": lambda n: torch.cat([K(n)[:, :3] <= Q(n), torch.arange(3, n) <= Q(n)], -1),
    "a first key for all": lambda n: F.pad(torch.ones(n, n - 1).tril(-1), (1, 0), value=1.0) == 1,
    "shown around": lambda n: F.pad(torch.full((n - 1, n - 1), -math.inf).triu(), (1, 0, 0, 1)),
    "eye below": lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1) | torch.eye(n, dtype=torch.bool),
    "eye and tril": lambda n: (torch.eye(n) + torch.ones(n, n).tril(-1)) == 1,
    "its diagonal filled": lambda n: torch.full((n, n), -math.inf).triu().fill_diagonal_(0),
    "diag below": lambda n: torch.ones(n, n).tril(-1).bool().logical_or(torch.diag(torch.ones(n)) > 0),
    "what is shown is lifted": lambda n: torch.where(K(n) <= Q(n), 0.5, LOWEST),
    "what is shown is lifted by query": lambda n: torch.where(K(n) <= Q(n), Q(n) * 0.5, -math.inf),
    "lifted later": lambda n: torch.full((n, n), -math.inf).triu(1) + torch.arange(n).sin()[:, None],
    "taken away later": lambda n: (torch.full((n, n), LOWEST).triu(1)[None] - torch.arange(n).sqrt()[:, None]).clone(),
    "cut out": lambda n: F.pad(torch.arange(2 * n) <= torch.arange(2 * n)[:, None], (-2, 2 - n, -2, 2 - n)),
}
# spellings of a causal mask that are true but beyond the rules: they may be unknown, never wrong
TOO_HARD = {"triu transposed", "put together"}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_spellings(spelling: str) -> None:
    mask = prove(lambda: CAUSAL[spelling](6))
    assert mask == Mask(causal=True) or (spelling in TOO_HARD and mask.unknown is not None), mask


NEAR_MISSES: dict[str, Callable[[int], torch.Tensor]] = {
    "k < q hides the diagonal": lambda n: K(n) < Q(n),
    "one too many": lambda n: K(n) <= Q(n) + 1,
    "from one": lambda n: torch.arange(1, end=n + 1)[None] <= Q(n),
    "flipped": lambda n: K(n) >= Q(n),
    "one element more": lambda n: (K(n) <= Q(n)) | ((K(n) == 5) & (Q(n) == 0)),
    "or a prefix": lambda n: (K(n) <= Q(n)) | (K(n) < 2),
    "xor": lambda n: (K(n) <= Q(n)) ^ (K(n) == 0),
    "every second key": lambda n: (K(n) <= Q(n)) & (K(n) % 2 == 0),
    "2 k <= q": lambda n: 2 * K(n) <= Q(n),
    "queries too": lambda n: (K(n) <= Q(n)) & (Q(n) > 2),
    "a block": lambda n: K(n) // 2 <= Q(n) // 2,
    "a bias": lambda n: torch.where(K(n) < 2, 0.5, torch.where(K(n) <= Q(n), 0.0, LOWEST)),
    "a bias by key": lambda n: torch.where(K(n) <= Q(n), K(n).sin(), -math.inf),
    "lifted later by key": lambda n: torch.full((n, n), -math.inf).triu(1) + torch.arange(n).sin(),
    "lifted beyond all scores": lambda n: torch.where(K(n) <= Q(n), 1e10, -math.inf),
    "some lifted by query": lambda n: torch.where(K(n) < 3, torch.arange(n).sin()[:, None], 0.0),
    "a large number for some queries": lambda n: torch.full((n, n), -math.inf).triu(1) - 1e9 * (Q(n).sin() > 0.5),
    "a logarithm": lambda n: torch.full((n, n), -math.inf).triu(1) + (Q(n).sin() - 0.5).relu().log(),
    "all but itself": lambda n: (1 - torch.eye(n)).bool(),
    "all but itself, filled": lambda n: torch.zeros(n, n).fill_diagonal_(-math.inf),
    "all but itself, minus": lambda n: torch.eye(n) * LOWEST,
    "itself and those before the last": lambda n: torch.eye(n, dtype=torch.bool) | (K(n) < Q(n) - 1),
    "itself or one other": lambda n: torch.eye(n, dtype=torch.bool) | torch.eye(n, dtype=torch.bool).roll(1, 0),
    "a diagonal of values": lambda n: torch.diag(torch.arange(n)) > 1,
    "one key ahead": lambda n: torch.eye(n, n + 1)[:, 1:] == 1,
    "the diagonal taken": lambda n: torch.diag(K(n) <= Q(n)).expand(n, n),
    "only -10000": lambda n: torch.where(K(n) <= Q(n), 0.0, -1e4),
    "alibi": lambda n: torch.where(K(n) <= Q(n), (K(n) - Q(n)).float(), LOWEST),
    "all hidden": lambda n: torch.zeros(n, n, dtype=torch.bool),
    "dilated": lambda n: (K(n) <= Q(n)) & ((Q(n) - K(n)) % 2 == 0),
    "window that ends nowhere": lambda n: Q(n) - K(n) < 3,
    "tril one up": lambda n: torch.ones(n, n, dtype=torch.bool).tril(1),
    "tril one down": lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1),
    "triu": lambda n: torch.ones(n, n, dtype=torch.bool).triu(),
    "rounded in bfloat16": lambda n: (K(n) + 256).bfloat16() <= (Q(n) + 256).bfloat16(),
    "wrapped in int8": lambda n: (K(n) + 125).to(torch.int8) <= (Q(n) + 125).to(torch.int8),
    "uint8 or": lambda n: ((K(n) <= Q(n)).to(torch.uint8) | 2) == 3,
    "reads a row": lambda n: (K(n) <= Q(n))[torch.tensor([0, 1, 2, 3, 5, 4])],
    "x.where other way": lambda n: torch.zeros(n, n).where(K(n) > Q(n), float("-inf")),
    "bits": lambda n: (K(n) <= Q(n)).to(torch.int32).view(dtype=torch.float32) == 1,
    "flip": lambda n: (K(n) >= Q(n)).flip(1),
    "negative slice": lambda n: torch.ones(n + 1, n + 1, dtype=torch.bool).tril()[-n:, :n],
    "cumsum of ones, flipped": lambda n: torch.ones(n, n).cumsum(0) <= torch.ones(n, n).cumsum(1),
    "half": lambda n: 2 * K(n) <= 2 * Q(n) - 1,
    "-65504 in float32": lambda n: torch.where(K(n) <= Q(n), 0.0, torch.finfo(torch.float16).min),
    "hidden and lifted": lambda n: torch.full((n, n), -math.inf).triu(1).clamp(min=-100.0),
    "a later part": lambda n: torch.cat([K(n)[:, :3] <= Q(n), torch.arange(n - 3) <= Q(n)], -1),
    "repeated along the keys": lambda n: (K(n)[:, : n // 2] <= Q(n)).repeat(1, 2),
    "each key twice": lambda n: (torch.arange(n // 2) <= Q(n)).repeat_interleave(2, 1),
    "each query twice": lambda n: (K(n) <= torch.arange(n // 2)[:, None]).repeat_interleave(2, 0),
    "rows and columns in another order": lambda n: (K(n) <= Q(n)).reshape(n // 2, 2, n).transpose(0, 1).reshape(n, n),
    "a last key for all": lambda n: F.pad((K(n) <= Q(n))[:, :-1], (0, 1), value=True),
    "a last query that sees nothing": lambda n: F.pad((K(n) <= Q(n))[:-1], (0, 0, 0, 1)),
    "put around": lambda n: F.pad((K(n) <= Q(n))[:, :-1].float(), (1, 0), mode="circular") == 1,
    "written after it was read": lambda n: (m := torch.ones(n, n).tril(), m == 1, m.triu_())[0] == 1,
    "written through a view": lambda n: (m := torch.ones(n, n).tril(), m.T.triu_(1))[0] == 1,
}
PROVEN_AS_WHAT_THEY_ARE = {
    *("one too many", "from one", "k < q hides the diagonal", "tril one up", "tril one down", "negative slice", "half"),
    "one key ahead",
    "the diagonal taken",  # a key padding
    "every second key",  # causal with a key padding
    "written after it was read",  # the diagonal
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_never_taken_for_causal(name: str) -> None:
    # `prove` has compared every claim with the mask itself
    mask = prove(lambda: NEAR_MISSES[name](6))
    assert mask != Mask(causal=True)
    if name not in PROVEN_AS_WHAT_THEY_ARE:
        assert mask.unknown, mask


@pytest.mark.parametrize(("Lq", "Lk"), [(4, 9), (9, 9), (1, 7)])
def test_offsets(Lq: int, Lk: int) -> None:
    past = Lk - Lq
    mask = prove(lambda: torch.arange(Lk) <= (torch.arange(Lq) + past)[:, None], Lq=Lq, Lk=Lk)
    assert mask == Mask(causal=True, offset=past)
    mask = prove(lambda: torch.ones(Lq, Lk, dtype=torch.bool).tril(past), Lq=Lq, Lk=Lk)
    assert mask == Mask(causal=True, offset=past)
    if past:
        top_left = prove(lambda: torch.ones(Lq, Lk, dtype=torch.bool).tril(), Lq=Lq, Lk=Lk)
        assert top_left == Mask(causal=True, offset=0)


def test_windows() -> None:
    def back(n: int) -> torch.Tensor:
        return Q(n) - K(n)

    assert prove(lambda: (back(6) >= 0) & (back(6) < 3)) == Mask(causal=True, window=3)
    assert prove(lambda: (K(6) > Q(6) - 3) & (K(6) <= Q(6))) == Mask(causal=True, window=3)
    assert prove(lambda: (back(6) >= -1) & (back(6) <= 3)) == Mask(causal=True, offset=1, window=5)
    assert prove(lambda: (back(6) >= 0) & (back(6) < 100)) == Mask(causal=True)  # wider than the sequence
    assert prove(lambda: torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)) == Mask(causal=True, window=3)
    later = prove(lambda: (K(9)[:, :9] <= Q(4) + 5) & (K(9) > Q(4) + 5 - 3), Lq=4, Lk=9)
    assert later == Mask(causal=True, offset=5, window=3)


TWO_SIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": lambda back: back.abs() <= 2,
    "torch.abs, turned round": lambda back: 3 > torch.abs(-back),
    "both bounds": lambda back: (back < 3) & (back > -3),
    "hidden": lambda back: ~((back > 2) | (back < -2)),
    "added": lambda back: torch.where(back > 2, -math.inf, 0.0) + torch.where(back < -2, LOWEST, 0.0),
}


@pytest.mark.parametrize(("Lq", "Lk"), [(7, 7), (4, 9)])
@pytest.mark.parametrize("spelling", TWO_SIDED)
def test_two_sided_windows(spelling: str, Lq: int, Lk: int) -> None:
    def back() -> torch.Tensor:
        return torch.arange(Lq)[:, None] + (Lk - Lq) - torch.arange(Lk)

    mask = prove(lambda: TWO_SIDED[spelling](back()), Lq=Lq, Lk=Lk)
    assert mask == Mask(offset=Lk - Lq, window=3) and str(mask) == "window of 2 tokens on either side"
    # what is not about the diagonal is no such window
    moved = prove(lambda: TWO_SIDED[spelling](back() - 1), Lq=Lq, Lk=Lk)
    assert moved == Mask(causal=True, offset=Lk - Lq + 1, window=5)
    padded = prove(lambda p: (back().abs() <= 2) & (p[:, None, None, :] != 0), torch.ones(B, Lk).long(), Lq=Lq, Lk=Lk)
    assert padded == Mask(offset=Lk - Lq, window=3, padding=True)


def test_two_sided_windows_that_hide_nothing_or_all_but_the_diagonal() -> None:
    assert prove(lambda: (Q(6) - K(6)).abs() <= 5) == Mask()
    assert prove(lambda: (Q(6) - K(6)).abs() <= 4) == Mask(window=5)
    itself = (
        lambda: (Q(6) - K(6)).abs() <= 0,
        lambda: K(6) == Q(6),
        lambda: torch.eye(6) > 0,
        lambda: (torch.eye(6) - 1) * 1e9,
        lambda: torch.zeros(6, 6, dtype=torch.bool).fill_diagonal_(True),
    )
    assert [prove(make) for make in itself] == [Mask(causal=True, window=1)] * 5
    # a single query may have the keys that it sees as a padding
    assert prove(lambda: (Q(1) + 5 - K(6)).abs() <= 2, Lq=1) == Mask(padding=True)
    assert prove(lambda: (Q(6) - K(6)).abs() >= 2).unknown


REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
PADDINGS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "bool": (lambda p: p, REAL.bool()),
    "int to bool": (lambda p: p.bool(), REAL),
    "== 1": (lambda p: p == 1, REAL),
    "!= 0": (lambda p: p.ne(0), REAL),
    "> 0": (lambda p: p > 0, REAL),
    "not of pads": (lambda p: ~p, ~REAL.bool()),
    "float to bool": (lambda p: p.to(torch.bool), REAL.float()),
    "float > 0.5": (lambda p: p > 0.5, REAL.float()),
    "token ids": (lambda p: p != 3, 3 + REAL),
    "one row for all": (lambda p: p[:1].bool(), REAL),
    "2 of 3": (lambda p: p[1].bool()[None], REAL),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PADDINGS)
def test_key_paddings(name: str, causal: bool) -> None:
    read, given_padding = PADDINGS[name]

    def make(p: torch.Tensor) -> torch.Tensor:
        keys = read(p)[:, None, None, :]
        return keys & (K(6) <= Q(6)) if causal else keys.expand(-1, 1, 6, 6)

    assert prove(make, given_padding) == Mask(causal=causal, padding=True)

    def additive(p: torch.Tensor) -> torch.Tensor:
        bias = torch.where(read(p), 0.0, LOWEST)[:, None, None, :]
        return bias + torch.full((6, 6), LOWEST).triu(1) if causal else bias.expand(-1, 1, 6, 6)

    assert prove(additive, given_padding) == Mask(causal=causal, padding=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p[:, None, :, None].expand(-1, 1, 6, 6),  # of the queries
        lambda p: p[:, None, None, :] & p[:, None, :, None],
        lambda p: p[:, None, None, :] | (K(6) <= Q(6)),
        lambda p: p[:, None, None, :] == p[:, None, :, None],
        lambda p: p[:, None, None, :].roll(1, 2).expand(-1, 2, 6, 6) ^ (torch.arange(2)[:, None, None] == 1),
        lambda p: torch.where(p, 0.0, 1.0)[:, None, None, :].expand(-1, 1, 6, 6),
    ],
)
def test_what_is_no_key_padding(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert prove(make, REAL.bool()).unknown


def test_masks_that_users_supply_are_unknown_unless_they_name_no_query() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert "not known when compiling" in prove(lambda m: m, causal).unknown
    assert "adds the values of 'inputs[0]'," in prove(lambda m: m, torch.zeros(6, 6)).unknown
    assert prove(lambda m: m, REAL.bool()[:, None, None, :]) == Mask(padding=True)
    assert prove(lambda m: m * 1.0, REAL[:, None, None, :].float()).unknown  # 0 and 1 are a bias


def test_tensors_that_are_written_are_not_trusted() -> None:
    def written(step: torch.Tensor) -> torch.Tensor:
        mask = K(6) <= Q(6) + step
        step.add_(1)
        return mask

    assert prove(written, torch.tensor(0)).unknown

    @torch.library.custom_op("express_compile::toy_write", mutates_args=("x",))
    def write(x: torch.Tensor) -> None:
        x.fill_(True)

    def by_an_op() -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        write(mask)
        return mask

    assert "modified in place" in prove(by_an_op).unknown

    def filled() -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        mask[0, 5] = True
        return mask

    assert "modified in place" in prove(filled).unknown

    def through_a_view() -> torch.Tensor:
        mask = torch.zeros(6, 6).masked_fill(K(6) > Q(6), -math.inf)
        mask[1].view(6).fill_(0.0)
        return mask

    assert "modified in place" in prove(through_a_view).unknown


NAN = torch.tensor([1.0, -1.0, math.nan, 0.0, 2.0, math.inf])
HUGE = torch.tensor([2**63 - 1, 0, 2**32, 5, -1, 2**31])


@pytest.mark.parametrize(
    ("make", "x"),
    [
        # both sides wrap round, so the order of the coordinates is not that of their multiples
        (lambda x: K(6).int() * 2**30 <= Q(6).int() * 2**30, HUGE),
        (lambda x: K(6) * 2**62 <= Q(6) * 2**62, HUGE),
        (lambda x: K(6).int() + (2**31 - 3) <= Q(6).int() + (2**31 - 3), HUGE),
        (lambda x: K(6).double() + 2.0**60 <= Q(6).double() + 2.0**60, HUGE),
        # 0 times NaN is NaN
        (lambda x: torch.where(K(6) <= Q(6), 0.0, -math.inf) + x * 0, NAN),
        (lambda x: torch.where(K(6) <= Q(6), 0.0, -math.inf) + (x - x), NAN),
    ],
)
def test_what_computers_do_to_numbers_is_not_simplified_away(make: Callable, x: torch.Tensor) -> None:
    actual = make(x)
    if actual.dtype == torch.bool:
        assert not torch.equal(actual, torch.ones(6, 6, dtype=torch.bool).tril())
    else:
        assert actual.isnan().any()
    assert "values that are not known" in prove(make, x).unknown or "adds the values of" in prove(make, x).unknown


def test_a_scalar_tensor_indexes_like_an_int() -> None:
    """``x[tensor(0), :, i]`` has its dimensions in order, ``x[tensor([0, ...]), :, i]`` the indexed one first."""

    def upper() -> torch.Tensor:
        return torch.ones(1, 6, 6, dtype=torch.bool).triu()

    def selected() -> torch.Tensor:
        return upper()[torch.tensor(0), :, torch.arange(6)]

    def gathered() -> torch.Tensor:
        return upper()[torch.zeros(6, dtype=torch.int64), :, torch.arange(6)]

    assert torch.equal(selected(), upper()[0]) and torch.equal(gathered(), upper()[0].T)
    assert prove(selected).unknown
    assert prove(gathered) == Mask(causal=True)


def test_unknown_keys_are_read_from_the_tensor_that_was_compared() -> None:
    for make, x in (
        (lambda x: (K(6) <= Q(6)) & (x + 1 > x), HUGE),  # false for the largest integer
        (lambda x: (K(6) <= Q(6)) & (x.int() > 0), HUGE),  # 2**32 becomes 0
        (lambda x: (K(6) <= Q(6)) & ~(x > 0), NAN),  # true for NaN
        (lambda x: (K(6) <= Q(6)) & ((x > 0) | (x <= 0)), NAN),  # neither is true for NaN
        (lambda x: (K(6) <= Q(6)) & ((x > 0) | (K(6) % 2 == 0)), NAN),
        (lambda x: (K(6) <= Q(6)) & (x.abs() >= 0), torch.where(HUGE == 5, -(2**63), HUGE)),
    ):
        assert 0 < int(make(x)[-1].sum()) < 6
        assert prove(make, x) == Mask(causal=True, padding=True)
    small = (lambda x: K(6).int() * 3 + 7 <= Q(6).int() * 3 + 7), (lambda x: K(6) * 2**20 <= Q(6) * 2**20)
    assert [prove(make, HUGE) for make in small] == [Mask(causal=True)] * 2


def numbers(position: torch.Tensor) -> torch.Tensor:
    """The number of the sequence that every token is of, as transformers finds it."""
    return (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def of_one(segment: torch.Tensor) -> torch.Tensor:
    return segment[:, None, :, None] == segment[:, None, None, :]


def test_packed_sequences_that_are_one() -> None:
    def segments(position: torch.Tensor) -> torch.Tensor:
        return of_one(numbers(position)) & (K(6) <= Q(6))

    assert prove(lambda: segments(torch.arange(6)[None].expand(2, -1))) == Mask(causal=True)
    assert prove(lambda: segments(3 + torch.arange(6)[None])) == Mask(causal=True)
    each = torch.arange(6).expand(2, -1)  # a sequence per token
    assert prove(lambda: segments(2 * torch.arange(6)[None]), segments=each) == Mask(causal=True, segments=True)


SEGMENTS = torch.tensor([[5, 5, 5, 7, 7, 1], [0, 2, 2, 2, 2, 9]])
CHUNKS = {
    "//": lambda i: i // 4,
    "floor_divide": lambda i: torch.floor_divide(i, 4),
    "div": lambda i: torch.div(i, 4, rounding_mode="floor"),
    "of a shift": lambda i: (i + 1) // 4,
    "every second": lambda i: i % 2,
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_segments(name: str) -> None:
    """Local attention in chunks, and dilated attention: the number of the chunk is that of the segment."""
    of = CHUNKS[name]
    numbers = of(torch.arange(6)).expand(B, 6)
    assert prove(lambda: of(K(6)) == of(Q(6)), segments=numbers) == Mask(segments=True)
    both = prove(lambda: torch.where((of(Q(6)) != of(K(6))) | (K(6) > Q(6)), -1e9, 0.0), segments=numbers)
    assert both == Mask(causal=True, segments=True)
    assert prove(lambda: of(K(6)) == of(Q(6) + 1), segments=numbers).unknown
    assert prove(lambda: of(K(6)) <= of(Q(6)), segments=numbers).unknown


def test_keys_that_stand_before_a_causal_mask() -> None:
    """As decoders of old make it: what is cached is seen by all, by zeros or by True in front."""
    assert prove(lambda: torch.cat([torch.zeros(4, 3), steps(4)], -1), Lq=4, Lk=7) == Mask(causal=True, offset=3)
    ones = torch.ones(4, 2, dtype=torch.bool)
    seen = prove(lambda: torch.cat((ones.new_ones(4, 2), ones.new_ones(4, 1), K(4) <= Q(4)), dim=1), Lq=4, Lk=7)
    assert seen == Mask(causal=True, offset=3)
    assert prove(lambda: torch.cat([K(4) <= Q(4), ones.new_ones(4, 3)], -1), Lq=4, Lk=7).unknown
    assert prove(lambda: torch.cat([torch.full((4, 3), -1.0), steps(4)], -1), Lq=4, Lk=7).unknown


def test_masks_of_another_head_or_sequence_are_read_where_they_are() -> None:
    """``repeat`` and ``repeat_interleave`` differ: of ``[B, ...]`` only one of them is right for ``[B * H, ...]``."""
    p = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]]).bool()
    right = prove(lambda p: p[:, None].repeat_interleave(H, 0).expand(-1, 6, -1).view(B, H, 6, 6), p)
    assert right == Mask(padding=True)
    # [H, B] taken for [B, H]: every head has the padding of another sequence
    assert prove(lambda p: p[:, None].repeat(H, 1, 1).expand(-1, 6, -1).view(B, H, 6, 6), p).unknown


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "fill": lambda m: m.fill_(0.0),
    "hide": lambda m: m.fill_(-math.inf),
    "zero": lambda m: m.zero_(),
    "tril": lambda m: m.tril_(),
    "triu": lambda m: m.triu_(1),
    "diagonal": lambda m: m.masked_fill_(K(6) == Q(6), 0.0),
    "causal": lambda m: m.masked_fill_(K(6) > Q(6), -1e9),
    "window": lambda m: m.__setitem__(Q(6) - K(6) >= 3, LOWEST),
    "all": lambda m: m.__setitem__(slice(None), 0.0),
    "one": lambda m: m.__setitem__((0, 5), 0.0),
    "view": lambda m: m[1:].add_(0.0),
    "twice": lambda m: m.mul_(2.0),
    "less": lambda m: m.clamp_(min=-1e10),
}


@settings(max_examples=25)
@given(
    before=st.lists(st.sampled_from(sorted(WRITES)), max_size=4),
    after=st.lists(st.sampled_from(sorted(WRITES)), max_size=2),
    read=st.sampled_from(["itself", "copy", "view", "added"]),
)
def test_whatever_is_written_in_place_is_read_as_it_was_when_it_was_read(
    before: list[str], after: list[str], read: str
) -> None:
    def make() -> torch.Tensor:
        mask = torch.zeros(6, 6)
        for name in ("causal", *before):
            WRITES[name](mask)
        read_as = {"itself": mask, "view": mask[None], "copy": mask * 1.0, "added": mask + steps(6)}[read]
        for name in after:
            WRITES[name](mask)
        return read_as.view(1, 1, 6, 6)

    if not make().isnan().any():
        mask = prove(make)
        if not {"one", "view"} & {*before, *after}:
            assert "modified" not in str(mask.unknown) and "known" not in str(mask.unknown)


PACKED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Mask]] = {
    "alone": (of_one, Mask(segments=True)),
    "key first": (lambda s: s[:, None, None, :] == s[:, None, :, None], Mask(segments=True)),
    "causal": (lambda s: of_one(s) & (K(6) <= Q(6)), Mask(causal=True, segments=True)),
    "not of others": (lambda s: ~((s[:, None, :, None] != s[:, None, None, :]) | (K(6) > Q(6))),
                      Mask(causal=True, segments=True)),
    "int32": (lambda s: of_one(s.int()), Mask(segments=True)),
    "additive": (lambda s: torch.where(of_one(s), 0.0, -math.inf), Mask(segments=True)),
    "one for all": (lambda s: (s[0][:, None] == s[0]) & (K(6) <= Q(6)), Mask(causal=True, segments=True)),
    "window": (lambda s: of_one(s) & ((Q(6) - K(6)).abs() < 3), Mask(window=3, segments=True)),
    "of a number for padding": (lambda s: of_one(s) & (s != 0)[:, None, None, :], Mask(padding=True, segments=True)),
    "counted": (lambda s: of_one((s == 2).cumsum(-1)), Mask(segments=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_packed_segments(name: str) -> None:
    make, expected = PACKED[name]
    segments = {"counted": (SEGMENTS == 2).cumsum(-1), "one for all": SEGMENTS[:1].expand(2, -1)}.get(name, SEGMENTS)
    assert prove(make, SEGMENTS, segments=segments) == expected
    with pytest.raises(AssertionError, match="claimed"):
        prove(make, SEGMENTS, segments=segments.roll(1, 1))


@settings(max_examples=12)
@given(
    rows=st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 2, 3, 9, -4]), min_size=6, max_size=6), min_size=2, max_size=2),
    window=st.none() | st.integers(1, 4),
)
def test_positions_of_packed_sequences(rows: list[list[int]], window: int | None) -> None:
    """A key of the same sequence with a smaller position is an earlier one, wherever positions go on or do not."""

    def make(position: torch.Tensor) -> torch.Tensor:
        q, k = position[:, None, :, None], position[:, None, None, :]
        seen = of_one(numbers(position)) & (k <= q)
        return seen if window is None else seen & (k > q - window)

    position = torch.tensor(rows)
    mask = prove(make, position, segments=numbers(position))
    assert mask == Mask(causal=True, window=window, segments=True)


POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 4, 0, 1, 1, 2]])
ALMOST_PACKED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positions alone": lambda p: p[:, None, None, :] <= p[:, None, :, None],
    "other positions": lambda p: of_one(numbers(p)) & (p.flip(1)[:, None, None, :] <= p.flip(1)[:, None, :, None]),
    "two steps": lambda p: of_one(numbers(2 * p)) & (p[:, None, None, :] <= p[:, None, :, None]),
    "of another step": lambda p: (
        of_one((torch.diff(p, prepend=p[:, :1] - 1) != 2).cumsum(-1)) & (p[:, None, None, :] <= p[:, None, :, None])
    ),
    "without a first one": lambda p: (
        of_one((torch.diff(p, append=p[:, :1]) != 1).cumsum(-1)) & (p[:, None, None, :] <= p[:, None, :, None])
    ),
    "second differences": lambda p: (
        of_one((torch.diff(p, n=2, prepend=p[:, :2]) != 1).cumsum(-1)) & (p[:, None, None, :] <= p[:, None, :, None])
    ),
    "not counted": lambda p: (
        of_one((torch.diff(p, prepend=p[:, :1] - 1) != 1).int()) & (p[:, None, None, :] <= p[:, None, :, None])
    ),
    "twice the position": lambda p: of_one(numbers(p)) & (2 * p[:, None, None, :] <= p[:, None, :, None]),
    "a sum": lambda p: of_one(numbers(p)) & (p[:, None, None, :] + p[:, None, :, None] <= 4),
    "eight bits": lambda p: (
        of_one(numbers((p + 125).to(torch.int8)))
        & ((p + 125).to(torch.int8)[:, None, None, :] <= (p + 125).to(torch.int8)[:, None, :, None])
    ),
    "one further": lambda p: numbers(p)[:, None, :, None] == numbers(p).roll(1, 1)[:, None, None, :],
    "later or the same": lambda p: numbers(p)[:, None, :, None] >= numbers(p)[:, None, None, :],
    "others only": lambda p: numbers(p)[:, None, :, None] != numbers(p)[:, None, None, :],
    "or causal": lambda p: of_one(numbers(p)) | (K(6) <= Q(6)),
    "one head": lambda p: of_one(numbers(p)) | (torch.arange(H) == 0)[:, None, None],
    "floats": lambda p: of_one(p.float() / 0.0),  # NaN is not NaN
    "written": lambda p: (s := numbers(p), of_one(s), s.fill_(0))[1],
    "other tensors": lambda p: p[:, None, :, None] == (p + 1)[:, None, None, :],
}


@pytest.mark.parametrize("name", ALMOST_PACKED)
def test_almost_packed(name: str) -> None:
    assert prove(ALMOST_PACKED[name], POSITIONS, segments=numbers(POSITIONS)).unknown


def literal(kind: str, shift: int, Lq: int, p: torch.Tensor) -> torch.Tensor:
    q, k = Q(Lq), K(6)
    if kind == "causal":
        return k <= q + shift
    if kind == "window":
        return q - k < 3 + shift
    if kind == "padding":
        return p[:, None, None, :] != 0
    if kind == "segment":
        return p[:, None, :Lq, None] == p[:, None, None, :]
    if kind == "anti":
        return k >= q + shift
    if kind == "stripe":
        return (k + shift) * 2 != q
    if kind == "prefix":
        return k < 3 + shift
    return q >= shift


KINDS = ("causal", "window", "padding", "segment", "anti", "stripe", "prefix", "query")


@settings(max_examples=40)
@given(
    terms=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(-2, 3)), min_size=1, max_size=4),
    joins=st.lists(st.sampled_from(["and", "and", "and", "mul", "where", "add", "or"]), min_size=4, max_size=4),
    additive=st.booleans(),
    causal_too=st.booleans(),
    Lq=st.sampled_from([6, 6, 4, 1]),
)
def test_any_combination_is_proven_right_or_unknown(
    terms: list[tuple[str, int]], joins: list[str], additive: bool, causal_too: bool, Lq: int
) -> None:
    if causal_too:
        terms = [("causal", 0), *terms[:3]]

    def make(p: torch.Tensor) -> torch.Tensor:
        mask = literal(*terms[0], Lq, p)
        for (kind, shift), join in zip(terms[1:], joins, strict=False):
            other = literal(kind, shift, Lq, p)
            if join == "or":
                mask = torch.logical_or(mask, other)
            elif join == "mul":
                mask = mask * other
            elif join == "where":
                mask = torch.where(other, mask, False)
            elif join == "add":
                both = torch.where(mask, 0.0, LOWEST) + torch.where(other, 0.0, -math.inf)
                mask = both == 0
            else:
                mask = mask & other
        if additive:
            mask = torch.zeros(()).masked_fill(~mask, -math.inf)
        return mask.expand(B, 1, Lq, 6)

    mask = prove(make, REAL, Lq=Lq, segments=REAL)
    only = {kind for kind, _ in terms}
    if Lq == 6 and only <= {"causal", "padding"} and "or" not in joins[: len(terms) - 1]:
        shifts = [shift for kind, shift in terms if kind == "causal"]
        assert mask.unknown is None
        assert mask.padding == ("padding" in only)
        assert not mask.causal or mask.offset == min(shifts)


@pytest.mark.parametrize("continues", [False, True])
def test_symbolic_sizes(continues: bool) -> None:
    """One proof for all lengths: the offset is an expression, and no guard fixes a length."""
    found: list[AttentionSite] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        found.extend(find_sites(gm))
        return gm

    def attend(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        Lq, Lk = q.shape[2], k.shape[2]
        mask = torch.arange(Lk) <= torch.arange(Lq)[:, None] + (Lk - Lq)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask & p[:, None, None, :])

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend)
    for Lq, Lk in ((5, 9), (6, 11), (7, 23)) if continues else ((5, 5), (6, 6), (9, 9)):
        q, k = torch.randn(B, H, Lq, D), torch.randn(B, H, Lk, D)
        p = torch.ones(B, Lk, dtype=torch.bool)
        for x, d in ((q, 2), (k, 2), (p, 1)):
            torch._dynamo.mark_dynamic(x, d)
        compiled(q, k, p)
    (site,) = found
    mask = site.spec.mask
    assert mask.causal and mask.padding and mask.window is None
    difference = site.spec.Lk.node.expr - site.spec.Lq.node.expr
    assert (mask.offset - difference).expand() == 0
    assert (mask.offset == 0) is False
