"""Two processes that share the heads of a model, each beside the whole model; see test_tensor_parallel.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from ranks import in_parts, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed.configuration_utils import DistributedConfig

from express_compile import METHODS, ExpressCache, Policy, Rows, explain, record_sites, rewrite_attention
from express_compile.core.shards import seed_of
from express_compile.core.spec import AttentionSpec, HeadShard, Mask, Site
from express_compile.engines import distributed as parallel
from express_compile.kernels.heads import PerHead

FEW = {"budget": 16, "sinks": 4, "window": 32, "protected": 8}
ROWS = [Rows(4, 32, 16, 8), Rows(4, 32, selected=2), Rows(everything=True), Rows(4, 32, 32, 8)]
IDS = torch.randint(3, 50, (2, 300), generator=torch.Generator().manual_seed(0))
PREFILLS = {
    "express": {"methods": ["express"], **FEW},
    "heads": {"methods": [PerHead(ROWS)]},
    "sparse": {"methods": ["sparse"], "method_options": {"sparse": {"stride": 32, "summary": 8}}},
}


def ops(rank: int, ranks: int) -> dict[str, Any]:
    """Every op with its inputs sharded over heads, over the batch, and replicated: how far it is from one process."""
    mesh, found = init_device_mesh("cpu", (ranks,)), {}
    generator = torch.Generator().manual_seed(0)
    B, H, H_kv, L, D = 2, 8, 4, 600, 16
    sizes = (B, H, L, D), (B, H_kv, L, D), (B, H_kv, L, D)
    query, key, value = (torch.randn(size, generator=generator) for size in sizes)
    options = {"heads": {"rows": ROWS}, "santa": {"draws": [4, 8, 4, 8, 4, 8, 4, 9]}, "sparse": {"stride": 64}}
    variants: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS if name != "exact"}
    variants |= {"santa, each head its own rows": ("santa", {"shared": False, "bernoulli": 4})}
    finer = [*ROWS, *ROWS[1:], Rows(4, 32, selected=1)]
    variants |= {"heads, each query head its own rows": ("heads", {"rows": finer})}
    for title, (name, more) in variants.items():
        few = FEW if name == "express" else {"budget": 16} if name == "thinformer" else {}
        own = options.get(name, {}) | more
        policy = Policy(methods=[name], min_length=0, method_options={name: own}, **few)
        decodes = name == "santa"
        q = query[:, :, -1:] if decodes else query
        mask = Mask(causal=name != "thinformer", offset=L - q.shape[2] if name != "thinformer" else 0)
        spec = AttentionSpec(B, H, H_kv, q.shape[2], L, D, D, q.dtype, "cpu", 0.25, mask)
        method, padding = METHODS[name], torch.arange(L) >= torch.tensor([[0], [37]])
        params = method.params(Site(spec), policy)
        for real in (None, padding):
            inputs = [x.clone().requires_grad_(not decodes) for x in (q, key, value)]
            out, lse = method.op(*inputs, real, torch.tensor(7), 0.25, 3, **params)
            weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
            grads = () if decodes else torch.autograd.grad(out, inputs, weight)
            for placement in (Shard(1), Shard(0), Replicate()):
                split = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_(not decodes) for x in inputs]
                rows = Shard(0) if placement == Shard(0) else Replicate()
                own_real = None if real is None else distribute_tensor(real, mesh, [rows])
                shard = HeadShard(rank * H_kv // ranks, H_kv // ranks, H_kv) if placement == Shard(1) else None
                seed = seed_of(torch.tensor(7), shard)
                mine, mine_lse = method.op(*split, own_real, seed, 0.25, 3, **method.part(params, shard))
                assert mine.placements == (placement,)
                apart = [_apart(x.full_tensor(), y) for x, y in ((mine, out), (mine_lse, lse))]
                if grads:
                    own_grads = torch.autograd.grad(mine, split, distribute_tensor(weight, mesh, [placement]))
                    apart += [_apart(x.full_tensor(), y) for x, y in zip(own_grads, grads, strict=True)]
                found[title, real is not None, str(placement)] = max(apart)
    return found


def llama(folder: str, **more: Any) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(folder, **more).eval()


def shared_llama(folder: str, ranks: int) -> nn.Module:
    return llama(folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=ranks))


def transformers_models(folder: str, ranks: int) -> dict[str, Any]:
    """Logits of a model that is shared by transformers' plan, beside one process that adds in the same order."""
    found: dict[str, Any] = {}
    for name, options in PREFILLS.items():
        with torch.no_grad():
            one = rewrite_attention(in_parts(llama(folder), ranks, ("o_proj", "down_proj")), strict=True, **options)
            many = rewrite_attention(shared_llama(folder, ranks), strict=True, **options)
            exact = llama(folder)(IDS).logits
            with record_sites() as sites:
                logits = many(IDS).logits
        found[name] = {
            "same": torch.equal(logits, one(IDS).logits),
            "error": ((logits - exact).norm() / exact.norm()).item(),
            "shard": sites[0].spec.shard,
        }
    one = rewrite_attention(in_parts(llama(folder), ranks, ("o_proj", "down_proj")), **PREFILLS["express"])
    many = rewrite_attention(shared_llama(folder, ranks), **PREFILLS["express"])
    for model in (one, many):
        model(IDS, labels=IDS).loss.backward()
    found["gradients"] = {
        name: _distance(_whole(p.grad), dict(one.named_parameters())[name].grad) for name, p in many.named_parameters()
    }
    draws = {"methods": ["santa"], "method_options": {"santa": {"draws": [4, 8, 4, 8, 4, 8, 4, 9]}}, "min_length": 0}
    texts = []
    for model in (in_parts(llama(folder), ranks, ("o_proj", "down_proj")), shared_llama(folder, ranks)):
        rewrite_attention(model, **draws)
        texts.append(model.generate(IDS[:, :64], max_new_tokens=16, do_sample=False, pad_token_id=0))
    found["decoding"] = torch.equal(*texts)
    plan = explain(rewrite_attention(shared_llama(folder, ranks), **PREFILLS["heads"]), IDS).plan
    alone = rewrite_attention(llama(folder), plan=plan, strict=True)
    again = rewrite_attention(shared_llama(folder, ranks), plan=plan, strict=True)
    with torch.no_grad():
        logits, exact = again(IDS).logits, alone(IDS).logits
    found["saved plan"] = [len(plan.sites[0].rows), plan.sites[0].facts["H_kv"], _distance(logits, exact)]
    return found


def cached(folder: str, ranks: int) -> dict[str, Any]:
    """Texts that are continued from an ExpressCache, beside one process; and a cache that each process saved."""
    found: dict[str, Any] = {}
    few = {"budget": 16, "sinks": 4, "recent": 16, "protected": 0}
    rows = [Rows(4, 16, 16), Rows(4, 32), Rows(everything=True), Rows(4, 16, 8)]
    for name, options in (("per head", {"rows": rows}), ("one plan", few)):
        logits = []
        for model in (in_parts(llama(folder), ranks, ("o_proj", "down_proj")), shared_llama(folder, ranks)):
            cache, steps = ExpressCache(model, **options), IDS[:, 250:].split(25, 1)
            with torch.no_grad():
                logits.append(torch.cat([model(x, past_key_values=cache).logits for x in (IDS[:, :250], *steps)], 1))
        exact = llama(folder)(IDS).logits
        found[name] = _distance(logits[1], logits[0]), _distance(logits[0], exact)
    path = f"{folder}/cache-{dist.get_rank()}"
    cache.save(path)
    again = ExpressCache.load(path, model)
    with torch.no_grad():
        found["saved"] = torch.equal(*(model(IDS[:, :20], past_key_values=x).logits for x in (cache, again)))
    try:
        ExpressCache.load(path, llama(folder))
    except ValueError as error:
        found["other heads"] = str(error)
    return found


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return 0.0 if torch.equal(x, y) else (x - y).abs().max().item()


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


class Plain(nn.Module):
    """Attention of nobody's library; ``written``: around a softmax."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, n) for n in (32, 16, 16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, _ = x.shape
        q, k, v = (p(x).view(B, L, -1, 4).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        if self.written:
            out = ((q @ k.mT) * 0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


def plain_modules(ranks: int) -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (ranks,)), {}
    x = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1))
    for written, local in ((False, True), (True, True), (True, False)):
        thin = {"methods": ["thinformer"], "budget": 16}
        options = {**(thin if written else {**FEW, "methods": ["express"]}), "strict": True}
        torch.manual_seed(2)
        one = in_parts(Plain(written), ranks, ("o_proj",))
        torch.manual_seed(2)
        plan = {name: ColwiseParallel(use_local_output=local) for name in ("q_proj", "k_proj", "v_proj")}
        many = parallelize_module(Plain(written), mesh, {**plan, "o_proj": RowwiseParallel()})
        exact = one(x)
        expected = rewrite_attention(one, **options)(x)
        torch._dynamo.reset()
        compiled = torch.compile(many, backend="express", options=options)(x)
        torch._dynamo.reset()
        rewrite_attention(many, **options)
        with record_sites() as sites:
            rewritten = many(x)
        found["written" if written else "sdpa", "local" if local else "DTensor"] = {
            "shard": sites[0].spec.shard,
            "rewritten": _distance(rewritten, expected),
            "compiled": _distance(compiled, expected),
            "error": _distance(expected, exact),
        }
    return found


def declared(rank: int, ranks: int) -> dict[str, Any]:
    """Weights that are no DTensors, so that only the user knows."""
    x = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1))
    options = {**FEW, "methods": ["express"], "strict": True}
    torch.manual_seed(2)
    one = in_parts(Plain(False), ranks, ("o_proj",))
    torch.manual_seed(2)
    mine = Plain(False)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(mine, name)
        layer.weight = nn.Parameter(layer.weight.chunk(ranks)[rank])
        layer.bias = nn.Parameter(layer.bias.chunk(ranks)[rank])
    mine.o_proj.weight = nn.Parameter(mine.o_proj.weight.chunk(ranks, 1)[rank])
    mine.o_proj.bias = None
    parallel.shard_heads(mine, init_device_mesh("cpu", (ranks,)))
    with torch.no_grad():
        expected = rewrite_attention(one, **options)(x)
        out = rewrite_attention(mine, **options)(x)
        dist.all_reduce(out)
        return {"distance": _distance(out + one.o_proj.bias, expected)}


def data_parallel(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Each process trains one sequence by a saved plan: gradients beside those of one process, and of no plan."""

    def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name.removeprefix("module."): x.grad for name, x in model.named_parameters()}

    def llama() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(folder)

    path = f"{folder}/plan-{rank}.json"
    explain(llama(), IDS, **PREFILLS["heads"]).plan.save(path)
    plan = {"plan": path, "strict": True}
    mine = nn.parallel.DistributedDataParallel(rewrite_attention(llama(), **plan))
    with record_sites() as sites:
        found = gradients(mine, IDS[rank : rank + 1])
    one, exact = gradients(rewrite_attention(llama(), **plan), IDS), gradients(llama(), IDS)
    return {
        "rows": [site.rows for site in sites],
        "distances": {name: _distance(x, one[name]) for name, x in found.items()},
        "error": max(_distance(x, exact[name]) for name, x in found.items()),
    }


def refused(folder: str, ranks: int) -> dict[str, str]:
    found = {}
    groups = {"sparse": {"stride": 32, "summary": 2, "groups": 8}}
    model = rewrite_attention(shared_llama(folder, ranks), methods=["sparse"], method_options=groups)
    found["groups"] = explain(model, IDS).sites[0].reason
    return found


def work(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)  # rank 0 does
    dist.barrier()
    return {
        "ops": ops(rank, ranks),
        "transformers": transformers_models(folder, ranks),
        "plain": plain_modules(ranks),
        "declared": declared(rank, ranks),
        "data parallel": data_parallel(rank, ranks, folder),
        "refused": refused(folder, ranks),
        "cached": cached(folder, ranks),
    }


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    METHODS.load()
    sys.exit(run(work))
