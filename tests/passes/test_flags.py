"""Paddings of 0 and 1 that are computed with: proven by what an input holds, and looked at in every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from express_compile import explain, record_sites, rewrite_attention
from express_compile.passes import buffers
from express_compile.passes.buffers import _Flags

L, C, H = 12, 16, 2
MIN = torch.finfo(torch.float32).min
THIN = {"methods": ["thinformer", "exact"], "budget": 16, "min_length": 0}  # of 12 keys all are kept


class Encoder(nn.Module):
    """Attention as encoders have it that are written by hand: ``use`` hides the keys where ``mask`` is 0."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.use = nn.Linear(C, 3 * C), use

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return (self.use(q @ k.mT / 8**0.5, mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def inverted(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    other = 1.0 - mask[:, None, None, :].to(scores.dtype)
    return scores + other.masked_fill(other.to(torch.bool), torch.finfo(scores.dtype).min)


def causal(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf) + (1 - mask[:, None, None]) * -1e9


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "(1 - m) * -1e9": lambda scores, m: scores + (1 - m[:, None, None, :]) * -1e9,
    "(1.0 - m) * min": lambda scores, m: scores + (1.0 - m[:, None, None, :].to(scores.dtype)) * MIN,
    "(m - 1) * 1e9": lambda scores, m: scores + (m.unsqueeze(1).unsqueeze(2) - 1) * 1e9,
    "- 1e9 * (1 - m)": lambda scores, m: scores - 1e9 * (1 - m.view(m.shape[0], 1, 1, -1)),
    "log(m)": lambda scores, m: scores + m[:, None, None].float().log(),
    "inverted": inverted,
    "s * m - 1e10 * (1 - m)": lambda scores, m: scores * (own := m[:, None, None]) - 1e10 * (1 - own),
}
X = torch.randn(3, L, C, generator=torch.Generator().manual_seed(1))
PADDING = torch.ones(3, L, dtype=torch.int64)
PADDING[0, 9:], PADDING[1, :4] = 0, 0


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def graded(mask: torch.Tensor) -> torch.Tensor:
    """A mask that holds a 2, which makes a large number of a score instead of hiding it."""
    return mask.clone().index_fill_(1, torch.tensor([5]), 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_arithmetic_on_flags_is_a_key_padding_while_they_are_flags(form: Callable, dtype: torch.dtype) -> None:
    model, mask = Encoder(form), PADDING.to(dtype)
    wants = [model(X, m) for m in (mask, graded(mask), mask.roll(1, 0))]
    rewrite_attention(model, **THIN)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        for want, m in zip(wants, (mask, graded(mask), mask.roll(1, 0)), strict=True):
            with record_sites() as sites:
                assert error(model(X, m), want) < 1e-6
            found += [(site.method, site.verdict, site.mask) for site in sites]
    kept = ("thinformer", "rewritten", "key padding")
    assert found == [kept, ("exact", "refused", "key padding"), kept]
    assert ["padding that held 0 and 1 when it was compiled" in str(w.message) for w in said] == [True]


@torch.no_grad()
def test_a_compiled_model_looks_at_the_flags_of_every_call() -> None:
    model = Encoder(causal)
    options = {"methods": ["express", "exact"], "budget": 16, "min_length": 0, "strict": True}
    compiled = torch.compile(model, backend="express", options=options)
    assert explain(model, X, PADDING, methods=["express"], min_length=0).sites[0].mask == "causal, key padding"
    seen = PADDING[..., None]  # the rows of other tokens are nobody's
    assert error(compiled(X, PADDING) * seen, model(X, PADDING) * seen) < 1e-5
    with pytest.warns(RuntimeWarning, match="a padding that held 0 and 1 .* holds other values"):
        assert error(compiled(X, graded(PADDING)), model(X, graded(PADDING))) < 1e-5


COMPARED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "float": lambda scores, m: scores + (1.0 - (m[:, None, None] > 0).float()) * MIN,
    "integer": lambda scores, m: scores + (1 - (m != 0).long()[:, None, None]) * -1e9,
    "dtype of the scores": lambda scores, m: scores - 1e9 * (1 - m.bool()[:, None, None].to(scores.dtype)),
    "inverted": lambda scores, m: inverted(scores, m >= 1),
    "filled": lambda scores, m: scores.masked_fill(m[:, None, None] == 0, float("-inf")),
}


@pytest.mark.parametrize("form", COMPARED.values(), ids=COMPARED)
@torch.no_grad()
def test_a_comparison_is_proven_whatever_the_values_are(form: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder(form)
    want = model(X, graded(PADDING))
    rewrite_attention(model, **THIN)
    model(X, PADDING)
    monkeypatch.setattr(buffers, "_are_flags", lambda tensor: pytest.fail("a call looked at its padding"))
    with record_sites() as sites:
        assert error(model(X, graded(PADDING)), want) < 1e-6
    assert [(site.method, site.mask) for site in sites] == [("thinformer", "key padding")]


@torch.no_grad()
def test_what_stays_exact_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder(FORMS["(1 - m) * -1e9"])
    want = model(X, graded(PADDING))
    rewrite_attention(model, methods=["exact"])
    model(X, PADDING)
    monkeypatch.setattr(buffers, "_are_flags", lambda tensor: pytest.fail("a call looked at its padding"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(model(X, graded(PADDING)), want) < 1e-6


@pytest.mark.parametrize("number, words", [(-10000.0, "adds -10000 to scores: neither 0 nor -1e"), (-1e9, None)])
def test_other_values_and_small_numbers_are_refused_and_say_what_to_write(number: float, words: str | None) -> None:
    model = Encoder(lambda scores, m: scores + (1 - m[:, None, None]) * number)
    mask = PADDING if words else graded(PADDING)
    with torch.no_grad():
        (site,) = explain(model, X, mask, methods=["thinformer"], min_length=0).sites
    assert site.verdict == "refused" and (words or "which are not known when compiling") in site.reason
    assert ("float('-inf')" if words else "a boolean key padding [B, 1, 1, Lk]") in (site.nearest or "")


def test_inference_tensors_are_looked_at_too() -> None:
    model = Encoder(FORMS["inverted"])
    with torch.inference_mode():
        mask = PADDING.clone()
        want = model(X, mask)
        rewrite_attention(model, **THIN)
        with record_sites() as sites:
            assert error(model(X, mask), want) < 1e-6
        assert [site.method for site in sites] == ["thinformer"]


def test_flags_are_those_of_the_tensor_that_comes() -> None:
    mask, flags = PADDING.clone(), _Flags()
    assert flags.is_still(mask) and flags.is_still(mask.float()) and flags.is_still(mask.bool())
    mask.data[0, 0] = 3
    assert not flags.is_still(mask) and not flags.is_still(None) and not flags.is_still(mask.to("meta"))
    assert not flags.is_still(torch.full((2,), torch.nan))
