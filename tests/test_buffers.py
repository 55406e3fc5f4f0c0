"""Masks kept in buffers: proven by their values, guarded at every call, and only if they are buffers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from express_compile import explain
from express_compile.passes.buffers import _band

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


def written(block: Block) -> None:
    block.bias[0, 0, 3, 9] = 1


def replaced(block: Block) -> None:
    block.bias = torch.ones_like(block.bias)


@pytest.mark.parametrize("change", [written, replaced])
@torch.no_grad()
def test_a_buffer_that_changes_is_noticed_and_said_once(change: Callable) -> None:
    block, x = Block(tril(), equals_zero), inputs()
    compiled = torch.compile(block, backend="express", options=OPTIONS)
    before = compiled(x)
    assert relative(before, block(x)) < 1e-5
    change(block)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after = [compiled(x) for _ in range(3)]
    assert relative(before, block(x)) > 1e-2, "the change is one that shows"
    assert all(relative(y, block(x)) < 1e-5 for y in after)
    ours = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning)]
    assert len(ours) == (1 if change is written else len(ours)) <= 1
    if ours:
        assert "mask kept in a buffer changed" in ours[0] and "torch.compiler.reset()" in ours[0]


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
