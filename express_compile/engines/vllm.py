"""A plugin of vLLM 0.32: whole prompts are prefilled by the plan, all else is vLLM's.

    LLM(model, additional_config={"express_compile": {"methods": ["express"], "budget": 512}})

The options are those of ``rewrite_attention``, as plain data. vLLM's attention backends are subclassed and registered
in their own places by ``register_backend``; without options they do what they did. A prompt that is computed at once,
with nothing of it in the cache, goes to our op, which reads its queries, keys and values as they come. vLLM itself
writes the cache, computes every other request of the batch, and decodes. Nothing of it is patched.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from vllm import __version__ as found
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from ..core.call import Call
from ..core.method import METHODS
from ..core.plan import Plan
from ..core.policy import Policy, Unmet
from ..core.shards import seed_of, shard_at
from ..core.spec import AttentionSpec, Mask, layer_key
from ..planning.choose import Question, answer, check_policy, require, require_matches, unmatched

VERSION = "0.32."
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
_PARTS = "_express_compile_parts"  # an attribute of vLLM's metadata: the tokens of each whole prompt, and the rest
_MAX_PLANS = 1024
_logger = init_logger("vllm.express_compile")  # vLLM shows loggers of its own name


def register() -> None:
    """The entry point in ``vllm.general_plugins``, which vLLM calls in each of its processes."""
    if not found.startswith(VERSION):
        _logger.warning("express-compile's plugin is made for vLLM %sx and is off: this is %s", VERSION, found)
        return
    for name in BACKENDS:
        register_backend(AttentionBackendEnum[name], f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    """vLLM asks for a backend by the path that it is registered with."""
    if name not in BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _backend(name)


@cache
def _backend(name: str) -> type:
    base = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    impl = type(f"{name}_Impl", (_Impl, base.get_impl_cls()), {})
    builder = type(f"{name}_Builder", (_Builder, base.get_builder_cls()), {})
    own = {"get_impl_cls": staticmethod(lambda: impl), "get_builder_cls": staticmethod(lambda: builder)}
    return type(name, (base,), {**own, "__module__": __name__})


def policy_of(config: VllmConfig) -> Policy | None:
    """What ``additional_config`` asks for; None where it does not. Raises as ``rewrite_attention`` for bad options."""
    every = config.additional_config
    options = every.get("express_compile") if isinstance(every, dict) else None
    if options is None:
        return None
    parallel = config.parallel_config
    if (size := parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size) > 1:
        raise ValueError(f"context parallel size {size}: express_compile needs prompts whole on a rank (1)")
    policy = Policy.from_options(options)
    check_policy(policy)
    return policy


class _Impl:
    """One attention layer, before the class of vLLM's that computes what is not planned."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.policy = policy_of(config)
        self.plans: dict[int, Plan] = {}
        if self.policy is not None:
            ranks, total = get_tensor_model_parallel_world_size(), config.model_config.get_total_num_kv_heads()
            if total >= ranks:  # of the model as a whole; layers may differ
                total = self.num_kv_heads * ranks
            self.shard = shard_at(get_tensor_model_parallel_rank(), ranks, total)

    def plan(self: Any, layer: Any, n: int, device: str) -> Plan:
        """The plan for a whole prompt of ``n`` tokens in this layer."""
        path = path_of(layer)
        if n not in self.plans:
            if len(self.plans) >= _MAX_PLANS:
                self.plans.clear()
            unknown = None if self.alibi_slopes is None else "it has ALiBi slopes"
            if (other := layer.kv_sharing_target_layer_name) is not None:
                unknown = f"it has the keys of {other}"
            sizes = 1, self.num_heads, self.num_kv_heads, n, n, self.head_size, layer.head_size_v
            forms: dict[str, Any] = {"softcap": self.logits_soft_cap or None, "sinks": self.sinks is not None}
            forms["shard"] = self.shard
            mask = Mask(causal=unknown is None, unknown=unknown)
            spec = AttentionSpec(*sizes, layer.dtype, device, float(self.scale), mask, **forms)
            self.plans[n] = plan = answer(Question(module=path, spec=spec), self.policy)
            if plan.verdict == "rewritten":
                _logger.info_once("express-compile: whole prompts are prefilled by %s", plan.method)
            elif plan.verdict == "refused":
                _logger.warning_once("express-compile: prompts are prefilled by vLLM: %s", plan.reason)
        require([(path, self.plans[n])], self.policy)
        return self.plans[n]

    def forward(self: Any, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named):
        """``[T, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, Dv]`` of all requests, into ``output`` ``[T, H, Dv]``."""
        by_vllm: Any = super().forward  # type: ignore[misc]
        prompts, rest = getattr(attn_metadata, _PARTS, ((), ()))
        plans = [(x, self.plan(layer, x.stop - x.start, query.device.type)) for x in prompts]
        planned = [(tokens, plan) for tokens, plan in plans if plan.verdict == "rewritten"]
        if len(planned) < len(prompts) or not prompts:  # what this layer has planned is written over
            by_vllm(layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named)
        else:
            for x, metadata in rest:
                by_vllm(layer, query[x], key[x], value[x], kv_cache, metadata, output[x], *scales, **named)
        for tokens, plan in planned:
            q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query, key, value))
            number = self.policy.seed if self.policy.seed is not None else secrets.randbelow(2**31)
            seed = torch.full((), number, dtype=torch.int64, device=query.device)
            method, seed = METHODS[plan.method], seed_of(seed, self.shard)
            options = method.part(plan.params, self.shard)
            call = Call(q, k, v, None, seed, float(self.scale), layer_key(path_of(layer)), options=options)
            output[tokens] = call.run(method.op)[0][0].transpose(0, 1)
        return output


class _Builder:
    """Looks for whole prompts in every batch, before the class of vLLM's that describes it to the layers."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = policy_of(self.vllm_config)
        self.layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase, self.layer_names).values()
        if self.policy is not None:
            self.supports_update_block_table = False  # which knows of one description of a batch only
            every = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase).values()
            require_matches(paths := [path_of(layer) for layer in every], self.policy)
            for words in unmatched(paths, self.policy):
                _logger.warning_once("express-compile: %s matches no attention layer", words)
            if not isinstance(self.kv_cache_spec, FullAttentionSpec):
                _logger.warning_once("express-compile: vLLM prefills layers of %s", type(self.kv_cache_spec).__name__)

    @classmethod
    def get_cudagraph_support(cls: Any, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Batches with prompts stay out of graphs, which would hold vLLM's attention alone."""
        most = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        if policy_of(vllm_config) is None:
            return most
        return min(most, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """What vLLM's builder makes, and the same of every run of requests between whole prompts."""
        common, build = common_attn_metadata, super().build  # type: ignore[misc]
        if self.policy is None or fast_build or common.max_query_len == 1:
            return build(common_prefix_len, common, fast_build)
        if common.seq_lens_cpu_upper_bound is None:
            common = replace(common, seq_lens_cpu_upper_bound=common.seq_lens.cpu())
        starts = common.query_start_loc_cpu.tolist()
        prompts, runs, first = self._prompts(common, starts), [], 0
        for i in [*prompts, common.num_reqs]:
            if starts[i] > starts[first]:
                runs.append(UBatchSlice(slice(first, i), slice(starts[first], starts[i])))
            first = i + 1
        rest = []
        for run, part in zip(runs, split_attn_metadata(runs, common) if prompts else (), strict=False):
            metadata = build(0, part)
            schedule = getattr(metadata, "scheduler_metadata", None)
            if schedule is not None and schedule.is_cuda:  # in a buffer that the next one is written to
                metadata.scheduler_metadata = schedule.clone()
            rest.append((run.token_slice, metadata))
        metadata = build(common_prefix_len, common_attn_metadata, fast_build)
        if prompts:
            setattr(metadata, _PARTS, ([slice(starts[i], starts[i + 1]) for i in prompts], rest))
        return metadata

    def _prompts(self: Any, common: CommonAttentionMetadata, starts: list[int]) -> list[int]:
        """The requests that are whole prompts, and that some layer has a plan for."""
        special = common.mm_req_doc_ranges is not None or common.rswa_prefix_lens is not None
        if special or common.causal is not True or not isinstance(self.kv_cache_spec, FullAttentionSpec):
            return []
        found, lengths = [], common.seq_lens_cpu_upper_bound.tolist()
        for i in range(common.num_reqs):
            new, n = starts[i + 1] - starts[i], lengths[i]
            if new < 2 or (common.is_prefilling is not None and not common.is_prefilling[i]):
                continue
            plans = (layer.impl.plan(layer, n, self.device.type) for layer in self.layers)
            if any(plan.verdict == "rewritten" for plan in plans):
                if new == n:
                    found.append(i)
                    continue
                most = self.vllm_config.scheduler_config.max_num_batched_tokens
                words = (
                    f"vLLM prefills {new} of {n} tokens of a prompt, since the cache has those before them: it cuts "
                )
                words += f"prompts at max_num_batched_tokens={most}, or knew a prefix"
                if self.policy.strict:
                    raise Unmet(f"strict=True: {words}")
                _logger.warning_once("express-compile: %s", words)
        return found


def path_of(layer: Any) -> str:
    """The path that a layer's module has in transformers."""
    return layer.layer_name.removesuffix(".attn")
