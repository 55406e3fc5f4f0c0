"""Packed sequences as engines hand them over: what each one gets alone, by the options of a policy."""

from __future__ import annotations

import pytest
import torch

from express_compile import METHODS, Policy, Site
from express_compile.core.spec import layer_key
from express_compile.engines.varlen import express_varlen

OPTIONS = dict(budget=16, sinks=2, window=9, protected=0, seed=3)
STARTS = torch.tensor([0, 150, 155, 400], dtype=torch.int32)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(400, heads, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("scale, path", [(None, ""), (0.5, "model.layers.7.self_attn")])
def test_every_sequence_gets_the_bits_of_the_op_for_it_alone(scale, path):
    q, k, v = tensors()
    out = express_varlen(q, k, v, STARTS, 245, scale=scale, path=path, **OPTIONS)
    params = METHODS["express"].params(Site(path=path), Policy(**OPTIONS))
    scale = 8**-0.5 if scale is None else scale
    for a, b in zip(STARTS.tolist(), STARTS.tolist()[1:], strict=False):
        own = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        alone, _ = METHODS["express"].op(*own, None, torch.tensor(3), scale, layer_key(path), **params)
        assert torch.equal(out[a:b], alone[0].transpose(0, 1))
    other = express_varlen(q, k, v, STARTS, 245, scale=scale, path=path + ".other", **OPTIONS)
    assert torch.equal(other[150:155], out[150:155]) and not torch.equal(other[155:], out[155:])


def test_without_a_seed_every_call_draws_anew():
    first, again = (express_varlen(*tensors(), STARTS, 245, **{**OPTIONS, "seed": None}) for _ in range(2))
    assert torch.equal(first[:60], again[:60]) and not torch.equal(first, again)


@pytest.mark.parametrize(
    "options, error, words",
    [({"budgets": 8}, TypeError, "budgets"), ({"budget": 0.1}, ValueError, "its budget is the fraction 0.1")],
)
def test_bad_options_raise_as_those_of_a_model_do(options, error, words):
    with pytest.raises(error, match=words):
        express_varlen(*tensors(), STARTS, 245, **options)
