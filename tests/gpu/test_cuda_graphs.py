"""CUDA graphs as torch.compile makes them: decoding steps of generate(), and the backend over whole sequences."""

from __future__ import annotations

import warnings

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


# ---- models: the option, make_graphed_callables, the backend -------------------------------------------------------

N, C = 1024, 256
FEW = dict(budget=16, min_length=0, halving="uniform")  # rows that rounding does not choose
EXPRESS = dict(methods=["express"], sinks=4, window=16, protected=0, **FEW)
THINFORMER = dict(methods=["thinformer"], **FEW)


class Block(torch.nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.causal = (
            torch.nn.LayerNorm(C),
            torch.nn.Linear(C, 3 * C),
            torch.nn.Linear(C, C),
            causal,
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(4 * q, 4 * k, v, attn_mask=bias, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(torch.nn.Module):
    """Attention in its own code, so it is captured; ``given`` is 1 for keys that are seen."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(causal) for _ in range(2))

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        bias = None if given is None else (1.0 - given[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, bias)
        return x


def model_of(causal: bool = True, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Model(causal).cuda().eval()
    return rewrite_attention(model, **options) if options else model


def states(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(1, n, C, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As long as how often CUDA graphs were replayed."""
    counted: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (counted.append(1), replay(self))[1])
    torch.compiler.reset()
    return counted


@pytest.mark.parametrize("causal", [True, False])
def test_a_rewritten_model_replays_and_gives_what_it_gives_eagerly(replays: list[int], causal: bool) -> None:
    options = dict(EXPRESS if causal else THINFORMER, seed=3)
    exact, eager, model = model_of(causal), model_of(causal, **options), model_of(causal, **options, cuda_graphs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        kept = []
        for i, n in enumerate([N] * 6 + [1500] * 6 + [N] * 5):
            with torch.no_grad():
                x = states(i, n)
                kept.append((x, model(x), eager(x), exact(x)))
                junk = [torch.full((1 << 20,), 7, device="cuda") for _ in range(8)]
                del junk
    assert len(replays) >= 8, len(replays)
    for x, out, expected, truth in kept:  # results stay when the next call comes
        assert apart(out, expected) < 1e-4 and apart(out - x, truth - x) > 1e-2
    with torch.no_grad():
        before = len(replays)
        for p, other in zip(model.parameters(), eager.parameters(), strict=True):
            p.mul_(1.5), other.mul_(1.5)
        x = states(99)
        assert apart(model(x), eager(x)) < 1e-4 and apart(model(x), kept[0][2]) > 1e-2
        assert len(replays) > before, "weights are read where they lie"
    for _ in range(5):
        with torch.inference_mode():
            assert apart(model(x), eager(x)) < 1e-4
    restore_attention(model), restore_attention(eager)
    before = len(replays)
    assert torch.equal(model(x), eager(x)) and len(replays) == before


def test_replays_draw_a_fresh_seed_each(replays: list[int]) -> None:
    x = states(0)
    with torch.no_grad():
        for seed, differ in ((None, True), (5, False)):
            model = model_of(**EXPRESS, seed=seed, cuda_graphs=True)
            before = len(replays)
            results = [model(x) - x for _ in range(8)]
            assert len(replays) - before >= 4
            pairs = [(a, b) for i, a in enumerate(results) for b in results[:i]]
            assert all((apart(a, b) > 1e-3) == differ for a, b in pairs), seed


def test_gradients_run_beside_replays(replays: list[int]) -> None:
    eager, model = model_of(**EXPRESS), model_of(**EXPRESS, cuda_graphs=True)
    with torch.no_grad():
        for i in range(5):
            model(states(i))
    before = len(replays)
    assert before >= 2
    for one in (eager, model):
        one(states(7)).square().sum().backward()
    assert len(replays) == before
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert apart(a.grad, b.grad) < 1e-3 and b.grad.norm() > 0


def test_what_pytorch_cannot_record_runs_all_the_same() -> None:
    class Reads(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x * float(x.abs().max() > 0))

    torch.manual_seed(0)
    model = rewrite_attention(Reads().cuda().eval(), **EXPRESS, cuda_graphs=True)
    with torch.no_grad():
        eager = model_of(**EXPRESS)
        for i in range(6):
            assert apart(model(states(i)), eager(states(i))) < 1e-4


@pytest.mark.parametrize("seed", [3, None])
def test_make_graphed_callables_of_a_rewritten_model(replays: list[int], seed: int | None) -> None:
    eager, model = model_of(**EXPRESS, seed=seed), model_of(**EXPRESS, seed=seed)
    graphed = torch.cuda.make_graphed_callables(model, (states(0).requires_grad_(),))
    results = []
    for i in range(1, 5):
        grads = []
        for one in (eager, graphed):
            one.zero_grad(set_to_none=True)
            x = states(i if seed is not None else 1).requires_grad_()
            out = one(x)
            out.square().sum().backward()
            grads.append([out.detach().clone(), x.grad, *(p.grad.clone() for p in one.parameters())])
        results.append(grads[1][0])
        if seed is not None:
            assert all(apart(a, b) < 1e-3 for a, b in zip(grads[1], grads[0], strict=True))
    assert len(replays) == 8, "forward and backward"
    assert all(apart(a, b) > 1e-3 for i, a in enumerate(results) for b in results[:i])


def test_make_graphed_callables_of_a_model_of_transformers(replays: list[int]) -> None:
    """What runs eagerly is recorded or, where transformers writes a mask while it is (5.17), exact attention."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, num_attention_heads=4, num_hidden_layers=2, intermediate_size=256, max_position_embeddings=N,
        vocab_size=97, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).cuda().eval().requires_grad_(False)
    ids = [
        torch.randint(0, 97, (1, N), device="cuda", generator=torch.Generator("cuda").manual_seed(i)) for i in range(5)
    ]
    exact = [model(x).last_hidden_state for x in ids]
    rewrite_attention(model, **THINFORMER)
    expected = [model(x).last_hidden_state for x in ids]
    graphed = torch.cuda.make_graphed_callables(model, (ids[0].clone(),))
    for x, y, truth in zip(ids[1:], expected[1:], exact[1:], strict=True):
        out = graphed(x).last_hidden_state
        assert apart(y, truth) > 1e-2 and min(apart(out, y), apart(out, truth)) < 1e-4
    assert len(replays) == 4


def test_a_padding_that_a_replay_cannot_look_at_is_recorded_exactly() -> None:
    """It held 0 and 1 when it was recorded; half of one hides its key, too, which a method would not see."""
    exact, model = (model_of(False, **options).requires_grad_(False) for options in ({}, THINFORMER))
    x, given = states(0), torch.ones(1, N, device="cuda")
    given[:, 900:] = 0
    assert apart(model(x, given) - x, exact(x, given) - x) > 1e-2
    with pytest.warns(RuntimeWarning, match="a CUDA graph records it"):
        graphed = torch.cuda.make_graphed_callables(model, (x.clone(), given.clone()))
    for column, value in ((0, 0.0), (1, 0.5)):
        given[:, column] = value
        assert apart(graphed(x, given), exact(x, given)) < 1e-4
    given[:, :2] = 1
    model = model_of(False, **THINFORMER, cuda_graphs=True)  # looks before every replay
    with torch.no_grad():
        for i in range(6):
            given[:, i] = 0
            found = model(states(i), given)
        assert apart(found, model_of(False, **THINFORMER)(states(5), given)) < 1e-4
        given[:, 0] = 0.5
        with pytest.warns(RuntimeWarning, match="holds other values"):
            found = model(x, given)
        assert apart(found, exact(x, given)) < 1e-4


def test_the_backend_with_the_option(replays: list[int]) -> None:
    """Forward and backward, two lengths."""
    options, leaves = dict(EXPRESS), []
    eager = model_of(**EXPRESS)
    model = torch.compile(model_of(), backend=express, dynamic=False, options={**options, "cuda_graphs": True})
    for n in (N, 1500):
        for i in range(4):
            grads = []
            for one in (eager, model):
                one.zero_grad(set_to_none=True)
                torch.compiler.cudagraph_mark_step_begin()
                out = one(states(i, n))
                out.square().sum().backward()
                grads.append([out.detach().clone(), *(p.grad.clone() for p in one.parameters())])
            leaves.append(max(apart(a, b) for a, b in zip(grads[1], grads[0], strict=True)))
    assert max(leaves) < 1e-3, leaves
    assert len(replays) >= 2 * 2, "forward and backward"
