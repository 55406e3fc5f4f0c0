"""Mask functions of transformers are known by what they compute: the prover of graphs reads them."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as M

from express_compile.core.spec import Mask
from express_compile.routes.transformers import mask_functions
from express_compile.routes.transformers.mask_functions import proven

sliding = M.sliding_window_causal_mask_function


@pytest.mark.parametrize(
    "function, mask",
    [
        (M.causal_mask_function, Mask(causal=True)),
        (M.bidirectional_mask_function, Mask()),
        (sliding(12), Mask(causal=True, window=12)),
        (sliding(1), Mask(causal=True, window=1)),
        (M.and_masks(sliding(12), M.causal_mask_function), Mask(causal=True, window=12)),
        (M.and_masks(sliding(12)), Mask(causal=True, window=12)),
        (M.and_masks(sliding(12), sliding(9)), Mask(causal=True, window=9)),
        (M.sliding_window_bidirectional_mask_function(12), Mask(window=12 + 1)),
        (lambda b, h, q, k: (q >= k) & ~(k < q - 4), Mask(causal=True, window=5)),
        (lambda b, h, q, k: torch.where(q - k < 0, False, True), Mask(causal=True)),
    ],
)
def test_what_a_function_computes_is_proven_whoever_wrote_it(function, mask: Mask) -> None:
    known = proven(function)
    assert known.unknown is None and known == mask
    places = (torch.arange(n).view(*(n if i == j else 1 for j in range(4))) for i, n in enumerate((1, 1, 40, 40)))
    q, k = torch.arange(40)[:, None], torch.arange(40)
    shown = torch.ones(40, 40, dtype=torch.bool) if not mask.causal else k <= q
    if mask.window is not None:
        shown = shown & ((q - k).abs() < mask.window)
    assert torch.equal(function(*places).expand(1, 1, 40, 40)[0, 0], shown)


@pytest.mark.parametrize(
    "function, words",
    [
        (M.chunked_causal_mask_function(12, torch.zeros(1)), "reads a Tensor"),
        (M.or_masks(M.sliding_window_overlay(12), M.causal_mask_function), "k <= q or k > q - 12"),
        (M.and_masks(M.sliding_window_overlay(12), M.bidirectional_mask_function), "none that come after"),
        (lambda b, h, q, k: k > q - 12, "none that come after"),
        (lambda b, h, q, k: k <= q + 2 * b, "2\\*b"),
        (lambda b, h, q, k: (k <= q) if q.sum() > 3 else (k > q), "without values"),
        (lambda b, h, q, k: True, "no boolean tensor"),
        (lambda b, h, q, k: (k <= q).float(), "no boolean tensor"),
        (lambda b, h, q, k: (k <= q) & STATE["shown"], "reads a dict"),
        (M.causal_mask_function.__get__(0), "reads a method"),
    ],
)
def test_all_else_is_unknown_and_says_why(function, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        mask = proven(function)
        assert mask.unknown is None, mask.unknown


STATE = {"shown": True}
REACH = 3


def itself(b, h, q, k):
    return itself(b, h, q, k)


def test_a_function_that_calls_itself_is_unknown() -> None:
    assert "recursion" in proven(itself).unknown


def test_attributes_and_defaults_of_a_function_count() -> None:
    def function(b, h, q, k, reach=3):
        return (k <= q) & (q - k < reach)

    assert proven(function).window == 3
    function.__defaults__ = (5,)
    assert proven(function).window == 5
    function.note = []
    assert proven(function).window == 5
    function.note = torch.zeros(1)
    assert "reads a Tensor" in proven(function).unknown


def test_a_number_that_changes_makes_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(b, h, q, k):
        return (k <= q) & (q - k < REACH)

    assert proven(function).window == 3
    monkeypatch.setitem(globals(), "REACH", 7)
    assert proven(function).window == 7


def test_a_function_that_is_made_anew_at_every_call_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(mask_functions, "_KNOWN", {})
    prove = mask_functions.prove
    monkeypatch.setattr(mask_functions, "prove", lambda *args: calls.append(args) or prove(*args))
    assert [proven(sliding(n)).window for n in (5, 5, 6, 5)] == [5, 5, 6, 5] and len(calls) == 2
    monkeypatch.setattr(mask_functions, "_MOST", 2)
    assert proven(sliding(7)).window == 7 and len(mask_functions._KNOWN) == 1
