"""A fifth method is one file, ``examples/custom_method.py``: it has what the others have and touches nothing else."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from express_compile import METHODS, Policy, SavedPlan, Site, explain, rewrite_attention
from express_compile.core.rows import Rows

FILE = Path(__file__).parents[2] / "examples" / "custom_method.py"
SINKS, RECENT = 3, 10


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[ModuleType]:
    METHODS.load()
    before = dict(METHODS._methods)
    spec = importlib.util.spec_from_file_location("custom_method", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "custom_method", module)
        spec.loader.exec_module(module)
        yield module
    METHODS._methods.clear()
    METHODS._methods.update(before)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    seen = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    for i in range(q.shape[2]):
        own = k.shape[2] - q.shape[2] + i
        seen[i, : min(SINKS, own + 1)] = True
        seen[i, max(0, own - RECENT) : own + 1] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


def tokens(Lq: int, Lk: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(Lq)
    return tuple(torch.randn(2, H, n, 8, generator=generator, dtype=dtype) for H, n in ((4, Lq), (2, Lk), (2, Lk)))


def params(policy: Policy) -> Any:
    return METHODS["streaming"].params(Site(), policy)


def test_it_is_sixty_lines() -> None:
    assert len(FILE.read_text().splitlines()) <= 60


@pytest.mark.parametrize(("Lq", "Lk"), [(50, 50), (7, 50), (1, 50), (5, 5)])
def test_its_op_computes_the_mask_that_is_written_out(example: ModuleType, Lq: int, Lk: int) -> None:
    q, k, v = tokens(Lq, Lk)
    own = params(Policy(methods=[example.Streaming(sinks=SINKS, recent=RECENT)]))
    assert own == params(Policy(sinks=SINKS, window=RECENT)) == {"sinks": SINKS, "recent": RECENT, "min_length": 0}
    out, lse = METHODS["streaming"].op(q, k, v, None, torch.tensor(0), 0.5, 1, **own)
    torch.testing.assert_close(out, by_hand(q, k, v, 0.5))
    assert lse.shape == q.shape[:3] and lse.isfinite().all()
    exact = METHODS["streaming"].op(q, k, v, None, torch.tensor(0), 0.5, 1, **{**own, "min_length": 51})[0]
    whole = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
    torch.testing.assert_close(exact, F.scaled_dot_product_attention(q, k, v, whole, scale=0.5, enable_gqa=True))


def test_its_op_has_a_gradient_and_stands_every_check_of_an_op() -> None:
    q, k, v = (x.requires_grad_() for x in tokens(20, 20))
    own, op = params(Policy(sinks=SINKS, window=RECENT)), METHODS["streaming"].op
    torch.library.opcheck(op, (q, k, v, None, torch.tensor(0), 0.5, 1), own)
    got = torch.autograd.grad(op(q, k, v, None, torch.tensor(0), 0.5, 1, **own)[0].sin().sum(), (q, k, v))
    expected = torch.autograd.grad(by_hand(q, k, v, 0.5).sin().sum(), (q, k, v))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_padding_does_not_reach_it() -> None:
    q, k, v = tokens(30, 30)
    padding = torch.arange(30) >= torch.tensor([[12], [0]])
    own = params(Policy(sinks=SINKS, window=RECENT))
    out, lse = METHODS["streaming"].op(q, k, v, padding, torch.tensor(0), 0.5, 1, **own)
    torch.testing.assert_close(out[:1, :, 12:], by_hand(q[:1, :, 12:], k[:1, :, 12:], v[:1, :, 12:], 0.5))
    torch.testing.assert_close(out[1:], by_hand(q[1:], k[1:], v[1:], 0.5))
    assert (out[0, :, :12] == 0).all() and (lse[0, :, :12] == -math.inf).all()


class Net(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("flat", [True, False])
def test_a_compiled_model_runs_it(example: ModuleType, flat: bool) -> None:
    q, k, v = tokens(40, 40, torch.float32)
    own = example.Streaming(sinks=SINKS, recent=RECENT)
    options = {"methods": ["streaming"], "sinks": SINKS, "window": RECENT} if flat else {"methods": [own]}
    torch._dynamo.reset()
    out = torch.compile(Net(), backend="express", options={**options, "strict": True})(q, k, v)
    torch.testing.assert_close(out, by_hand(q, k, v, 8**-0.5))


def test_explain_measures_its_error_and_saves_its_plan(example: ModuleType) -> None:
    q, k, v = tokens(40, 40, torch.float32)
    report = explain(Net(), q, k, v, methods=[example.Streaming(sinks=SINKS, recent=RECENT)], error=True)
    (site,), (saved,) = report.sites, report.plan.sites
    exact = Net()(q, k, v)
    assert site.method == "streaming"
    assert site.error == pytest.approx(float((by_hand(q, k, v, 8**-0.5) - exact).norm() / exact.norm()), rel=1e-5)
    assert saved.rows == (Rows(sinks=SINKS, recent=RECENT),) * 2
    plan = SavedPlan.from_json(report.plan.to_json())
    assert plan == report.plan and explain(Net(), q, k, v, plan=plan).sites[0].reason == "causal attention; as saved"
    refused = explain(lambda q: F.scaled_dot_product_attention(q, q, q), q, methods=["streaming"]).sites[0]
    assert refused.reason == "it takes causal attention without dropout; this mask: none"


def test_a_transformers_model_runs_it_in_prefill_and_in_decoding(example: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(ids).logits
        place = torch.arange(40)
        seen = (place <= place[:, None]) & ((place < SINKS) | (place >= place[:, None] - RECENT))
        expected = model(ids, attention_mask=seen.expand(2, 1, 40, 40)).logits
        rewrite_attention(model, methods=[example.Streaming(sinks=SINKS, recent=RECENT)], strict=True)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - exact).abs().max() > 1e-3
        cache = model(ids[:, :39]).past_key_values
        step = model(ids[:, 39:], past_key_values=cache).logits
        torch.testing.assert_close(step, expected[:, 39:], rtol=1e-4, atol=1e-5)
