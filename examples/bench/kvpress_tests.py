"""Tests beside NVIDIA's kvpress, in an environment of its own (``make kvpress-test``), and their outcome as text.

    python examples/bench/kvpress_tests.py --out examples/bench/results/kvpress-tests.txt

kvpress compresses what a prompt leaves in the cache, by hooks on attention modules. Here it does so to prompts that a
rewritten model prefills: rewritten to exact attention nothing changes, and with an approximation a press keeps rows of
what that approximation computed, as many as it promises. In float32, with a small random Llama and SmolLM2-135M.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning starve what else runs here
os.environ["TQDM_DISABLE"] = "1"  # the bars of transformers' loading

import kvpress
import pytest
import torch
import transformers
from models import load_smollm2, long_texts
from outcomes import run_tests
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from express_compile import ExpressCache, Rows, explain, record_sites, restore_attention, rewrite_attention
from express_compile.kernels.heads import PerHead
from express_compile.routes.transformers.attention import attend

ROOT = Path(__file__).resolve().parents[2]
N, NEW, LAYERS = 300, 5, 4
ROUNDING = {"rtol": 0, "atol": 1e-5}
EXACT = {"methods": ["exact"]}
EXPRESS = {"methods": ["express"], "budget": 16, "sinks": 4, "window": 16, "protected": 0, "min_length": 64}
# a window, and blocks that queries select; its last queries see everything
HEADS = {"methods": [PerHead([Rows(sinks=4, recent=32), Rows(sinks=4, recent=16, selected=1)], block=32, last=8)]}
SNAP, STREAMING, PYRAMID = (
    lambda: kvpress.SnapKVPress(0.5, window_size=32),
    lambda: kvpress.StreamingLLMPress(0.5),
    lambda: kvpress.PyramidKVPress(0.5, window_size=16),
)
MAIN = {"SnapKV": SNAP, "StreamingLLM": STREAMING, "PyramidKV": PYRAMID}
OTHERS = {
    "Knorm": lambda: kvpress.KnormPress(0.5),
    "KeyDiff": lambda: kvpress.KeyDiffPress(0.5),
    "TOVA": lambda: kvpress.TOVAPress(0.5),
    "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(0.5),
    "ThinK": lambda: kvpress.ThinKPress(0.5, window_size=32),
    "ChunkKV": lambda: kvpress.ChunkKVPress(SNAP(), chunk_length=20),
    "KeyRerotation": lambda: kvpress.KeyRerotationPress(STREAMING()),
    "Decoding": lambda: kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=2, target_size=100),
    "DMS": lambda: kvpress.DMSPress(kvpress.KnormPress(), threshold=-3.0),
    "AdaKV": lambda: kvpress.AdaKVPress(SNAP()),
}
Run = tuple[torch.Tensor, torch.Tensor, Any]
"""New tokens ``[B, NEW]``, their logits ``[NEW, B, V]`` and the cache."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield


def llama(attention: str = "sdpa") -> Any:
    """A small Llama whose attention has preferences."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=LAYERS, attn_implementation=attention, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model


PROMPT = torch.randint(1, 128, (1, N), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(PROMPT)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts and their mask; the second has 100 tokens less, and padding in their place."""
    ids = torch.randint(1, 128, (2, N), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, :100] = mask[1, :100] = 0
    return ids, mask


def generated(
    model: Any, press: Any, ids: torch.Tensor = PROMPT, mask: torch.Tensor = ONES, new: int = NEW, **more: Any
) -> Run:
    """What ``generate()`` gives under a press."""
    cache, how = DynamicCache(), {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    how |= {"max_new_tokens": new, "min_new_tokens": new, "output_logits": True}
    with torch.no_grad(), press(model):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **how, **more)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits), cache


def prefilled(model: Any, press: Any = None, run: Callable[..., Any] | None = None) -> Any:
    """The cache that the prompt leaves; ``run`` in place of the model, for one that is compiled."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), nullcontext() if press is None else press(model):
        (model if run is None else run)(PROMPT, past_key_values=cache)
    return cache


def tensors(cache: Any) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def sizes(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def assert_same(a: Run, b: Run, tolerance: float = 0.0) -> None:
    assert torch.equal(a[0], b[0])
    for x, y in zip([a[1], *tensors(a[2])], [b[1], *tensors(b[2])], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def off(a: Run, b: Run) -> float:
    """By how much the logits of the first token differ."""
    return float((a[1][0] - b[1][0]).abs().max())


# ---- rewritten to exact attention, nothing changes ----------------------------------------------------------------


@pytest.mark.parametrize("press", [*MAIN, *OTHERS])
def test_exact_rewriting_is_bitwise_the_untouched_model_under_a_press(press: str) -> None:
    make, model = (MAIN | OTHERS)[press], llama()
    before = generated(model, make())
    rewrite_attention(model, **EXACT)
    assert_same(generated(model, make()), before)
    assert_same(generated(restore_attention(model), make()), before)


@pytest.mark.parametrize("press", [SNAP, STREAMING], ids=["SnapKV", "StreamingLLM"])
def test_in_place_of_eager_attention_sdpa_gives_the_same_up_to_rounding(press: Callable[[], Any]) -> None:
    """PyramidKV cannot go on with eager attention: its mask has the size of the first layer."""
    model = llama("eager")
    before = generated(model, press())
    rewrite_attention(model, **EXACT)
    assert_same(generated(model, press()), before, 1e-5)


def test_a_padded_batch_gives_the_same_up_to_rounding() -> None:
    """Steps with a padding run our own kernel."""
    model = llama()
    before = generated(model, SNAP(), *padded())
    rewrite_attention(model, **EXACT)
    assert_same(generated(model, SNAP(), *padded()), before, 1e-5)


@pytest.mark.parametrize("press", [SNAP, STREAMING], ids=["SnapKV", "StreamingLLM"])
def test_a_question_behind_a_compressed_prompt_is_bitwise_the_same(press: Callable[[], Any]) -> None:
    model = llama()
    before = answer(model, press())
    rewrite_attention(model, **EXACT)
    assert torch.equal(answer(model, press()), before)


def answer(model: Any, press: Any) -> torch.Tensor:
    """The logits of a question of 20 tokens behind the compressed prompt, as kvpress' pipeline asks it."""
    cache, question = prefilled(model, press), torch.arange(1, 21)[None]
    with torch.no_grad():
        return model(question, past_key_values=cache, position_ids=torch.arange(N, N + 20)[None]).logits


def test_layers_of_different_length_take_no_question_and_no_padding_with_and_without_us() -> None:
    """transformers makes one mask for all, of the size of the first."""
    model = llama()
    for options in (None, EXACT, EXPRESS):
        if options is not None:
            rewrite_attention(model, **options)
        with pytest.raises(RuntimeError, match="must match the size"):
            answer(model, PYRAMID())
        with pytest.raises(RuntimeError, match="must match the size"):
            generated(model, PYRAMID(), *padded())


def test_a_press_that_takes_attention_weights_has_them_where_the_call_asks_for_them() -> None:
    model, press = llama("eager"), kvpress.ObservedAttentionPress(0.5)
    before = generated(model, press, output_attentions=True)
    rewrite_attention(model, **EXPRESS)
    with record_sites() as sites:
        assert_same(generated(model, press, output_attentions=True), before)
    assert "the call asks for attention weights" in sites[0].reason
    with pytest.raises(AssertionError, match="eager"):  # of kvpress, which misses them
        generated(model, press)


# ---- prefilled by an approximation --------------------------------------------------------------------------------


def promised(name: str) -> list[int]:
    """Rows of every layer."""
    if name != "PyramidKV":
        return [N // 2] * LAYERS
    rows = torch.linspace(N // 2 * 2 - 16, 16, LAYERS)  # from all but the window down to what keeps the mean
    return [round(float(x)) for x in rows]


@pytest.mark.parametrize("options", [EXPRESS, HEADS], ids=["Express", "a plan per head"])
@pytest.mark.parametrize("name", MAIN)
def test_a_press_keeps_as_many_rows_as_it_promises_of_what_the_rewritten_model_computed(
    name: str, options: dict[str, Any]
) -> None:
    model = llama()
    exact = generated(model, MAIN[name]())
    rewrite_attention(model, **options)
    full = prefilled(model)
    with record_sites() as sites:
        cache = prefilled(model, MAIN[name]())
    assert [(site.method, site.verdict) for site in sites] == [(options_method(options), "rewritten")] * LAYERS
    assert sizes(full) == [N] * LAYERS and sizes(cache) == promised(name)
    for held, whole in zip(cache.layers, full.layers, strict=True):
        is_row = (held.keys[:, :, :, None] == whole.keys[:, :, None]).all(-1)
        assert is_row.sum(-1).eq(1).all(), "every row is one of the prompt"
        rows = is_row.int().argmax(-1)
        assert torch.equal(held.values, whole.values.gather(2, rows[..., None].expand_as(held.values)))
        assert rows.sort(-1).values.diff().gt(0).all(), "no row is held twice"
        kept = {"StreamingLLM": [*range(4), *range(N - N // 2 + 4, N)], "SnapKV": range(N - 32, N), "PyramidKV": []}
        assert all(set(kept[name]) <= set(head) for head in rows[0].tolist())
    after = generated(model, MAIN[name]())
    assert sizes(after[2]) == [rows + NEW - 1 for rows in promised(name)]
    assert off(after, exact) > 1e-2, "the prefill was no exact one"


def options_method(options: dict[str, Any]) -> str:
    (method,) = options["methods"]
    return method if isinstance(method, str) else "heads"


# ---- presses that hide keys of some heads -------------------------------------------------------------------------


def test_keys_that_a_press_hides_from_some_heads_stay_hidden_in_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaKV leaves them in the cache, and kvpress patches transformers' attention functions at its import."""
    model, press = llama(), OTHERS["AdaKV"]
    before = generated(model, press(), *padded())
    rewrite_attention(model, **EXACT)
    tokens, logits, cache = generated(model, press(), *padded())
    assert torch.equal(tokens, before[0]) and sizes(cache) == [N + NEW - 1] * LAYERS
    torch.testing.assert_close(logits, before[1], **ROUNDING)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "express_compile", attend)  # without the patch
    unpatched = generated(model, press(), *padded())
    assert float((unpatched[1] - before[1]).abs().max()) > 1e-2


def test_so_they_do_where_kvpress_is_imported_after_our_attention_is_registered() -> None:
    argv = [__file__, "-k", "test_keys_that_a_press_hides"]
    code = f"""
import runpy, sys
import express_compile.routes.transformers
assert "kvpress" not in sys.modules
sys.argv = {argv}
sys.path.insert(0, {str(Path(__file__).parent)!r})
runpy.run_path({__file__!r}, run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0 and "1 passed, 0 failed or skipped" in ran.stdout, ran.stdout[-3000:] + ran.stderr


def test_what_was_hidden_of_one_prompt_is_seen_of_the_next() -> None:
    model = rewrite_attention(llama(), **EXPRESS)
    before = generated(model, lambda model: nullcontext())
    generated(model, OTHERS["AdaKV"]())
    assert_same(generated(model, lambda model: nullcontext()), before)


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAIN)
def test_a_rewritten_model_under_torch_compile_leaves_the_same_cache(name: str) -> None:
    model = rewrite_attention(llama(), **EXPRESS)
    eager = prefilled(model, MAIN[name]())
    compiled = prefilled(model, MAIN[name](), torch.compile(model, backend="eager"))
    assert sizes(compiled) == promised(name) and all(map(torch.equal, tensors(compiled), tensors(eager)))


def test_the_backend_leaves_attention_exact_under_a_press_and_says_why() -> None:
    """A press parts the graph in every layer, and the mask comes into the parts as a tensor."""
    model, press = llama(), STREAMING()
    untouched = prefilled(model, press)
    found = prefilled(model, press, torch.compile(model, backend="express", options=EXPRESS))
    for x, y in zip(tensors(found), tensors(untouched), strict=True):
        torch.testing.assert_close(x, y, **ROUNDING)
    with torch.no_grad(), press(model):
        inputs = {"input_ids": PROMPT, "past_key_values": DynamicCache(config=model.config)}
        report = explain(model, example_kwargs=inputs, **EXPRESS)
    assert [site.verdict for site in report.sites] == ["refused"] * LAYERS
    assert all("its mask is not proven" in site.reason for site in report.sites)
    torch.compiler.reset()
    with pytest.raises(Exception, match="its mask is not proven"):
        prefilled(model, press, torch.compile(model, backend="express", options={**EXPRESS, "strict": True}))


@pytest.mark.parametrize("backend", ["eager", "express"])
def test_a_model_that_was_compiled_without_a_press_runs_without_it_whatever_the_backend(backend: str) -> None:
    """Dynamo does not look whether hooks were added (``skip_nnmodule_hook_guards``), until it is reset."""
    model = llama()
    compiled = torch.compile(model, backend=backend)
    assert sizes(prefilled(model, None, compiled)) == [N] * LAYERS
    assert sizes(prefilled(model, STREAMING(), compiled)) == [N] * LAYERS
    torch.compiler.reset()
    assert sizes(prefilled(model, STREAMING(), compiled)) == [N // 2] * LAYERS


# ---- what there is not --------------------------------------------------------------------------------------------


def test_an_express_cache_says_that_it_needs_a_newer_transformers() -> None:
    with pytest.raises(RuntimeError, match=rf"needs transformers 5.17 or newer: this is {transformers.__version__}"):
        ExpressCache(llama(), budget=16)


# ---- a model that writes text -------------------------------------------------------------------------------------


def test_smollm2_goes_on_with_genesis_from_a_compressed_prompt() -> None:
    model, tokenizer = load_smollm2("cpu", torch.float32)
    n, layers = 768, model.config.num_hidden_layers
    ids = tokenizer(long_texts()["genesis"], return_tensors="pt")["input_ids"][:, :n]
    press, how = kvpress.SnapKVPress(0.75), {"ids": ids, "mask": torch.ones_like(ids), "new": 8}
    exact = generated(model, press, **how)
    rewrite_attention(model, **EXACT)
    assert_same(generated(model, press, **how), exact)
    rewrite_attention(model, plan=str(ROOT / "examples/plans/smollm2-135m.json"))
    with record_sites() as sites:
        found = generated(model, press, **how)
    assert [site.method for site in sites if site.verdict == "rewritten"] == ["heads"] * layers
    assert sizes(found[2]) == [n // 4 + 7] * layers
    assert torch.equal(found[0][:, :1], exact[0][:, :1]) and 1e-3 < off(found, exact) < 5


def test_the_snippet_of_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/guide/kvpress.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, {})  # noqa: S102
    assert capsys.readouterr().out == "read 1024 tokens, holds 256 of them\nwrote 20 tokens\n"


if __name__ == "__main__":
    sys.exit(run_tests(__file__, __doc__, "kvpress-test", ("kvpress", "torch", "transformers")))
