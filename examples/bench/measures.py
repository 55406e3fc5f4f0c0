"""How far an approximate model is from the exact one, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class TokenStats:
    """One number per predicted token, float64 ``[n - 1]``: position ``i`` predicts token ``i + 1``.

    kl: KL(exact || approximate) of the next-token distribution in nats.
    agree: 1 where both rank the same token first. nll_exact, nll: nats of the actual next token.
    """

    kl: np.ndarray
    agree: np.ndarray
    nll_exact: np.ndarray
    nll: np.ndarray

    def tail(self, first: int) -> TokenStats:
        """The positions from ``first`` on."""
        return TokenStats(self.kl[first:], self.agree[first:], self.nll_exact[first:], self.nll[first:])

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean()))

    @property
    def perplexity_exact(self) -> float:
        return float(np.exp(self.nll_exact.mean()))


@torch.no_grad()
def token_statistics(
    exact: torch.Tensor,
    approximate: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    chunk: int = 512,
) -> TokenStats:
    """Compare two models by their last hidden states ``[1, n, d]`` (or logits, with the identity as ``head``).

    ``ids`` ``[1, n]``. Logits are computed ``chunk`` tokens at a time, in float32.
    """
    columns = []
    target = ids[0, 1:]
    for start in range(0, ids.shape[1] - 1, chunk):
        stop = min(start + chunk, ids.shape[1] - 1)
        p, q = (head(x[0, start:stop]).float().log_softmax(-1) for x in (exact, approximate))
        actual = target[start:stop, None]
        columns.append(
            torch.stack(
                [
                    (p.exp() * (p - q)).sum(-1),
                    (p.argmax(-1) == q.argmax(-1)).float(),
                    -p.gather(-1, actual)[:, 0],
                    -q.gather(-1, actual)[:, 0],
                ]
            )
            .double()
            .cpu()
        )
    return TokenStats(*torch.cat(columns, 1).numpy())


def chunk_bootstrap(values: list[np.ndarray], chunk: int = 512, draws: int = 2000) -> tuple[float, float, float]:
    """Mean over all texts and its 95% interval, resampling chunks of ``chunk`` tokens (neighbours correlate)."""
    parts = [piece for x in values for piece in np.array_split(x, max(1, len(x) // chunk))]
    sums, counts = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
    pick = np.random.default_rng(0).integers(len(parts), size=(draws, len(parts)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


@torch.no_grad()
def recalls(model: Callable, prompt: torch.Tensor, answer: torch.Tensor) -> bool:
    """Whether every token of ``answer`` ``[m]`` is ranked first after ``prompt`` ``[n]`` and the answer so far."""
    ids = torch.cat([prompt, answer[:-1]])[None]
    logits = model(ids, logits_to_keep=len(answer)).logits[0]
    return bool((logits.argmax(-1) == answer).all())


def retrieval(queries: torch.Tensor, found: torch.Tensor, exact: torch.Tensor) -> dict[str, np.ndarray]:
    """How well query ``i`` finds passage ``i``: float64 ``[m]`` each, from unit vectors ``[m, d]``.

    recall1, recall10: whether it is the first, or among the first ten, by cosine. overlap10: the part of the first
    ten by the scores ``exact`` ``[m, m]`` that is still there. spearman: rank correlation of all scores with them.
    """
    ranks, exact_ranks = ((-x).argsort(1).argsort(1).double().cpu() for x in (queries @ found.T, exact))
    first, middle = min(10, len(ranks)), (len(ranks) - 1) / 2
    values = {
        "recall1": ranks.diagonal() < 1,
        "recall10": ranks.diagonal() < 10,
        "overlap10": ((ranks < first) & (exact_ranks < first)).sum(1) / first,
        "spearman": F.cosine_similarity(ranks - middle, exact_ranks - middle),
    }
    return {name: x.double().numpy() for name, x in values.items()}


class Captured(TorchFunctionMode):
    """While entered: ``calls`` gets query, key and value of every ``scaled_dot_product_attention``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append(args[:3])
        return func(*args, **(kwargs or {}))
