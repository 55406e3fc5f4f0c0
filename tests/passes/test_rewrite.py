"""The rewriter: same numbers as the untouched model, only what was planned, nothing that is still needed removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from express_compile.core.method import METHODS, Method, Refusal, register
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, known_equal
from express_compile.passes.match import find_sites
from express_compile.passes.pipeline import plan_sites, rewrite_graph
from express_compile.passes.rewrite import rewrite

transformers = pytest.importorskip("transformers")

SEEN: list[dict[str, Any]] = []


@torch.library.custom_op("express_compile::toy_rewrite", mutates_args=())
def toy_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    seed: torch.Tensor,
    scale: float,
    layer: int,
    causal: bool,
    window: int,
    min_length: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention, causal from the bottom right, by definition."""
    SEEN.append({"seed": int(seed), "layer": layer, "H_kv": key.shape[1], "padding": padding, "min_length": min_length})
    (Lq, Lk), groups = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query.double() @ k.double().mT) * scale
    back = torch.arange(Lq)[:, None] + Lk - Lq - torch.arange(Lk)
    if causal:
        scores = scores.masked_fill(back < 0, -math.inf)
    if window:
        scores = scores.masked_fill((back if causal else back.abs()) >= window, -math.inf)
    if padding is not None:
        scores = scores.masked_fill(~padding[:, None, None, :], -math.inf)
    out = scores.softmax(-1).nan_to_num() @ v.double()
    return out.to(query.dtype), scores.logsumexp(-1).float()


@toy_op.register_fake
def _(query, key, value, padding, seed, scale, layer, causal, window, min_length=0):
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def refuse_toy(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    mask = spec.mask
    if mask.unknown is not None:
        return Refusal("toy_rewrite", mask.unknown)
    if mask.segments:
        return Refusal("toy_rewrite", str(mask))
    if spec.dropout_p > 0:
        return Refusal("toy_rewrite", "dropout")
    if mask.causal and not known_equal(mask.offset, spec.Lk - spec.Lq):
        return Refusal("toy_rewrite", f"offset {mask.offset}")
    return None


TOY = register(
    Method(
        name="toy_rewrite",
        summary="exact attention by definition",
        supports="causal, window, padding",
        refuses="dropout",
        refuse=refuse_toy,
        params=lambda site, policy: {"causal": site.spec.mask.causal, "window": site.spec.mask.window or 0},
    )
)
POLICY = Policy(methods=("toy_rewrite",), seed=7)


class Run:
    """What one compilation of a model with the rewriter as its backend did."""

    def __init__(self, model: Callable, policy: Policy = POLICY, **compile_options: Any) -> None:
        torch._dynamo.reset()
        SEEN.clear()
        self.graphs: list[torch.fx.GraphModule] = []
        self.plans: list[Any] = []
        self.policy = policy
        self.model = torch.compile(model, backend=self.backend, **compile_options)

    def backend(self, gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        self.plans += rewrite_graph(gm, self.policy)
        self.graphs.append(gm)
        return gm

    def verdicts(self) -> list[str]:
        return [plan.verdict for _, plan in self.plans]

    def targets(self) -> list[str]:
        modules = [m for gm in self.graphs for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
        return [str(getattr(n.target, "__name__", n.target)) for m in modules for n in m.graph.nodes]


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    error = (a - b).abs().max().item()
    assert error <= tolerance, f"differ by {error}"


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    t = transformers
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2)),
        "mistral": lambda: t.MistralForCausalLM(
            t.MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=8)
        ),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, **HEADS, num_key_value_heads=2)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL, **HEADS)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
        "bert": lambda: t.BertModel(t.BertConfig(**SMALL, **HEADS)),
    }
    model = makers[name]().eval()
    model.config._attn_implementation = "sdpa"
    return model


def first(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi", "gpt2", "falcon", "bert"])
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_huggingface_prefill_is_rewritten_and_equal(name: str, pad: str) -> None:
    model = tiny(name)
    attention_mask = torch.ones(2, 12, dtype=torch.long)
    if pad != "none":
        attention_mask[1, :4] = 0
        attention_mask = attention_mask if pad == "left" else attention_mask.flip(1)
    arguments = {} if pad == "none" else {"attention_mask": attention_mask}
    with torch.no_grad():
        expected = first(model(IDS, **arguments))
        run = Run(model, fullgraph=True)
        got = first(run.model(IDS, **arguments))
    assert run.verdicts() == ["rewritten"] * 2
    assert len(SEEN) == 2 and "scaled_dot_product_attention" not in run.targets()
    real = attention_mask.bool()
    assert_same(got[real], expected[real])
    heads = {"llama": 2, "mistral": 2, "qwen2": 2, "falcon": 1}
    assert [call["H_kv"] for call in SEEN] == [heads.get(name, 4)] * 2  # before they were repeated
    paddings = [call["padding"] for call in SEEN]
    assert all(p is None for p in paddings) if pad == "none" else all(torch.equal(p, real) for p in paddings)
    assert SEEN[0]["layer"] != SEEN[1]["layer"] and {call["seed"] for call in SEEN} == {7}


def test_dead_mask_and_repeat_code_is_removed_and_live_code_stays() -> None:
    model = tiny("llama")
    with torch.no_grad():
        run = Run(model)
        run.model(IDS, use_cache=False)
    targets = run.targets()
    assert not {"cumsum", "diff", "le", "and_", "expand_1"} & set(targets)
    assert targets.count("toy_rewrite.default") == 2
    assert targets.count("full") == 1  # one seed for both sites

    def shared(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask), mask

    run = Run(shared)
    out, mask = run.model(torch.randn(2, 4, 6, 8))
    assert run.verdicts() == ["rewritten"] and torch.equal(mask, torch.ones(6, 6, dtype=torch.bool).tril())


def test_nothing_that_writes_is_removed() -> None:
    def f(q: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        log.add_(mask.sum())
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q, log = torch.randn(2, 4, 6, 8), torch.zeros((), dtype=torch.long)
    run = Run(f)
    out = run.model(q, log)
    assert run.verdicts() == ["rewritten"] and log.item() == 21
    assert_same(out, F.scaled_dot_product_attention(q, q, q, is_causal=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_continuing_a_cache(name: str, dynamic: bool) -> None:
    model = tiny(name)
    more = IDS[:, :5]
    with torch.no_grad():
        expected = model(more, past_key_values=model(IDS).past_key_values).logits
        cache = model(IDS).past_key_values
        run = Run(model, dynamic=dynamic or None)
        got = run.model(more, past_key_values=cache).logits
    assert run.verdicts() == ["rewritten"] * 2 and len(SEEN) == 2
    assert_same(got, expected)


def test_one_graph_for_all_lengths_and_paddings() -> None:
    model = tiny("llama")
    run = Run(model, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 19, 31):
            ids = torch.arange(3 * n).view(3, n) % 64
            real = (torch.arange(n) >= torch.arange(3)[:, None] * 2).long()
            got = run.model(ids, attention_mask=real, use_cache=False).logits
            expected = model(ids, attention_mask=real, use_cache=False).logits
            assert_same(got[real.bool()], expected[real.bool()])
    assert len(run.graphs) == 1 and run.verdicts() == ["rewritten"] * 2
    assert len(SEEN) == 6 and SEEN[-1]["padding"].shape == (3, 31)


def test_static_cache_stays_exact_or_equal() -> None:
    model = tiny("llama")
    caches = [transformers.StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    with torch.no_grad():
        expected = [model(ids, past_key_values=caches[0]).logits for ids in (IDS, IDS[:, :3], IDS[:, :1])]
        run = Run(model)
        got = [run.model(ids, past_key_values=caches[1]).logits for ids in (IDS, IDS[:, :3], IDS[:, :1])]
    assert run.plans
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_user_position_ids_are_not_assumed_to_be_consecutive() -> None:
    model = tiny("llama")
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)
    with torch.no_grad():
        expected = model(IDS, position_ids=packed, use_cache=False).logits
        run = Run(model)
        got = run.model(IDS, position_ids=packed, use_cache=False).logits
    assert run.verdicts() == ["refused"] * 2
    assert run.plans[0][1].reason == "causal, packed segments"
    assert_same(got, expected)


class Block(nn.Module):
    """Grouped-query attention with its heads repeated in one of the ways people write it."""

    def __init__(self, repeat: str) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, H, L, D = k.shape
        n = q.shape[1] // H
        if self.repeat == "interleave":
            k, v = k.repeat_interleave(n, dim=1), torch.repeat_interleave(v, n, 1)
        elif self.repeat == "expand":
            k = k[:, :, None].expand(B, H, n, L, D).reshape(B, H * n, L, D)
            v = v.unsqueeze(2).expand(-1, -1, n, -1, -1).flatten(1, 2)
        elif self.repeat == "tile":
            k = k[:, None].expand(B, n, H, L, D).reshape(B, H * n, L, D)
            v = v.repeat(1, n, 1, 1)
        elif self.repeat == "mixed":
            k = k[:, :, None].expand(B, H, n, L, D).reshape(B, H * n, L, D)
            v = v.repeat(1, n, 1, 1)
        elif self.repeat == "scaled in place":
            k = k.repeat_interleave(n, dim=1)
            k.mul_(2.0)
            v = v.repeat_interleave(n, dim=1)
        elif self.repeat == "source written":
            k2, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
            k.zero_()
            k = k2
        gqa = self.repeat == "gqa"
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


@pytest.mark.parametrize(
    ("repeat", "heads"),
    [
        *(("interleave", 2), ("expand", 2), ("gqa", 2)),
        *(("tile", 4), ("mixed", 4), ("scaled in place", 4), ("source written", 4)),
    ],
)
def test_repeated_heads_are_seen_through_only_when_proven(repeat: str, heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5)
    if repeat in ("expand", "tile"):
        v = torch.randn(2, 2, 6, 8)
    expected = Block(repeat)(q, k.clone(), v.clone())
    run = Run(Block(repeat))
    assert_same(run.model(q, k.clone(), v.clone()), expected)
    assert run.verdicts() == ["rewritten"] and SEEN[0]["H_kv"] == heads


def test_attention_of_attention() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 6, 8) for _ in range(3)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        k = F.scaled_dot_product_attention(k, k, v, is_causal=True)
        seen = mask & (F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :1, None, :, 0] > -9)
        q = F.scaled_dot_product_attention(q, k, k, attn_mask=seen)
        return F.scaled_dot_product_attention(q, k, q, is_causal=True)

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> torch.fx.GraphModule:
        planned = rewrite_graph(gm, Policy(methods=("express",), budget=16))
        assert [plan.verdict for _, plan in planned] == ["rewritten"] * 4
        assert not [n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target)]
        return gm

    torch._dynamo.reset()
    got = torch.compile(attend, backend=backend, fullgraph=True)(*inputs)
    assert (got - attend(*inputs)).abs().max() < 1e-5


class Stopped(nn.Module):
    """Grouped-query attention whose repeated heads pass no gradient on, in one of the ways people write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.how == "detach":
            k, v = k.repeat_interleave(2, 1).detach(), v.repeat_interleave(2, 1).detach()
        elif self.how == "no_grad":
            with torch.no_grad():
                k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        elif self.how == "view without, copy with":
            with torch.no_grad():
                k, v = k[:, :, None], v[:, :, None]
            k, v = (x.expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("how", ["detach", "no_grad", "view without, copy with", "not at all"])
def test_gradients_stop_where_they_stopped_before(how: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)]
    model, gradients = Stopped(how), []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> torch.fx.GraphModule:
        ((_, plan),) = rewrite_graph(gm, Policy(methods=("express",), budget=16))
        assert plan.verdict == "rewritten"
        return gm

    torch._dynamo.reset()
    for f in (model, torch.compile(model, backend=backend, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        f(*leaves).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for expected, got in zip(*gradients, strict=True):
        assert (expected is None) == (got is None)
        assert expected is None or (expected - got).abs().max() < 1e-5 < expected.abs().max()
    assert [x is None for x in gradients[0]] == [False, *[how != "not at all"] * 2]


def test_rows_of_real_tokens_are_equal_and_those_of_padding_are_zero() -> None:
    """The one place where a rewritten site differs by design: nobody reads the rows of padded tokens."""
    torch.manual_seed(0)
    q, real = torch.randn(2, 4, 6, 8), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()

    def attend(q: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> torch.fx.GraphModule:
        ((site, plan),) = rewrite_graph(gm, Policy(methods=("express",), budget=16))
        assert plan.verdict == "rewritten" and site.spec.mask == Mask(causal=True, padding=True)
        return gm

    torch._dynamo.reset()
    got, expected = torch.compile(attend, backend=backend)(q, real), attend(q, real)
    assert (got - expected).abs().amax((1, 3))[real].max() < 1e-5
    assert (got.abs().amax((1, 3))[~real] == 0).all()
    assert expected[1, :, 5].abs().max() > 0.1  # PyTorch lets this padded token attend to the five real ones


def test_one_head_that_broadcasts() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 1, 6, 8)
    for f in (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True),
        lambda q, k: F.scaled_dot_product_attention(q, k.expand(-1, 4, -1, -1), k.repeat(1, 4, 1, 1), is_causal=True),
    ):
        run = Run(f)
        assert_same(run.model(q, k), f(q, k))
        assert run.verdicts() == ["rewritten"] and SEEN[0]["H_kv"] == 1


def test_scale_and_value_size() -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 3)
    for scale in (None, 0.3):
        run = Run(lambda q, k, v, s=scale: F.scaled_dot_product_attention(q, k, v, scale=s))
        assert_same(run.model(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=scale))
        assert run.verdicts() == ["rewritten"]


def test_autocast_is_kept() -> None:
    q = torch.randn(2, 4, 6, 8)

    def f(q: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    run = Run(f)
    out = run.model(q)
    assert run.verdicts() == ["rewritten"] and out.dtype == torch.bfloat16
    assert_same(out.float(), f(q).float(), 2**-6)


def test_a_view_of_the_result_keeps_working() -> None:
    q = torch.randn(2, 6, 4, 8).transpose(1, 2)

    def f(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).view(2, 6, 32)

    run = Run(f)
    assert_same(run.model(q), f(q))
    assert run.verdicts() == ["rewritten"]


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_attention_is_rewritten_inside_its_body(masked: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(8, 8)

        def forward(self, q: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            q = self.projection(q)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, q: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            mask = None
            if masked:
                mask = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None, :]
            for layer in self.layers:
                q = checkpoint(layer, q, mask, use_reentrant=False)
            return q

    torch.manual_seed(0)
    net, q = Net(), torch.randn(2, 4, 6, 8)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    expected = net(q, real)
    run = Run(net)
    got = run.model(q, real)
    assert run.verdicts() == ["rewritten"] * 2
    assert [site.module for site, _ in run.plans] == ["layers.0", "layers.1"]
    assert all(site.graph_module is not run.graphs[0] for site, _ in run.plans)
    assert_same(got, expected)
    assert SEEN[0]["padding"] is None or torch.equal(SEEN[0]["padding"], real)
    assert (SEEN[0]["padding"] is not None) == masked


def test_seed_none_is_drawn_in_the_graph() -> None:
    q = torch.randn(2, 4, 6, 8)
    run = Run(
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), Policy(methods=("toy_rewrite",), seed=None)
    )
    seeds = []
    for start in (3, 3, 4):
        torch.manual_seed(start)
        run.model(q)
        seeds.append(SEEN[-1]["seed"])
    run.model(q)
    assert seeds[0] == seeds[1] != seeds[2] != SEEN[-1]["seed"]
    assert len(run.graphs) == 1 and run.targets().count("randint") == 1


def test_symbolic_length_gets_min_length_at_run_time_and_a_static_one_is_decided() -> None:
    policy = Policy(methods=("toy_rewrite",), min_length=50)
    q = torch.randn(2, 4, 6, 8)
    torch._dynamo.mark_dynamic(q, 2)
    run = Run(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), policy)
    run.model(q)
    assert run.verdicts() == ["rewritten"] and SEEN[0]["min_length"] == 50
    run = Run(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), policy)
    run.model(torch.randn(2, 4, 6, 8))
    assert run.verdicts() == ["exact"] and not SEEN
    assert run.plans[0][1].reason == "6 keys are fewer than min_length 50"


def test_meta_and_lint() -> None:
    run = Run(tiny("gpt2"))
    with torch.no_grad():
        run.model(IDS, use_cache=False)
    nodes = [n for n in run.graphs[0].graph.nodes if n.target is TOY.op]
    assert len(nodes) == 2
    for node in nodes:
        (out,) = node.users
        assert out.meta["example_value"].shape == (2, 4, 12, 8)
        assert "attn" in list(out.meta["nn_module_stack"].values())[-1][0] and "sdpa" in out.meta["stack_trace"]
    run.graphs[0].graph.lint()


def test_a_foreign_site_is_refused() -> None:
    graphs = []

    def keep(gm: torch.fx.GraphModule, _: list[Any]) -> Callable:
        graphs.append(gm)
        return gm

    q = torch.randn(2, 4, 6, 8)
    for factor in (1.0, 2.0):
        torch._dynamo.reset()
        torch.compile(lambda q, f=factor: F.scaled_dot_product_attention(q * f, q, q), backend=keep)(q)
    planned = plan_sites(find_sites(graphs[0]), POLICY)
    with pytest.raises(ValueError, match="is not in the graph module given"):
        rewrite(graphs[1], planned, POLICY)
    assert METHODS["toy_rewrite"] is TOY


# ------------------------------------------------------------------------------------- key paddings that are gathered


def gathering(place: Callable[[torch.Tensor, torch.Tensor], Any], additive: bool) -> Callable[..., torch.Tensor]:
    """Causal attention that looks up its key padding at ``place`` of sequences and keys, as transformers does."""

    def attend(q: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        places = place(torch.arange(q.shape[0])[:, None, None, None], torch.arange(n)[None, None, None, :])
        mask = (torch.arange(n) <= torch.arange(n)[:, None]) & real[places].to(torch.bool)
        if additive:
            hidden = torch.where(mask, 0.0, torch.finfo(q.dtype).min)
            return (q @ q.mT * 0.3 + hidden).softmax(-1) @ q
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3)

    return attend


def padded(B: int, n: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[B, 4, n, 8]`` and flags ``[rows, columns]``, each row with other zeros behind a first one."""
    real = (torch.arange(columns) + torch.arange(rows)[:, None]) % 3 != 1
    real[:, 0] = True
    return torch.randn(B, 4, n, 8, generator=torch.Generator().manual_seed(n)), real.long()


IN_ORDER: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "both": lambda b, k: (b, k),
    "keys": lambda b, k: (slice(None), None, None, k[0, 0, 0]),
    "one row": lambda b, k: (0 * b, k),
}
OUT_OF_ORDER: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "another sequence": lambda b, k: (b + 1, k),
    "the next key": lambda b, k: (b, k + 1),
    "every second key": lambda b, k: (b, 2 * k),
    "of the transposed": lambda b, k: (k, b),
}


NOT_UNDERSTOOD: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "backwards": lambda b, k: (b, torch.cat([k[..., :1], k[..., 1:].flip(-1)], -1)),
    "turned": lambda b, k: (b, torch.cat([k[..., :1], k[..., 1:].roll(1, -1)], -1)),
    "looked up": lambda b, k: (b, torch.tensor([0, 2, 1]).repeat(k.shape[-1])[k]),
    "limited": lambda b, k: (b, k.clamp(max=3)),
}


@pytest.mark.parametrize("additive", [True, False], ids=["written out", "SDPA"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("place", IN_ORDER)
def test_a_padding_that_is_gathered_may_be_longer(place: str, dynamic: bool, additive: bool) -> None:
    attend = gathering(IN_ORDER[place], additive)
    run = Run(attend, dynamic=dynamic)
    for B, n, rows, columns in ((3, 7, 5, 11), (2, 9, 2, 9), (3, 9, 3, 13), (5, 6, 7, 6)):
        q, real = padded(B, n, B if place == "keys" else rows, columns)
        assert_same(run.model(q, real), attend(q, real))
    assert set(run.verdicts()) == {"rewritten"} and len(run.graphs) == (1 if dynamic else 4), "no size is guarded"
    assert [x["padding"].shape for x in SEEN] == [(3, 7), (2, 9), (3, 9), (5, 6)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("place", [*OUT_OF_ORDER, *NOT_UNDERSTOOD])
def test_a_padding_that_is_gathered_elsewhere_is_not_read_in_order(place: str, dynamic: bool) -> None:
    """Where the places are not understood, what was gathered is the padding."""
    attend = gathering({**OUT_OF_ORDER, **NOT_UNDERSTOOD}[place], additive=True)
    run = Run(attend, dynamic=dynamic)
    for B, n, rows, columns in ((2, 9, 24, 24), (3, 7, 25, 24)):
        q, real = padded(B, n, rows, columns)
        assert_same(run.model(q, real), attend(q, real))
    assert set(run.verdicts()) == {"refused" if place in OUT_OF_ORDER else "rewritten"}


@pytest.mark.parametrize("shape", [(2, 7), (3, 6), (1, 7), (3, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_gathered_padding_that_is_too_short_raises_what_the_model_raises(dynamic: bool, shape: tuple) -> None:
    attend = gathering(IN_ORDER["both"], additive=True)
    run = Run(attend, dynamic=dynamic)
    if dynamic:
        run.model(*padded(3, 7, 4, 8))
    q, real = padded(3, 7, *shape)
    for model in (attend, run.model):
        with pytest.raises(IndexError, match="out of bounds"):
            model(q, real)
    assert set(run.verdicts()) == {"rewritten"}
