"""Two or four processes with a part of every sequence each, beside one that has all; see test_sequence_parallel.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers
from ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from express_compile import METHODS, Rows, record_sites, rewrite_attention, watch
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.engines import distributed as parallel
from express_compile.kernels.express import config_at
from express_compile.kernels.express_chunks import Chunk
from express_compile.kernels.heads import PerHead

N = 512
FEW = {"budget": 8, "sinks": 4, "recent": 16, "protected": 0, "block": 16}
EXPRESS = {"methods": ["express"], "method_options": {"express": FEW}, "strict": True}
ROWS = [Rows(4, 32, 16, 8), Rows(everything=True)]
QUERY_ROWS = [Rows(4, 32, 16, 8), Rows(4, 32), Rows(4, 64, selected=1), Rows(4, 32), Rows(everything=True), Rows(4, 64),
              Rows(4, 32, protected=16), Rows(4, 64, selected=2)]  # fmt: skip
IDS = torch.randint(3, 50, (2, N), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2, heads: int = 8, kv_heads: int = 2, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=2048, initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


class Part:
    """What this process has of the sequence."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.mesh = rank, ranks, init_device_mesh("cpu", (ranks,))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.ranks, 1)[self.rank]

    def call(self, model: nn.Module, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
        mine = self.of(ids)
        positions = parallel.position_ids(mine.shape[1], self.mesh)
        return model(mine, position_ids=positions, use_cache=False, **more).logits

    def sharded(self, how: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
        model = rewrite_attention(llama() if model is None else model, **(options or EXPRESS))
        return parallel.shard_sequence(model, self.mesh, how)


@torch.no_grad()
def all_to_all(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own_heads = {"kv_heads": max(2, part.ranks)}
    policies = {
        "express": EXPRESS, "exact": {"methods": ["exact"]},
        "heads": {"methods": [PerHead(ROWS * (own_heads["kv_heads"] // 2))], "strict": True},
        "query heads": {"methods": [PerHead(QUERY_ROWS)], "strict": True},
        "sparse": {"methods": ["sparse"], "method_options": {"sparse": {"stride": 32, "summary": 8}}, "strict": True},
    }  # fmt: skip
    for name, options in policies.items():
        own = {**own_heads, "layers": 2}
        one = rewrite_attention(llama(**own), **options)(IDS, use_cache=False).logits
        many = part.sharded("all_to_all", llama(**own), **options)
        found[name] = torch.equal(part.call(many), part.of(one))
    eager = llama(attn_implementation="eager", **own_heads)
    one = rewrite_attention(llama(attn_implementation="eager", **own_heads), **EXPRESS)(IDS, use_cache=False).logits
    found["eager"] = torch.equal(part.call(part.sharded("all_to_all", eager)), part.of(one))
    few = {"layers": 1, "heads": 8, "kv_heads": 1}  # of a copy fewer heads are multiplied at once, so they are rounded
    one = rewrite_attention(llama(**few), **EXPRESS)(IDS, use_cache=False).logits
    found["copied"] = distance(part.call(part.sharded("all_to_all", llama(**few))), part.of(one))
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, intermediate_size=48,
        max_position_embeddings=N,
    )  # fmt: skip
    options = {"methods": ["thinformer"], "budget": 16, "strict": True}
    torch.manual_seed(0)
    bert = rewrite_attention(transformers.BertModel(config).eval(), **options)
    one = bert(IDS).last_hidden_state
    many = part.sharded("all_to_all", bert, **options)
    positions = parallel.position_ids(N // part.ranks, part.mesh)
    found["thinformer"] = torch.equal(many(part.of(IDS), position_ids=positions).last_hidden_state, part.of(one))
    return found


def gradients(part: Part, shard_weights: bool) -> dict[str, float]:
    """Distance of the gradients of all parameters from those of one process; also of weights that FSDP2 shards."""
    weight = torch.linspace(-1, 1, 2 * N * 50).view(2, N, 50)
    one, many = rewrite_attention(llama(), **EXPRESS), part.sharded("all_to_all")
    (one(IDS, use_cache=False).logits * weight).sum().backward()
    if shard_weights:
        for layer in many.model.layers:
            fully_shard(layer, mesh=part.mesh)
        fully_shard(many, mesh=part.mesh)
    (part.call(many) * part.of(weight)).sum().backward()
    found, expected = {}, dict(one.named_parameters())
    for name, parameter in many.named_parameters():
        grad = parameter.grad
        if shard_weights:
            grad = grad.full_tensor() * part.ranks  # it takes the mean
        else:
            dist.all_reduce(grad)
        found[name] = distance(grad, expected[name].grad)
    return found


@torch.no_grad()
def coresets(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exact = llama()(IDS, use_cache=False).logits
    one = rewrite_attention(llama(layers=1), **EXPRESS)(IDS, use_cache=False).logits
    many = part.sharded("coresets", llama(layers=1))
    with record_sites() as sites:
        first = part.call(many)
    found["plan"] = [sites[0].method, sites[0].spec.Lk]
    found["first part as one process"] = torch.equal(first, part.of(one)) if part.rank == 0 else None
    changed = IDS.clone()
    changed[:, 3 * N // 4 :] = 3
    before, mine = 3 * N // 4 - part.rank * N // part.ranks, part.call(many, changed)
    found["causal"] = torch.equal(mine[:, : max(before, 0)], first[:, : max(before, 0)])
    found["changed"] = (mine[:, max(before, 0) :] - first[:, max(before, 0) :]).norm().item()
    deep = part.sharded("coresets")
    logits = [torch.empty_like(first) for _ in range(part.ranks)]
    dist.all_gather(logits, part.call(deep))
    found["error"] = distance(torch.cat(logits, 1), exact)
    found["error of one process"] = distance(rewrite_attention(llama(), **EXPRESS)(IDS, use_cache=False).logits, exact)
    large = part.sharded("coresets", methods=["express"], budget=512, strict=True)
    found["short parts are exact"] = distance(part.call(large), part.of(exact))
    left = part.sharded("coresets", methods=["exact"])
    found["left exact"] = distance(part.call(left), part.of(exact))
    return found


def sent(part: Part) -> dict[str, Any]:
    spec = AttentionSpec(2, 8, 2, N, N, 8, 8, torch.float32, "cpu", 8**-0.5, Mask(causal=True))
    config = config_at(N, **METHODS["express"].options(**FEW).pack(), min_length=0)
    found = {"ring": parallel.bytes_of_ring(spec, part.ranks)}
    for how in parallel.HOW:
        model = part.sharded(how, llama(layers=1))
        with torch.no_grad():
            part.call(model)
        found[how] = next(iter(parallel.sequence_of(model))).sent
    halo = FEW["recent"] * (part.rank + 1 < part.ranks)
    found["formulas"] = [
        parallel.bytes_of_all_to_all(spec, part.ranks),
        parallel.bytes_of_coresets(spec, part.ranks, Chunk(config, N // part.ranks, part.rank, part.ranks).rows, halo),
    ]
    return found


def refused(part: Part) -> dict[str, str]:
    def why(call: Any) -> str:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    many, few = part.sharded("all_to_all"), part.sharded("coresets")
    mask = torch.ones(2, N // part.ranks, dtype=torch.long)
    mask[0, :5] = 0
    packed = torch.arange(N // part.ranks).remainder(7)[None]
    uneven = IDS[:, : N // part.ranks - part.rank]
    window = transformers.MistralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, sliding_window=N - 100,
    )  # fmt: skip
    windowed = part.sharded("all_to_all", transformers.MistralForCausalLM(window).eval())
    heads, odd = (
        part.sharded("coresets", methods=[PerHead(ROWS)]),
        part.sharded("all_to_all", llama(heads=1, kv_heads=1)),
    )
    copied = part.sharded("all_to_all", llama(layers=1, kv_heads=1), methods=[PerHead(QUERY_ROWS)], strict=True)
    watched = part.sharded("coresets")
    watching = watch(watched, fraction=1.0)
    found = {
        "gradient": why(lambda: part.call(few)),
        "padding": why(lambda: part.call(many, attention_mask=mask)),
        "packed": why(lambda: many(part.of(IDS), position_ids=packed, use_cache=False)),
        "cache": why(lambda: many.generate(part.of(IDS), max_new_tokens=2, pad_token_id=0)),
        "uneven": why(lambda: many(uneven, use_cache=False)),
        "window": why(lambda: part.call(windowed)),
        "weights": why(lambda: part.call(many, output_attentions=True)),
    }
    with torch.no_grad():
        found |= {
            "heads": why(lambda: part.call(heads)),
            "odd": why(lambda: part.call(odd)),
            "query heads": why(lambda: part.call(copied)),
            "watched": why(lambda: part.call(watched)),
        }
    del watching
    found |= {
        "how": why(lambda: part.sharded("ring")),
        "not rewritten": why(lambda: parallel.shard_sequence(llama(), part.mesh)),
        "mesh": why(lambda: parallel.shard_sequence(few, init_device_mesh("cpu", (1, part.ranks)))),
    }
    plain = rewrite_attention(nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(), methods=["thinformer"])
    return found | {"captured": why(lambda: parallel.shard_sequence(plain, part.mesh))}


def work(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    part = Part(rank, ranks)
    if ranks > 2:
        return {"all_to_all": all_to_all(part), "coresets": coresets(part), "sent": sent(part)}
    return {
        "all_to_all": all_to_all(part),
        "gradients": gradients(part, shard_weights=False),
        "FSDP": gradients(part, shard_weights=True),
        "coresets": coresets(part),
        "sent": sent(part),
        "refused": refused(part),
    }


if __name__ == "__main__":
    METHODS.load()
    sys.exit(run(work))
