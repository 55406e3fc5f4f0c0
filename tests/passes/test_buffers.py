"""Masks kept in buffers: proven by their values, guarded at every call, and only if they are buffers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from express_compile import explain, record_sites, rewrite_attention
from express_compile.core.policy import Policy
from express_compile.passes.buffers import Buffers, _band, _identical, _sample, _Seen
from express_compile.passes.pipeline import plan_graph

N, C, H = 48, 32, 4
OPTIONS = {"methods": ["express"], "budget": 64}


class Block(nn.Module):
    """Attention of nanoGPT: a buffer, sliced, says what is hidden."""

    def __init__(self, buffer: torch.Tensor, use: Callable, persistent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.proj, self.use = nn.Linear(C, 3 * C), nn.Linear(C, C), use
        self.register_buffer("bias", buffer, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.size()
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.attn(x).split(C, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = F.softmax(self.use(scores, self.bias, T), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).contiguous().view(B, T, C))


def tril(dtype=torch.float32) -> torch.Tensor:
    return torch.tril(torch.ones(N, N, dtype=dtype)).view(1, 1, N, N)


def equals_zero(scores, bias, T):
    return scores.masked_fill(bias[:, :, :T, :T] == 0, -math.inf)


def add(scores, bias, T):
    return scores + bias[:T, :T]


def where(scores, bias, T):
    return torch.where(bias[..., :T, :T], scores, torch.finfo(scores.dtype).min)


def last_rows(scores, bias, T):
    return scores.masked_fill(~bias[:, :, N - T : N, N - T : N].bool(), -math.inf)


LOWER = torch.ones(N, N, dtype=torch.bool).tril()
BLOCKS: dict[str, tuple[torch.Tensor, Callable, str]] = {
    "nanoGPT": (tril(), equals_zero, "causal"),
    "GPT-2": (tril(torch.uint8).bool(), where, "causal"),
    "additive": (torch.full((N, N), -math.inf).triu(1), add, "causal"),
    "GPT-Neo's window": (LOWER ^ LOWER.tril(-7), where, "causal, window 7"),
    "from the end": (tril(torch.int64), last_rows, "causal"),
}


def inputs(T: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, T, C, generator=torch.Generator().manual_seed(seed))


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_masks_are_proven(name: str) -> None:
    buffer, use, mask = BLOCKS[name]
    block = Block(buffer, use)
    (site,) = explain(block, inputs(), methods=["exact"]).sites
    assert (site.mask, site.verdict) == (mask, "rewritten")
    (site,) = explain(block, inputs(), **OPTIONS).sites
    assert (site.verdict == "rewritten") == (mask == "causal")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_block_is_equal_with_its_gradients(dynamic: bool) -> None:
    block = Block(tril(), equals_zero)
    compiled = torch.compile(block, backend="express", dynamic=dynamic, options={**OPTIONS, "strict": True})
    for T in (20, 33):
        x = inputs(T)
        outs = [f(x) for f in (compiled, block)]
        assert relative(*outs) < 1e-5
        grads = [torch.autograd.grad(out.square().sum(), list(block.parameters())) for out in outs]
        assert all(relative(a, b) < 1e-4 for a, b in zip(*grads, strict=True))


def through_data(block: Block) -> None:
    block.bias.data = torch.ones_like(block.bias)


CHANGES: dict[str, Callable[[Block], Any]] = {
    "one element": lambda block: block.bias[0, 0, 3].__setitem__(9, 1),
    "another tensor": lambda block: setattr(block, "bias", torch.ones_like(block.bias)),
    "fill_": lambda block: block.bias.fill_(1),
    ".data.fill_": lambda block: block.bias.data.fill_(1),
    "an element through .data": lambda block: block.bias.data[0, 0, 3].__setitem__(9, 1),
    ".data =": through_data,
    "numpy": lambda block: block.bias.numpy()[0, 0, 3:].__setitem__(slice(None), 1),
    "detach": lambda block: block.bias.detach().copy_(block.bias.flip(2)),
    "storage": lambda block: block.bias.untyped_storage().copy_(torch.ones(N * N).untyped_storage()),
    "set_": lambda block: block.bias.set_(torch.ones(1, 1, N, N)),
    "load_state_dict": lambda block: block.load_state_dict({"bias": torch.ones(1, 1, N, N)}, strict=False),
    "assigned": lambda block: block.load_state_dict({"bias": torch.ones(1, 1, N, N)}, strict=False, assign=True),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_buffer_that_changes_is_noticed_and_said_once(name: str) -> None:
    block, original, x = Block(tril(), equals_zero, persistent=name != "numpy"), Block(tril(), equals_zero), inputs()
    torch._dynamo.reset()
    rewrite_attention(block, **OPTIONS)
    before = block(x)
    assert relative(before, original(x)) < 1e-5
    for changed in (block, original):
        CHANGES[name](changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after = [block(x) for _ in range(3)]
    assert relative(before, original(x)) > 1e-2, "the change is one that shows"
    assert all(relative(y, original(x)) < 1e-5 for y in after)
    ours = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
    assert len(ours) == 1 and "mask kept in a buffer changed" in ours[0] and "torch.compiler.reset()" in ours[0]


SAME: dict[str, Callable[[Block], Any]] = {
    "the same values anew": lambda block: block.bias.copy_(tril()),
    "another tensor of the same values": lambda block: block.load_state_dict(block.state_dict(), assign=True),
    "through .data": lambda block: setattr(block.bias, "data", tril()),
}


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_a_buffer_that_holds_the_same_stays_rewritten(name: str) -> None:
    block, x = Block(tril(), equals_zero), inputs()
    torch._dynamo.reset()
    rewrite_attention(block, **OPTIONS)
    before = block(x)
    SAME[name](block)
    with warnings.catch_warnings(), record_sites() as sites:
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(block(x), before)
    assert [site.method for site in sites] == ["express"]


@torch.no_grad()
def test_layers_that_share_a_buffer_and_layers_that_look_alike() -> None:
    """One warning for all; what is compared with is kept once for all of a pattern."""
    shared = tril()
    layers = nn.Sequential(*(Block(buffer, equals_zero) for buffer in (shared, shared, tril())))
    original, x = copy.deepcopy(layers), inputs()
    torch._dynamo.reset()
    graphs: list[Buffers] = []

    def backend(gm, values):
        planned = plan_graph(gm, values, Policy.from_options(OPTIONS))
        graphs.append(planned.buffers)
        return planned.rewritten(lambda gm: gm)

    run = torch.compile(layers, backend=backend, fullgraph=True)
    assert relative(run(x), original(x)) < 1e-5
    assert len(graphs[0].copies) == 1 and len(graphs[0].used) in (2, 3)
    for model in (layers, original):
        model[0].bias.data.fill_(1)
    original[1].bias.data.fill_(1)
    with pytest.warns(RuntimeWarning, match="mask kept in a buffer") as said:
        assert relative(run(x), original(x)) < 1e-5
        assert relative(run(x), original(x)) < 1e-5
    assert len(said) == 1


@torch.no_grad()
def test_a_buffer_that_changes_while_it_is_compiled_is_noticed() -> None:
    block, original, x = Block(tril(), equals_zero), Block(tril(), equals_zero), inputs()

    def backend(gm, values):
        run = plan_graph(gm, values, Policy.from_options(OPTIONS)).rewritten(lambda gm: gm)
        block.bias.data.fill_(1)
        original.bias.data.fill_(1)
        return run

    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="mask kept in a buffer"):
        assert relative(torch.compile(block, backend=backend)(x), original(x)) < 1e-5


def test_of_a_large_buffer_rows_are_compared_and_it_has_to_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("express_compile.passes.buffers._COMPARED", N * N // 4)
    buffer = tril()
    seen = _Seen(buffer, buffer._version, buffer.data_ptr(), _sample(buffer).clone())
    assert seen.values.shape == (N // 4, N) and seen.is_still(buffer)
    assert not seen.is_still(buffer.clone())
    buffer.data[0, 0, 5] = 1  # between two rows that are compared: as the docstring says
    assert seen.is_still(buffer)
    buffer.data[0, 0, 8] = 1
    assert not seen.is_still(buffer)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("columns", [7, 16])
def test_matrices_are_compared_bit_by_bit(dtype: torch.dtype, columns: int) -> None:
    x = torch.ones(5, columns).tril().to(dtype)
    assert _identical(x, x.clone()) and _identical(x.repeat(1, 2)[:, :columns], x)
    y = x.clone()
    y[-1, -1] = 1
    assert not _identical(x, y) or torch.equal(x, y)
    y[0, -1] = 1
    assert not _identical(x, y) and not _identical(y, x)


@torch.no_grad()
def test_a_tensor_that_the_caller_gives_is_not_trusted() -> None:
    """It holds a triangle today; tomorrow's call may bring another one."""

    def f(q, k, v, mask):
        return (q @ k.mT).masked_fill(mask == 0, -math.inf).softmax(-1) @ v

    q = torch.randn(1, 2, 16, 8)
    mask = torch.ones(16, 16).tril()
    (site,) = explain(f, q, q, q, mask, **OPTIONS).sites
    assert site.verdict == "refused" and "values that are not known when compiling" in site.reason
    compiled = torch.compile(f, backend="express", options=OPTIONS)
    for m in (mask, mask.flip(0, 1), torch.ones_like(mask)):
        assert relative(compiled(q, q, q, m), f(q, q, q, m)) < 1e-5


@pytest.mark.parametrize(
    "buffer",
    [
        tril().index_fill(3, torch.tensor([5]), 0.0),
        tril() * torch.arange(1, N + 1),
        tril().flip(2),
        tril().masked_fill(tril() == 1, math.nan),
        tril().expand(1, H, N, N) * torch.tensor([1.0, 1, 1, 0]).view(1, H, 1, 1),
    ],
    ids=["a hole", "many values", "upside down", "NaN", "per head"],
)
@torch.no_grad()
def test_other_buffers_stay_unknown(buffer: torch.Tensor) -> None:
    (site,) = explain(Block(buffer, equals_zero), inputs(), **OPTIONS).sites
    assert site.verdict == "refused" and "not known when compiling" in site.reason


@torch.no_grad()
def test_a_buffer_that_the_graph_writes_is_not_trusted() -> None:
    def use(scores, bias, T):
        bias[..., 0, 1] = 1
        return equals_zero(scores, bias, T)

    block = Block(tril(), use)
    (site,) = explain(block, inputs(), **OPTIONS).sites
    assert site.verdict == "refused"


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), low=st.integers(-9, 9), width=st.integers(0, 18),
    pair=st.sampled_from([(1.0, 0.0), (0.0, -math.inf), (True, False), (3, 7)]), flip=st.none() | st.integers(0, 80),
)  # fmt: skip
def test_bands(rows: int, columns: int, low: int, width: int, pair: tuple, flip: int | None) -> None:
    """Whatever is called a band is one, element by element; a true band with both values is found."""
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    inside = (distance >= low) & (distance <= low + width)
    if flip is not None:
        inside.view(-1)[flip % inside.numel()] ^= True
    matrix = torch.where(inside, torch.tensor(pair[0]), torch.tensor(pair[1]))
    found = _band(matrix.view(1, rows, columns))
    if found is None:
        assert flip is not None or inside.all() or not inside.any()
        return
    first, last, then, other = found
    chosen = torch.ones_like(inside)
    chosen = chosen if first is None else chosen & (distance >= first)
    chosen = chosen if last is None else chosen & (distance <= last)
    assert torch.equal(torch.where(chosen, torch.tensor(then), torch.tensor(other)), matrix)
