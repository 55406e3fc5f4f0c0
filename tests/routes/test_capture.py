"""rewrite_attention on models that write attention themselves: graphs captured by Dynamo, run without a compiler."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from express_compile import explain, is_rewritten, record_sites, restore_attention, rewrite_attention
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site, layer_key
from express_compile.passes.pipeline import rewrite_graph
from express_compile.routes.capture import Capture

VOCAB, N, C, H = 61, 40, 32, 4
EXACT: dict[str, Any] = {"methods": ["exact"]}
# 64 tokens and fewer are exact; of 96 some are thinned away
THIN: dict[str, Any] = {
    "methods": ["express"], "budget": 8, "sinks": 4, "window": 8, "protected": 0,
    "method_options": {"express": {"block": 16}},
}  # fmt: skip


class NanoGPT(nn.Module):
    """nanoGPT: a triangle of ones as a buffer, softmax written out; with ``checkpoint`` its blocks are recomputed."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.checkpoint: bool | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.checkpoint is None else checkpoint(block, x, use_reentrant=self.checkpoint)
        return x


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(C), Attention(), nn.Linear(C, C)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.dropout(F.gelu(self.mlp(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.register_buffer("bias", torch.ones(1, 1, 256, 256).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // H)
        weights = F.softmax(scores.masked_fill(self.bias[:, :, :T, :T] == 0, -math.inf), dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class SoftmaxModule(nn.Module):
    """Softmax is a module, products are einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(C, 3 * C), nn.Softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = self.attend(torch.einsum("bhid,bhjd->bhij", q, k) * (C // H) ** -0.5)
        return x + torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2)


class Processor:
    """Attention outside any module, as in diffusers."""

    def __call__(self, owner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1) for y in owner.qkv(x).chunk(3, -1))
        weights = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=(C // H) ** -0.5).softmax(-1)
        return torch.bmm(weights, v).unflatten(0, (-1, H)).transpose(1, 2).flatten(2)


class Processed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.processor = nn.Linear(C, 3 * C), Processor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.processor(self, x)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CallsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (H, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + attend(q, k, v).transpose(1, 2).flatten(2)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, H, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def gptj(**extra: float) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": C, "n_layer": 2, "n_head": H, "n_positions": 256, "rotary_dim": 4}
    plain = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**{**sizes, **plain, **extra}))


def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=C, n_layer=2, n_head=H, bos_token_id=1, eos_token_id=2)
    )


def falcon() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": H}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=1, eos_token_id=2))


def llama() -> nn.Module:
    sizes = {"hidden_size": C, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": H}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes))


def build(make: Callable[..., nn.Module], **extra: float) -> nn.Module:
    """In evaluation mode, with scores large enough for attention to matter."""
    torch.manual_seed(0)
    model = make(**extra)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def states(n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, n, C, generator=torch.Generator().manual_seed(seed))


def tokens(n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, n), generator=torch.Generator().manual_seed(seed))


def reads_tokens(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Embedding) for module in model.modules())


def call(model: nn.Module, n: int = N) -> torch.Tensor:
    """The output for ``n`` tokens, or states where the model takes those."""
    out = model(tokens(n) if reads_tokens(model) else states(n))
    return out if isinstance(out, torch.Tensor) else out.logits


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).norm() / truth.norm()).item()


def train(model: nn.Module, n: int = 96) -> list[torch.Tensor]:
    """The output, and the gradients of all parameters that have one."""
    model.zero_grad()
    out = call(model, n)
    (out.square().mean() + out[0].mean()).backward()
    full = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None]
    return [out.detach(), *(x.clone() for x in full)]


def worst(run: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    assert len(run) == len(truth) > 0
    return max(relative(a, b) for a, b in zip(run, truth, strict=True))


def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """What torch.compile(backend="express") does with THIN, without inductor and buffers."""

    rewrite_graph(gm, Policy(**THIN), inputs)
    return gm.forward


def by_backend(model: nn.Module, run: Callable[[Callable[..., Any]], Any]) -> Any:
    torch._dynamo.reset()
    result = run(torch.compile(model, backend=backend))
    torch._dynamo.reset()
    return result


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the modules whose graphs were captured, in order."""
    paths: list[str] = []
    rewrite = Capture._rewrite

    def counting(self: Capture, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        paths.append(self.path)
        return rewrite(self, gm, inputs)

    monkeypatch.setattr(Capture, "_rewrite", counting)
    return paths


# ---------------------------------------------------------------------------------------------- same numbers

# model, form of its sites, their verdict under EXACT, whether their masks are proven causal, their modules
MODELS = [
    pytest.param(NanoGPT, "softmax", "rewritten", "causal", ["blocks.0.attn", "blocks.1.attn"], id="nanogpt"),
    pytest.param(SoftmaxModule, "softmax", "rewritten", "none", [""], id="softmax-module"),
    pytest.param(Processed, "softmax", "rewritten", "none", [""], id="processor"),
    pytest.param(CallsFunction, "sdpa", "exact", "causal", [""], id="function"),
    pytest.param(encoder, "_transformer_encoder_layer_fwd", "exact", "none", ["layers.0", "layers.1"], id="encoder"),
    pytest.param(
        gptj, "softmax", "rewritten", "causal", ["transformer.h.0.attn", "transformer.h.1.attn"], id="gptj"
    ),
    pytest.param(
        bloom, "softmax", "rewritten", "unknown",
        ["transformer.h.0.self_attention", "transformer.h.1.self_attention"], id="bloom",
    ),
    pytest.param(
        falcon, "sdpa", "exact", "causal",
        ["transformer.h.0.self_attention", "transformer.h.1.self_attention"], id="falcon",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "form", "verdict", "mask", "modules"), MODELS)
@torch.no_grad()
def test_exact_is_the_model_and_restoring_is_bitwise(make, form, verdict, mask, modules, captures) -> None:
    model = build(make)
    before = call(model)
    traces = {path: (set(vars(m)), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    state = list(model.state_dict())
    assert rewrite_attention(model, **EXACT) is model and is_rewritten(model) and list(model.state_dict()) == state
    with record_sites() as sites:
        after = call(model)
    assert relative(after, before) <= 1e-5
    assert [(site.form, site.verdict, site.module) for site in sites] == [(form, verdict, name) for name in modules]
    assert all(site.mask.startswith(mask) and ".py:" in site.source for site in sites)
    assert captures == [""], "the whole model is one graph"
    again = explain(model, tokens() if reads_tokens(model) else states())
    assert again.sites == tuple(sites) and again.graphs == 0 and captures == [""], "nothing is captured twice"

    assert restore_attention(model) is model and not is_rewritten(model)
    assert torch.equal(call(model), before)
    assert {path: (set(vars(m)), len(m._forward_pre_hooks)) for path, m in model.named_modules()} == traces
    with pytest.raises(ValueError, match="not rewritten"):
        restore_attention(model)


@pytest.mark.parametrize("make", [NanoGPT, CallsFunction], ids=lambda make: make.__name__)
@torch.no_grad()
def test_the_random_numbers_are_those_of_the_backend(make) -> None:
    model = build(make)
    before = call(model, 96)
    expected = by_backend(model, lambda compiled: call(compiled, 96))
    rewrite_attention(model, **THIN)
    after = call(model, 96)
    assert torch.equal(after, expected) and relative(after, before) > 1e-3
    assert not torch.equal(call(rewrite_attention(model, seed=1, **THIN), 96), after)
    rewrite_attention(model, **{**THIN, "seed": None})
    torch.manual_seed(5)
    drawn, other = call(model, 96), call(model, 96)
    torch.manual_seed(5)
    assert not torch.equal(drawn, other) and torch.equal(call(model, 96), drawn)


@torch.no_grad()
def test_parts_that_are_called_by_themselves_draw_what_they_draw_in_the_whole(captures) -> None:
    model = rewrite_attention(build(NanoGPT), **THIN)
    whole = call(model, 96)
    with record_sites() as sites:
        x = states(96)
        for block in model.blocks:
            x = x + block.attn(block.norm(x))
            x = x + F.gelu(block.mlp(x))
    assert torch.equal(x, whole) and [site.module for site in sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert captures == ["", "blocks.0.attn", "blocks.1.attn"]


@torch.no_grad()
def test_after_a_graph_break_the_parts_are_captured_with_their_own_names(captures) -> None:
    class Broken(NanoGPT):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            torch._dynamo.graph_break()
            return super().forward(x)

    model, broken = build(NanoGPT), build(Broken)
    whole = call(rewrite_attention(model, **THIN), 96)
    assert torch.equal(call(rewrite_attention(broken, **THIN), 96), whole)
    model.blocks[0].mlp = broken.blocks[0].mlp = BreaksGraph(model.blocks[0].mlp)
    del captures[:]
    with record_sites() as sites:
        assert torch.equal(call(model, 96), whole)
    assert [site.module for site in sites] == ["blocks.0.attn", "blocks.1.attn"] and "blocks.0" in captures


class BreaksGraph(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.inner(x)


# ------------------------------------------------------------------------------------- lengths and generation


@torch.no_grad()
def test_lengths_do_not_recapture(captures) -> None:
    model = rewrite_attention(build(NanoGPT), **THIN)
    for n in range(70, 100, 7):
        call(model, n)
    assert captures == ["", ""], "static, then dynamic"


def xglm() -> nn.Module:
    sizes = {"d_model": C, "ffn_dim": 48, "num_layers": 2, "attention_heads": H, "max_position_embeddings": 256}
    return transformers.XGLMForCausalLM(transformers.XGLMConfig(vocab_size=VOCAB, **sizes))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [gptj, xglm])
@torch.no_grad()
def test_a_padded_batch_is_thinned_whatever_shapes_came_before(make, use_cache, captures) -> None:
    """Dynamo gives the batch of ``attention_mask``, which is gathered, a symbol of its own."""
    model = build(make)
    exact, after = copy.deepcopy(model), rewrite_attention(copy.deepcopy(model), **THIN)

    def run(model: nn.Module, B: int, n: int) -> tuple[torch.Tensor, list[str]]:
        ids = tokens(n).repeat(2, 1)[:B]
        real = (torch.arange(n) >= 5 * torch.arange(B)[:, None]).long()
        with record_sites() as sites:
            logits = model(ids, attention_mask=real, use_cache=use_cache).logits[real.bool()]
        return logits, [site.verdict for site in sites]

    for B, n in ((3, 110), (2, 110), (2, 96), (4, 103)):
        logits, verdicts = run(after, B, n)
        fresh, _ = run(rewrite_attention(copy.deepcopy(model), **THIN), B, n)
        assert verdicts == ["rewritten"] * 2 and relative(logits, fresh) <= 1e-5, (B, n)
        assert relative(logits, run(exact, B, n)[0]) > 1e-3
    for model in (exact, after):
        with pytest.raises(IndexError, match="index 3 is out of bounds for dimension 0 with size 3"):
            model(tokens(96).repeat(2, 1), attention_mask=torch.ones(3, 96, dtype=torch.long), use_cache=use_cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(cache, captures) -> None:
    model = build(gptj)

    def generate(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokens(n)
        result = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
            eos_token_id=None, cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        return result.sequences, torch.stack(result.logits)

    before = [generate(n) for n in (20, 31)]
    rewrite_attention(model, methods=["express", "exact"], budget=16, min_length=0)
    with record_sites() as sites, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        after = [generate(n) for n in (20, 31)]
    for (ids, logits), (same, truth) in zip(after, before, strict=True):
        assert torch.equal(ids, same) and relative(logits, truth) <= 1e-5
    assert len(sites) == 2 * 6 * 2 and len(captures) <= 4
    if cache == "dynamic":  # a static one comes with a mask that generate() has built outside
        assert [site.method for site in sites[:12]] == ["express"] * 2 + ["exact"] * 10


@torch.no_grad()
def test_what_dynamo_gives_up_is_said() -> None:
    model = build(NanoGPT)
    before = {n: call(model, n) for n in (70, 80, 90)}
    rewrite_attention(model, **THIN)
    disabled = torch.compiler.set_stance("force_eager")
    with disabled, pytest.warns(RuntimeWarning, match="blocks.0.attn: Dynamo captured no graph"):
        report = explain(model, states(70))
    assert [(s.module, s.verdict) for s in report.sites] == [("blocks.0.attn", "refused"), ("blocks.1.attn", "refused")]
    assert "set_stance" in report.sites[0].reason
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (70, 80, 90):  # the whole is captured, then at the limit its parts, then theirs
            with record_sites() as sites, torch.set_grad_enabled(n == 90):
                assert relative(call(model, n), before[n]) > 1e-3
            assert [s.verdict for s in sites] == ["rewritten"] * 2
        with record_sites() as sites, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            after = model.double()(states(70).double())
        assert [s.verdict for s in sites] == ["refused"] * 2 and "recompile_limit" in sites[0].reason
    assert torch.equal(after, restore_attention(model)(states(70).double()))
    rewrite_attention(model, strict=True, **THIN)
    model.float()
    with disabled, pytest.raises(ValueError, match="strict=True: blocks.0.attn: Dynamo captured no graph"):
        call(model, 70)


# ----------------------------------------------------------------------------------- masks, refusals and policies


@torch.no_grad()
def test_a_mask_buffer_that_changes_runs_exactly_and_is_reported() -> None:
    model = build(NanoGPT)
    rewrite_attention(model, **THIN)
    assert relative(call(model, 96), call(restore_attention(model), 96)) > 1e-3
    rewrite_attention(model, **THIN)
    call(model, 96)
    model.blocks[0].attn.bias[..., :8] = 1.0  # the first keys are for everybody
    with record_sites() as sites, pytest.warns(RuntimeWarning, match="buffer changed"):
        after = call(model, 96)
    assert torch.equal(after, call(restore_attention(model), 96))
    assert [s.verdict for s in sites] == ["refused"] * 2 and "the buffer that holds its mask" in sites[0].reason


def test_strict_names_the_refused_sites_and_models_without_any() -> None:
    model = rewrite_attention(build(bloom), strict=True, **THIN)
    with pytest.raises(ValueError, match=r"strict=True: 2 attention sites were refused(.|\n)*transformer.h.1"):
        call(model)
    assert call(rewrite_attention(build(NanoGPT), strict=True, **THIN)).shape == (2, N, C)

    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.softmax(x @ self.weight, -1)

    model = rewrite_attention(Router(C, C), **THIN)
    with record_sites() as sites:
        assert torch.equal(call(model), call(restore_attention(model)))
    assert sites == []
    with pytest.raises(ValueError, match="strict=True: no attention was found in the graphs of Router"):
        call(rewrite_attention(model, strict=True, **THIN))


class WrittenOut(nn.Module):
    """A softmax in other words."""

    def __init__(self, softmax: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.softmax(x @ x.mT) @ x


class ByHand(WrittenOut):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.mT
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ x


@pytest.mark.parametrize(
    "model",
    [
        ByHand(torch.abs), WrittenOut(lambda s: F.log_softmax(s, -1).exp()), WrittenOut(lambda s: F.softmin(-s, -1)),
        WrittenOut(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()), WrittenOut(nn.Softmin(-1)),
    ],
    ids=["exp over sum", "log_softmax", "softmin", "logsumexp", "a module"],
)  # fmt: skip
@torch.no_grad()
def test_softmax_has_many_names(model: nn.Module) -> None:
    x = torch.randn(2, 12, C, generator=torch.Generator().manual_seed(0)) / 4
    truth = model(x)
    with record_sites() as sites:
        out = rewrite_attention(model, methods=["exact"])(x)
    # of Softmin the scores have the wrong sign: they are not of attention as SDPA has it
    assert [site.verdict for site in sites] == ["refused" if isinstance(model.softmax, nn.Softmin) else "rewritten"]
    assert (out - truth).norm() < 1e-5 * truth.norm()


def test_without_attention_nothing_is_rewritten() -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.Softmax(-1))
    with pytest.raises(ValueError, match="Sequential: no attention found.*a softmax and matrix products"):
        rewrite_attention(model, **THIN)
    assert not is_rewritten(model)


@torch.no_grad()
def test_models_with_both_kinds_of_attention_get_both_routes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.states = llama(), NanoGPT()

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.text(ids).logits.mean() + self.states(x)

    model = build(Both)
    before = model(tokens(96), states(96))
    assert relative(rewrite_attention(model, **EXACT)(tokens(96), states(96)), before) <= 1e-5
    rewrite_attention(model, **THIN)
    report = explain(model, tokens(96), states(96))
    assert [(s.module, s.form, s.verdict) for s in report.sites] == [
        ("text.model.layers.0.self_attn", "transformers", "rewritten"),
        ("text.model.layers.1.self_attn", "transformers", "rewritten"),
        ("states.blocks.0.attn", "softmax", "rewritten"),
        ("states.blocks.1.attn", "softmax", "rewritten"),
    ]
    assert torch.equal(restore_attention(model)(tokens(96), states(96)), before)


# ------------------------------------------------------------------------------------ copies, parts, other tracers


@torch.no_grad()
def test_copies_and_pickles_are_rewritten_and_independent() -> None:
    model = build(NanoGPT)
    exact = call(model, 96)
    thinned = call(rewrite_attention(model, **THIN), 96)
    others = [copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))]
    assert torch.equal(call(restore_attention(model), 96), exact)
    for other in others:
        assert is_rewritten(other) and torch.equal(call(other, 96), thinned)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert a is not b
        other.blocks[0].mlp.weight.zero_()
        assert relative(call(other, 96), thinned) > 1e-3, "it runs on its own parameters"
        assert is_rewritten(other) and not is_rewritten(restore_attention(other))
    assert torch.equal(call(model, 96), exact)


@torch.no_grad()
def test_a_shallow_copy_is_not_rewritten_and_runs_exactly() -> None:
    block = build(Attention)
    before = call(block, 96)
    rewrite_attention(block, **THIN)
    shallow = copy.copy(block)
    assert is_rewritten(block) and not is_rewritten(shallow)
    assert torch.equal(call(shallow, 96), before) and not torch.equal(call(block, 96), before)


@torch.no_grad()
def test_a_part_is_rewritten_alone_or_with_the_whole() -> None:
    model = build(NanoGPT)
    before = call(model, 96)
    rewrite_attention(model.blocks[1], **THIN)
    with record_sites() as sites:
        assert relative(call(model, 96), before) > 1e-3
    assert [site.module for site in sites] == ["attn"]
    assert torch.equal(call(restore_attention(model), 96), before)

    rewrite_attention(model, **THIN)
    for change in (restore_attention, lambda part: rewrite_attention(part, **EXACT)):
        with pytest.raises(ValueError, match="Block: is a part of a rewritten NanoGPT"):
            change(model.blocks[1])
    part = copy.deepcopy(model.blocks[1])  # that is a model of its own
    assert torch.equal(call(restore_attention(part), 96), call(restore_attention(model).blocks[1], 96))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["whole", "inside"])
@torch.no_grad()
def test_another_compiler_on_top_leaves_rewritten_attention_alone(wrap) -> None:
    model = rewrite_attention(build(NanoGPT), **THIN)
    thinned = call(model, 96)
    outer = wrap(model)
    with record_sites() as sites:
        assert torch.equal(call(torch.compile(outer, backend="eager"), 96), thinned)
    assert [site.verdict for site in sites] == ["rewritten"] * 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call restore_attention"):
        torch.compile(lambda x: outer(x) + 1, backend="eager", fullgraph=True)(states())
    assert torch.equal(torch.export.export(outer, (states(n=96),)).module()(states(n=96)), outer(states(n=96)))


@torch.no_grad()
def test_compiling_a_rewritten_module_in_place_leaves_its_parts_rewritten() -> None:
    model = rewrite_attention(build(NanoGPT), **THIN)
    thinned = call(model, 96)
    model.compile(backend="eager")
    with record_sites() as sites:
        assert torch.equal(call(model, 96), thinned)
    assert [site.verdict for site in sites] == ["rewritten"] * 2
    compiled = model._compiled_call_impl
    assert not is_rewritten(restore_attention(model)) and model._compiled_call_impl is compiled
    assert relative(call(model, 96), thinned) > 1e-3


@torch.no_grad()
def test_a_rewritten_model_is_freed() -> None:
    model = rewrite_attention(build(NanoGPT), **THIN)
    call(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --------------------------------------------------------------------------------------------------- training


def test_gradients() -> None:
    model = build(gptj)
    before = train(model)
    assert worst(train(rewrite_attention(model, **EXACT)), before) <= 1e-5
    thinned = train(rewrite_attention(model, **THIN))
    assert worst(thinned, before) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(train(restore_attention(model)), before, strict=True))
    expected = by_backend(model, train)
    assert worst(thinned, expected) <= 1e-5


def saved_bytes(model: nn.Module) -> int:
    """Memory that the backward pass would find after a forward pass."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(model, 96)
    for kept in (*model.parameters(), *model.buffers()):  # these are there anyway
        storages.pop(kept.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_recompute_with_the_same_random_numbers(reentrant) -> None:
    model = build(NanoGPT, dropout=0.3).train()
    rewrite_attention(model, **THIN)
    torch.manual_seed(7)
    before, needed = train(model), saved_bytes(model)
    model.checkpoint = reentrant
    torch.manual_seed(7)
    with record_sites() as sites:
        after = train(model)
    assert worst(after, before) <= 1e-5 and saved_bytes(model) < 0.3 * needed
    assert {site.verdict for site in sites} == {"rewritten"}


def test_transformers_own_activation_checkpoints() -> None:
    model = rewrite_attention(build(gptj).train(), **THIN)
    before = train(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert worst(train(model), before) <= 1e-5
    model.gradient_checkpointing_disable()
    assert worst(train(restore_attention(model)), before) > 1e-3


@torch.no_grad()
def test_autocast() -> None:
    model = build(CallsFunction)
    with torch.autocast("cpu", torch.bfloat16):
        before = call(model, 96)
        assert torch.equal(call(rewrite_attention(model, **EXACT), 96), before)
        thinned = call(rewrite_attention(model, **THIN), 96)
        restore_attention(model)
        expected = by_backend(model, lambda compiled: call(compiled, 96))
    assert torch.equal(thinned, expected) and relative(thinned.float(), before.float()) > 1e-3


# ------------------------------------------------------------------------------------- models wrapped and changed


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    gc.collect()  # a wrapper may not be the last to hold the group
    torch.distributed.destroy_process_group()


def adapted(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    names = ["c_attn"] if isinstance(model, NanoGPT) else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if isinstance(model, NanoGPT) else model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def check_wrapped(
    make: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    run: Callable[[nn.Module], list[torch.Tensor]],
    path: str,
    core: str = "",
) -> None:
    """Exact is the model, restoring is bitwise, and what is thinned does not depend on when ``core`` was wrapped.

    For NanoGPT, whose sites have the paths ``path``, it is what the op gives by hand.
    """
    model = wrap(build(make))
    before = run(model)
    assert worst(run(rewrite_attention(model, **EXACT)), before) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(run(restore_attention(model)), before, strict=True))
    rewrite_attention(model, **THIN)
    with record_sites() as sites:
        thinned = run(model)
    assert [(s.verdict, s.module) for s in sites] == [("rewritten", path.format(i)) for i in range(2)]
    assert worst(thinned, before) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(run(restore_attention(model)), before, strict=True))
    if make is NanoGPT:
        assert worst(thinned, run(wrap(by_hand(build(make), path)))) <= 1e-5
    rewrite_attention(model.get_submodule(core), **THIN)
    rewritten_before = wrap(rewrite_attention(build(make), **THIN))
    assert all(torch.equal(a, b) for a, b in zip(run(model), run(rewritten_before), strict=True))


class ByHand(Attention):
    """The op of Express with a layer key, without any pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        arguments = (None, torch.tensor(0), (C // H) ** -0.5, self.layer)
        out, _ = METHODS["express"].op(q, k, v, *arguments, **self.params)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, C))


def by_hand(model: NanoGPT, path: str) -> NanoGPT:
    sizes = {"B": 2, "H": H, "H_kv": H, "Lq": 96, "Lk": 96, "D": C // H, "Dv": C // H}
    spec = AttentionSpec(
        **sizes, dtype=torch.float32, device="cpu", scale=(C // H) ** -0.5, mask=Mask(causal=True), dropout_p=0.0
    )
    for i, block in enumerate(model.blocks):
        block.attn.__class__ = ByHand
        block.attn.layer = layer_key(path.format(i))
        block.attn.params = dict(METHODS["express"].params(Site(spec), Policy(**THIN)))
    return model


def forward_only(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [call(model, 96)]


@pytest.mark.filterwarnings("ignore")
def test_lora() -> None:
    check_wrapped(NanoGPT, adapted, train, "base_model.model.blocks.{}.attn", "base_model.model")
    check_wrapped(llama, adapted, train, "base_model.model.model.layers.{}.self_attn", "base_model.model")


@pytest.mark.filterwarnings("ignore")
def test_ddp(gloo) -> None:
    wrap = nn.parallel.DistributedDataParallel
    check_wrapped(NanoGPT, wrap, train, "module.blocks.{}.attn", "module")
    check_wrapped(llama, wrap, train, "module.model.layers.{}.self_attn", "module")


@pytest.mark.filterwarnings("ignore")
def test_fsdp(gloo) -> None:
    check_wrapped(NanoGPT, sharded, train, "blocks.{}.attn")
    check_wrapped(llama, sharded, train, "model.layers.{}.self_attn")


@pytest.mark.filterwarnings("ignore")
def test_quantised_linear_layers() -> None:
    check_wrapped(NanoGPT, quantised, forward_only, "blocks.{}.attn")
    check_wrapped(llama, quantised, forward_only, "model.layers.{}.self_attn")
