"""CUDA graphs as torch.compile makes them: decoding steps of generate(), and the backend over whole sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from express_compile import restore_attention, rewrite_attention
from express_compile.routes.compile import express

transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES = dict(
    vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
STEPS = 6


def generate(model, n: int, compiled: bool = True) -> torch.Tensor:
    ids = torch.randint(0, 97, (2, n), generator=torch.Generator().manual_seed(n)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, cache_implementation="static", pad_token_id=0,
        eos_token_id=None, disable_compile=not compiled, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(result.logits)


@pytest.mark.parametrize("draws", [None, [16, 32, 48, 64]])
def test_compiled_decoding_samples_as_eager_decoding_does(draws) -> None:
    """With the graphs of ``mode="reduce-overhead"``; tables on the device are made while these are."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).cuda().eval()
    exact = [generate(model, n) for n in (900, 1300)]
    options = {} if draws is None else dict(method_options={"santa": {"draws": draws}})
    rewrite_attention(model, methods=["santa"], budget=32, min_length=0, seed=3, **options)
    compiled = [generate(model, n) for n in (900, 1300, 900)]
    eager = [generate(model, n, compiled=False) for n in (900, 1300)]
    assert torch.equal(compiled[0], compiled[2])
    for a, b, truth in zip(compiled, eager, exact, strict=False):
        assert torch.equal(a.argmax(-1), b.argmax(-1)) and (a - b).norm() / b.norm() < 1e-3
        assert all((x - y).norm() / y.norm() > 1e-2 for x, y in zip(a[1:], truth[1:], strict=True))


class Layer(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


@pytest.mark.parametrize("method", ["express", "thinformer"])
def test_the_backend_with_cuda_graphs(method) -> None:
    """Other graphs, and eager memory, are made between the calls and must leave its tables alone."""
    policy = dict(methods=[method], budget=128, min_length=0, seed=1)
    expected, compiled, inputs = {}, {}, {}
    for n in (2048, 3000, 4096):
        layer = Layer()
        layer.causal = method == "express"
        generator = torch.Generator("cuda").manual_seed(n)
        inputs[n] = [torch.randn(1, 4, n, 64, generator=generator, device="cuda").bfloat16() for _ in range(3)]
        torch.compiler.reset()
        expected[n] = torch.compile(layer, backend=express, dynamic=False, options=policy)(*inputs[n])
        graphs = {**policy, "triton.cudagraphs": True}
        compiled[n] = torch.compile(layer, backend=express, dynamic=False, options=graphs)
    with torch.no_grad():
        for _ in range(4):
            for n, call in compiled.items():
                torch.compiler.cudagraph_mark_step_begin()
                out = call(*inputs[n]).clone()
                junk = [torch.full((1 << 20,), 7, device="cuda") for _ in range(8)]
                assert torch.equal(out, expected[n]), n
                del junk


def test_restoring_after_graphs_gives_exact_decoding() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).cuda().eval()
    exact = generate(model, 900)
    rewrite_attention(model, methods=["santa"], budget=32, min_length=0, seed=3)
    assert (generate(model, 900) - exact).norm() / exact.norm() > 1e-2
    restore_attention(model)
    assert (generate(model, 900) - exact).norm() / exact.norm() < 1e-5
