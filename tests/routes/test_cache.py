"""ExpressCache through generate(): bit for bit exact while nothing is thinned, the rows of the plan afterwards."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from express_compile import (
    ExpressCache,
    Rows,
    SavedPlan,
    is_rewritten,
    record_sites,
    restore_attention,
    rewrite_attention,
    watch,
)
from express_compile.kernels.heads import PerHead
from express_compile.kernels.held import Held
from express_compile.routes.transformers.layers import ExpressLayer, Weighted

PATHS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
MIXED = {PATHS[0]: [Rows(2, 14), Rows(2, 14, 8, 10)], PATHS[1]: [Rows(2, 14, selected=1), Rows(everything=True)]}
BLOCKS = {PATHS[0]: [Rows(2, 14), Rows(2, 14, 8)], PATHS[1]: [Rows(2, 30, 8), Rows(2, 14, 16)]}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # log-weights and the angles of positions are float32


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **options,
    })  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(n: int, B: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (B, n), generator=torch.Generator().manual_seed(seed))


def own(rows: Any) -> PerHead:
    return PerHead(rows, block=16)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    return model(tokens, past_key_values=cache, use_cache=cache is not None, **more).logits


def held_tokens(layer: ExpressLayer) -> list[list[int]]:
    assert layer.held is not None
    return [
        sorted(part.token[0, g][part.log_weight[0, g] > -torch.inf].tolist())
        for part in layer.held.parts
        for g in range(part.token.shape[1])
    ]


# ---- while nothing has to be thinned ---------------------------------------------------------------------------------

PADDED = torch.ones(2, 40, dtype=torch.long)
PADDED[0, :11] = 0
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "smallest length": {"min_new_tokens": 25, "eos_token_id": list(range(3, 20))},
    "end of sequence": {"eos_token_id": list(range(3, 20))},
    "padded on the left": {"attention_mask": PADDED},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "assistant": {"assistant_model": ...},
    "prefill in chunks": {"prefill_chunk_size": 16},
    "embeddings": {"inputs_embeds": ...},
    "scores": {"output_scores": True, "output_logits": True, "output_hidden_states": True},
    "stop strings of tokens": {"bad_words_ids": [[5], [7]], "suppress_tokens": [9], "forced_eos_token_id": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_while_nothing_is_thinned_generate_gives_bit_for_bit_what_it_gives_with_a_dynamic_cache(kind: str) -> None:
    options, results = dict(KINDS[kind]), []
    prompt = ids(40, 1 if kind in ("prompt lookup", "assistant") else 2)
    for is_express in (False, True):
        model = llama()
        given: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **options}
        if kind == "assistant":
            given["assistant_model"] = llama(1, hidden_size=16)
        if kind == "embeddings":
            given["inputs_embeds"] = model.model.embed_tokens(given.pop("input_ids"))
        cache = ExpressCache(model, budget=32, sinks=2, recent=20) if is_express else DynamicCache(config=model.config)
        torch.manual_seed(5)
        given = {"do_sample": False, "max_new_tokens": 30, "return_dict_in_generate": True, **given}
        results.append(model.generate(past_key_values=cache, **given))
    exact, ours = results
    assert torch.equal(exact.sequences, ours.sequences)
    for name in ("scores", "logits"):
        for x, y in zip(getattr(exact, name) or (), getattr(ours, name) or (), strict=True):
            assert torch.equal(x, y)
    for x, y in zip(exact.past_key_values.layers, ours.past_key_values.layers, strict=True):
        assert isinstance(y, ExpressLayer) and y.held is None
        assert torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)


def test_a_compiled_model_generates_with_a_cache_what_it_generates_as_it_is() -> None:
    prompt, outs = ids(40, 2), []
    for compiled in (False, True):
        torch.compiler.reset()
        model = llama()
        cache = ExpressCache(model, rows=MIXED)
        if compiled:
            model.compile(backend="eager")
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False, max_new_tokens=30,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        outs.append((out.sequences, torch.stack(out.logits), cache.rows_held))
    (one, logits_one, rows), (other, logits_other, others) = outs
    assert torch.equal(one, other) and rows == others < 70, "rows were dropped while it generated"
    assert torch.equal(logits_one, logits_other)


@pytest.mark.parametrize("backend", ["eager", "express"])
def test_a_compiled_module_is_the_model_in_it(backend: str) -> None:
    prompt, outs = ids(120), []
    for compiled in (False, True):
        torch.compiler.reset()
        model = llama()
        given = torch.compile(model, backend=backend) if compiled else model
        cache = ExpressCache(given, rows=MIXED)
        outs.append(given.generate(prompt, past_key_values=cache, do_sample=False, max_new_tokens=9))
        assert [layer.place.path for layer in cache.express_layers] == PATHS and cache.rows_held < 120
    assert torch.equal(*outs)


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_under_autocast_rows_are_those_of_the_same_tokens_and_attend_in_float32(kind: str) -> None:
    """Rotated keys are float32 there, and values bfloat16."""
    model = llama()
    if kind == "learned":
        torch.manual_seed(0)
        size = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).eval()
    cache, whole = ExpressCache(model, rows=Rows(2, 14, 8)), ExpressCache(model, rows=Rows(2, 200))
    with torch.autocast("cpu", torch.bfloat16):
        for one in (cache, whole):
            logits(model, ids(120), one)
        exact = logits(model, ids(121), DynamicCache())
        assert torch.equal(logits(model, ids(121)[:, 120:], whole), exact[:, 120:])
        held = cache.express_layers[0].held
        assert held is not None and cache.rows_held < 60
        key, value = held.parts[0].key, held.parts[0].value
        assert key.dtype == value.dtype == (torch.float32 if kind == "rotary" else torch.bfloat16)
        new = torch.randn(3, 1, 4, 1, 8, generator=torch.Generator().manual_seed(0)).to(key.dtype)
        query, own, own_value = new[0], *new[1:, :, : key.shape[1]]
        fork = copy.deepcopy(held)
        fork.settle()
        out = fork.extend(query, own, own_value)
    held.settle()
    assert torch.equal(out, held.extend(query, own, own_value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_do_not_depend_on_the_default_dtype_of_torch(dtype: torch.dtype) -> None:
    model, prompt = llama(), ids(300)
    expected, found = (ExpressCache(model, rows=MIXED) for _ in range(2))
    wanted = [logits(model, part, expected) for part in prompt.split([290, 9, 1], 1)]
    torch.set_default_dtype(dtype)
    try:
        for part, one in zip(prompt.split([290, 9, 1], 1), wanted, strict=True):
            assert torch.equal(logits(model, part, found), one)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_that_is_not_rewritten_is_by_its_cache_and_computes_what_it_did() -> None:
    model, prompt = llama(), ids(60)
    before = logits(model, prompt)
    ExpressCache(model, budget=8)
    assert is_rewritten(model) and torch.equal(logits(model, prompt), before)
    restore_attention(model)
    assert torch.equal(logits(model, prompt), before)


def test_heads_that_hold_everything_stay_a_dynamic_cache() -> None:
    model = llama()
    cache = ExpressCache(model, rows=Rows(everything=True))
    exact = model.generate(ids(300), max_new_tokens=20, do_sample=False, past_key_values=DynamicCache())
    assert torch.equal(exact, model.generate(ids(300), max_new_tokens=20, do_sample=False, past_key_values=cache))
    assert all(layer.held is None for layer in cache.express_layers)


# ---- the rows of the plan --------------------------------------------------------------------------------------------


def test_a_prompt_attends_by_the_plan_as_a_model_that_is_rewritten_by_it() -> None:
    prompt = ids(300, 2)
    expected = logits(rewrite_attention(llama(), methods=[own(MIXED)]), prompt)
    model = llama()
    cache = ExpressCache(model, rows=MIXED, block=16)
    assert torch.equal(logits(model, prompt, cache), expected)
    assert (expected - logits(llama(), prompt)).norm() > 0.05 * expected.norm()


def test_decoding_continues_the_prompt_by_the_same_rows() -> None:
    """A token that begins a block of queries sees the same rows in a prompt and when it is generated."""
    prompt = ids(337)
    expected = logits(rewrite_attention(llama().double(), methods=[own(BLOCKS)]), prompt)
    model = llama().double()
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    logits(model, prompt[:, :336], cache)
    step = logits(model, prompt[:, 336:], cache)
    torch.testing.assert_close(step[:, 0], expected[:, 336], **CLOSE)
    assert cache.get_seq_length() == 337


@pytest.mark.parametrize("n", [12, 120])
def test_a_full_cache_is_taken_as_if_its_tokens_had_been_read(n: int) -> None:
    """In a model of one layer keys and values do not depend on how the prompt attends."""
    model, tokens, rows = llama(num_hidden_layers=1), ids(n + 3, 2), {PATHS[0]: [Rows(2, 14, 8, 10), Rows(2, 14)]}
    read, taken, full = ExpressCache(model, rows=rows), ExpressCache(model, rows=rows), DynamicCache()
    logits(model, tokens[:, :n], read)
    logits(model, tokens[:, :n], full)
    taken.take(full)
    assert taken.get_seq_length() == full.get_seq_length() == n and taken.rows_held == read.rows_held
    for i in range(n, n + 3):
        assert torch.equal(logits(model, tokens[:, i : i + 1], read), logits(model, tokens[:, i : i + 1], taken))


def full_of(model: Any, tokens: torch.Tensor, n: int, rows: Any) -> ExpressCache:
    """A cache that has taken so many tokens of a full one."""
    full, cache = DynamicCache(), ExpressCache(model, rows=rows)
    logits(model, tokens[:, :n], full)
    cache.take(full)
    return cache


def test_a_prompt_that_was_read_exactly_loses_nothing_before_it_is_taken() -> None:
    """Beside one that attends by the plan, whose later layers see other keys."""
    model, tokens = llama(), ids(120)
    exact = DynamicCache()
    logits(model, tokens, exact)
    by_plan, taken = ExpressCache(model, rows=BLOCKS), full_of(model, tokens, 120, BLOCKS)
    logits(model, tokens, by_plan)
    for name, cache in (("by the plan", by_plan), ("taken", taken)):
        part = cache.express_layers[1].held.parts[0]
        there = part.log_weight[0, 0] > -torch.inf
        whole = exact.layers[1].keys[0, part.random.heads[0], part.token[0, 0, there].long()]
        assert torch.equal(part.key[0, 0, there], whole) is (name == "taken")


def test_what_cannot_be_taken_says_so() -> None:
    model, tokens = llama(), ids(40)
    full, short = DynamicCache(), DynamicCache()
    logits(model, tokens, full)
    short.update(full.layers[0].keys, full.layers[0].values, 0)
    cache = ExpressCache(model, rows=Rows(2, 14))
    with pytest.raises(ValueError, match="must be a DynamicCache, the same tokens in 2 layers; it has 1 of 40 tokens"):
        cache.take(short)
    with pytest.raises(ValueError, match="it has 0 of 0 tokens"):
        cache.take(DynamicCache())
    cache.take(full)
    with pytest.raises(RuntimeError, match="has 40 tokens; reset\\(\\) empties it"):
        cache.take(full)
    cache.reset()
    cache.take(full)
    assert cache.get_seq_length() == 40


def test_turns_of_a_chat_give_what_one_prompt_gives() -> None:
    prompt = ids(16 * 40)
    expected = logits(rewrite_attention(llama().double(), methods=[own(BLOCKS)]), prompt)
    model = llama().double()
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    turns = [logits(model, turn, cache) for turn in prompt.split([48, 16 * 12, 16 * 20, 80], 1)]
    torch.testing.assert_close(torch.cat(turns, 1), expected, **CLOSE)


def test_a_prompt_that_begins_whole_and_ends_thinned_comes_out_as_in_one_piece() -> None:
    prompt = ids(300)
    expected = logits(rewrite_attention(llama().double(), methods=[own(BLOCKS)]), prompt)
    for first in (16, 13, 1):  # fewer than the 16 that the smallest head holds whole
        model = llama().double()
        cache = ExpressCache(model, rows=BLOCKS, block=16)
        parts = [logits(model, part, cache) for part in prompt.split([first, 300 - first], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


def test_a_padded_batch_gives_what_its_sequences_give_alone() -> None:
    model, prompt = llama().double(), ids(200, 3)
    mask = torch.ones_like(prompt)
    mask[0, :61], mask[2, :150] = 0, 0
    given = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    cache = ExpressCache(model, rows=MIXED, block=16)
    batch = model.generate(prompt, attention_mask=mask, past_key_values=cache, **given)
    for b, pad in enumerate((61, 0, 150)):
        alone = model.generate(
            prompt[b : b + 1, pad:], past_key_values=ExpressCache(model, rows=MIXED, block=16), **given
        )
        assert torch.equal(batch.sequences[b, 200:], alone.sequences[0, 200 - pad :])
        for x, y in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(x[b], y[0], **CLOSE)
    assert [layer.held.length for layer in cache.express_layers] == [[198, 259, 109]] * 2


SELECTING = {PATHS[0]: [Rows(2, 14, selected=1), Rows(2, 70, selected=2)], PATHS[1]: [Rows(0, 0, selected=2)]}


def test_steps_of_heads_with_selected_blocks_read_few_pages_and_follow_padding_crop_beams_and_reset() -> None:
    model, prompt = llama().double(), ids(450, 2)
    mask = torch.ones_like(prompt)
    mask[0, :101] = 0
    step = {"attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    cache = ExpressCache(model, rows=SELECTING, block=16)

    def state(tokens: torch.Tensor, cache: ExpressCache, **more: Any) -> ExpressCache:
        logits(model, tokens, cache, **more)
        return cache

    state(prompt, cache, attention_mask=mask)
    tail = ids(1, 2, seed=1)
    expected = logits(model, tail, copy.deepcopy(cache), **step)
    everything = copy.deepcopy(cache)
    for layer in everything.express_layers:
        for part in layer.held.parts:
            part.group = replace(part.group, rows=Rows(everything=True))
    assert (expected - logits(model, tail, everything, **step)).norm() > 0.01 * expected.norm()
    for b, pad in enumerate((101, 0)):
        alone = state(prompt[b : b + 1, pad:], ExpressCache(model, rows=SELECTING, block=16))
        torch.testing.assert_close(logits(model, tail[b : b + 1], alone)[0], expected[b], **CLOSE)
    for count in (1, 5, 17):  # of other tokens, taken back
        state(ids(count, 2, seed=2), cache, attention_mask=torch.nn.functional.pad(mask, (0, count), value=1))
        cache.crop(-count)
        torch.testing.assert_close(logits(model, tail, copy.deepcopy(cache), **step), expected)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = logits(model, tail.flip(0), cache, attention_mask=step["attention_mask"].flip(0))
    torch.testing.assert_close(swapped, expected.flip(0))
    cache.reset()
    assert torch.equal(logits(model, tail, state(prompt, cache, attention_mask=mask), **step), expected)


def test_tokens_before_padding_are_not_taken_back() -> None:
    model = llama()
    cache = ExpressCache(model, rows=Rows(2, 100))
    logits(model, ids(110, 2), cache)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, 110:135] = 0
    logits(model, ids(40, 2), cache, attention_mask=mask)
    with pytest.raises(ValueError, match="before the last 15 tokens there is padding"):
        cache.crop(-16)
    cache.crop(-15)
    assert [layer.held.length for layer in cache.express_layers] == [[110, 135]] * 2


def test_beams_and_batches_follow_their_sequences() -> None:
    model = llama().double()
    given = {"max_new_tokens": 40, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    prompts = ids(150, 2)
    batch = model.generate(prompts, past_key_values=ExpressCache(model, rows=MIXED, block=16), **given)
    for b in range(2):
        alone = model.generate(prompts[b : b + 1], past_key_values=ExpressCache(model, rows=MIXED, block=16), **given)
        n = alone.shape[1]
        assert torch.equal(batch[2 * b : 2 * b + 2, :n], alone)


def test_repeated_and_selected_sequences_go_on_as_they_would_alone() -> None:
    model, prompt = llama().double(), ids(121, 3)
    cache = ExpressCache(model, rows=MIXED, block=16)
    logits(model, prompt[:, :120], cache)
    whole = logits(model, prompt[:, 120:], copy.deepcopy(cache))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(logits(model, prompt[order, 120:], cache), whole[order])


def test_assisted_decoding_leaves_the_state_of_single_steps() -> None:
    model = llama()
    model.generation_config.eos_token_id = None
    prompt = ids(40).repeat(1, 4)
    cache = ExpressCache(model, rows=MIXED, block=16)
    out = model.generate(prompt, max_new_tokens=80, do_sample=False, prompt_lookup_num_tokens=6, past_key_values=cache)
    n = cache.get_seq_length()
    assert out.shape[1] == 240 and n >= 239
    single = ExpressCache(model, rows=MIXED, block=16)
    logits(model, out[:, :160], single)
    for i in range(160, n):
        logits(model, out[:, i : i + 1], single)
    # the tokens of the last step, of which some were taken back, leave with the next one
    for layer in (cache.layers[0], single.layers[0]):  # keys of the first layer do not depend on attention
        layer.held.settle()
    assert held_tokens(cache.layers[0]) == held_tokens(single.layers[0])


def test_crop_takes_back_what_is_held_as_it_is_of_all_layers_or_of_none() -> None:
    model, tokens = llama().double(), ids(200)
    cache = ExpressCache(model, rows={PATHS[1]: Rows(4, 36, 8)}, block=16)
    logits(model, tokens[:, :150], cache)
    with pytest.raises(
        ValueError, match=re.escape(f"crop(-37): only the last 36 tokens are held as they are in '{PATHS[1]}'")
    ):
        cache.crop(-37)
    assert [layer.get_seq_length() for layer in cache.layers] == [150, 150]
    with pytest.raises(ValueError, match=re.escape("crop(100): must be minus the number of tokens")):
        cache.crop(100)
    cache.crop(-20)
    assert cache.get_seq_length() == 130
    logits(model, tokens[:, 130:151], cache)
    last = logits(model, tokens[:, 151:152], cache)
    fresh = ExpressCache(model, rows={PATHS[1]: Rows(4, 36, 8)}, block=16)
    logits(model, tokens[:, :150], fresh)
    logits(model, tokens[:, 150:151], fresh)
    torch.testing.assert_close(last, logits(model, tokens[:, 151:152], fresh), **CLOSE)


def test_crop_in_the_whole_part_is_that_of_a_dynamic_cache() -> None:
    model, tokens = llama(), ids(60)
    caches = [ExpressCache(model, budget=16), DynamicCache(config=model.config)]
    for cache in caches:
        logits(model, tokens[:, :40], cache)
        cache.crop(-15)
        assert cache.get_seq_length() == 25
    assert torch.equal(*(logits(model, tokens[:, 25:], cache) for cache in caches))


def test_a_step_that_thins_first_can_be_taken_back() -> None:
    model, tokens = llama(), ids(20)
    cache = ExpressCache(model, rows=Rows(2, 14))
    logits(model, tokens[:, :15], cache)
    keys = cache.layers[1].keys
    logits(model, tokens[:, 15:18], cache)
    assert cache.layers[1].held is not None
    cache.crop(-3)
    assert cache.layers[1].held is None and torch.equal(cache.layers[1].keys, keys)


def test_memory_does_not_grow_with_the_length() -> None:
    model = llama()
    cache = ExpressCache(model, budget=32, sinks=2, recent=30, protected=16)
    sizes = []
    for i, turn in enumerate(ids(4096).split(512, 1)):
        logits(model, turn, cache)
        sizes.append(cache.nbytes)
        assert cache.get_seq_length() == 512 * (i + 1)
    assert len(set(sizes[1:])) == 1
    assert cache.rows_held < 6 * 32 + 2 + 30 + 16 + 255 + 16


def test_a_cache_goes_from_inference_mode_to_no_grad_and_back() -> None:
    model, prompt = llama(), ids(104)
    expected = ExpressCache(model, rows=MIXED, block=16)
    results = [logits(model, part, expected) for part in prompt.split([100, 2, 2], 1)]
    cache = ExpressCache(model, rows=MIXED, block=16)
    for i, part in enumerate(prompt.split([100, 2, 2], 1)):
        with torch.inference_mode(i != 1), torch.no_grad():
            found = model(part, past_key_values=cache).logits
        cache.reorder_cache(torch.tensor([0]))
        assert torch.equal(found, results[i])


def test_what_attended_is_recorded() -> None:
    model = llama()
    cache = ExpressCache(model, rows=MIXED)
    with record_sites() as sites:
        logits(model, ids(100), cache)
    assert [(site.module, site.method, site.verdict) for site in sites] == [
        (path, "heads", "rewritten") for path in PATHS
    ]
    assert "2 sinks + 14 recent" in repr(cache) and "100 tokens" in repr(cache)


# ---- plans -----------------------------------------------------------------------------------------------------------


def saved_plan() -> SavedPlan:
    with record_sites() as sites:
        logits(rewrite_attention(llama(), methods=[own(MIXED)]), ids(100))
    return SavedPlan.of(site.saved for site in sites)


def test_a_saved_plan_a_mapping_and_the_policy_of_the_model_say_the_same(tmp_path: Path) -> None:
    plan, prompt = saved_plan(), ids(300)
    plan.save(tmp_path / "plan.json")
    rewritten = rewrite_attention(llama(), plan=plan)
    caches = [
        (llama(), {"plan": plan}),
        (llama(), {"plan": tmp_path / "plan.json"}),
        (llama(), {"rows": MIXED, "block": 16}),
        (rewritten, {}),
    ]
    expected = None
    for model, options in caches:
        cache = ExpressCache(model, **options)
        assert [layer.own for layer in cache.express_layers] == [own(tuple(MIXED[path])) for path in PATHS]
        found = torch.cat([logits(model, part, cache) for part in prompt.split([290, 10], 1)], 1)
        expected = found if expected is None else expected
        assert torch.equal(found, expected)


def test_express_of_a_policy_and_budgets_are_rows_of_all_heads() -> None:
    model = rewrite_attention(llama(), budget=100, window=30, sinks=4, protected=0, methods=["express"])
    assert ExpressCache(model).layers[0].own.rows == (Rows(4, 30, 64),)
    assert ExpressCache(model, budget=40).layers[0].own.rows == (Rows(32, 256, 32, 256),)
    assert ExpressCache(model, budget=0, recent=9, protected=0).layers[0].own.rows == (Rows(32, 9),)
    assert ExpressCache(llama()).layers[0].own == PerHead()
    only = {"modules": {PATHS[1]: "exact"}, "methods": ["express"], "budget": 32}
    assert ExpressCache(rewrite_attention(llama(), **only)).layers[1].own.rows == (Rows(everything=True),)


def test_layers_that_a_plan_does_not_name_hold_everything() -> None:
    plan = SavedPlan(saved_plan().sites[:1])
    cache = ExpressCache(llama(), plan=plan)
    assert cache.layers[1].own.rows == (Rows(everything=True),)
    assert ExpressCache(llama(), rows={PATHS[0]: Rows(2, 9)}).layers[1].own.rows == (Rows(everything=True),)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"budget": 1}, ValueError, "budget=1: must be a number of rows, 2 or more, or 0"),
    ({"budget": 0.5}, ValueError, "budget=0.5: must be a number of rows"),
    ({"sinks": -1}, ValueError, "sinks=-1: must be a number of rows"),
    ({"window": 9}, TypeError, "unknown option 'window': allowed are budget, sinks, recent"),
    ({"rows": Rows(2), "budget": 9}, TypeError, "budget: not allowed beside rows"),
    ({"rows": Rows(2), "plan": SavedPlan()}, TypeError, "rows: not allowed beside plan"),
    ({"rows": {"model.layers.7.self_attn": Rows(2)}}, ValueError, "rows: no full-attention layer at 'model.layers.7"),
    ({"seed": -1}, ValueError, "seed=-1"),
    ({"halving": "none"}, ValueError, "halving='none'"),
])  # fmt: skip
def test_what_is_asked_for_is_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ExpressCache(llama(), **options)


def test_rows_of_another_number_of_heads_are_refused_with_the_first_tokens() -> None:
    model = llama()
    cache = ExpressCache(model, rows=[Rows(2), Rows(3), Rows(4)])
    with pytest.raises(ValueError, match=re.escape(f"'{PATHS[0]}': rows lists 3 heads, the call has 2 KV heads")):
        logits(model, ids(5), cache)


def test_rows_of_query_heads_are_refused_with_the_first_tokens() -> None:
    model = llama()
    cache = ExpressCache(model, rows=[Rows(2), Rows(3), Rows(4), Rows(4)])
    words = (
        f"'{PATHS[0]}': rows lists 4 query heads; an ExpressCache holds rows by KV head, of which there are 2: give it "
        "a plan that was fitted without query_heads, ExpressCache(model, plan=...), or rows= for every KV head or for "
        "all"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        logits(model, ids(5), cache)
    rewrite_attention(model, methods=[PerHead(cache.express_layers[0].own.rows)])
    with pytest.raises(ValueError, match=re.escape(words)):  # by the policy of the model
        logits(model, ids(5), ExpressCache(model))
    assert logits(model, ids(5), ExpressCache(model, rows=[Rows(2), Rows(3)])).isfinite().all()


def test_a_plan_or_a_policy_that_says_nothing_of_rows_is_refused() -> None:
    elsewhere = SavedPlan(tuple(replace(site, module=f"other.{site.module}") for site in saved_plan().sites))
    with pytest.raises(ValueError, match=re.escape(f"plan: has no rows for {', '.join(PATHS)}; give budget=")):
        ExpressCache(llama(), plan=elsewhere)
    with pytest.raises(ValueError, match="the policy by which the model is rewritten says no rows for"):
        ExpressCache(rewrite_attention(llama(), methods=["santa"]))
    model = rewrite_attention(llama(), methods=["santa", "express"], budget=32, protected=0)
    assert ExpressCache(model).layers[0].own.rows == (Rows(32, 256, 32),)
    assert ExpressCache(rewrite_attention(llama(), methods=["santa"]), rows=Rows(everything=True)).rows_held == 0


def test_a_seed_of_none_is_drawn_once() -> None:
    model = llama()
    seeds = [ExpressCache(model, budget=8, seed=None).seed for _ in range(2)]
    torch.manual_seed(0)
    model = llama()
    assert seeds == [ExpressCache(model, budget=8, seed=None).seed for _ in range(2)] and len(set(seeds)) == 2


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_no_other_attention_can_compute_with_weighted_rows() -> None:
    weighted = Weighted((1, 2, 9, 8), torch.zeros(1))
    query = torch.zeros(1, 2, 1, 8)
    for compute in (
        lambda: weighted + 1, lambda: query @ weighted.mT, lambda: weighted[:, :, None],
        lambda: weighted.repeat(1, 2, 1, 1),
        lambda: torch.nn.functional.scaled_dot_product_attention(query, weighted, weighted), lambda: weighted.float(),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="the attention that runs would ignore the weights"):
            compute()
    assert weighted.shape == (1, 2, 9, 8) and weighted.dtype == torch.float32 and "Weighted(" in repr(weighted)


@pytest.mark.parametrize("n", [30, 200])
def test_tokens_that_transformers_would_add_once_more_are_refused(n: int) -> None:
    """generate() does with use_cache=False, and in assisted decoding with a cache that has tokens."""
    model, prompt = llama(), ids(n)
    cache = ExpressCache(model, budget=8, sinks=2, recent=14, protected=0)
    with pytest.raises(ValueError, match=f"position_ids begin at 0 again, and the cache has {n} tokens"):
        model.generate(prompt, past_key_values=cache, max_new_tokens=5, use_cache=False)
    cache.reset()
    logits(model, prompt[:, :-3], cache)
    with pytest.raises(ValueError, match=f"position_ids begin at 0 again, and the cache has {n - 3} tokens"):
        model.generate(prompt, past_key_values=cache, max_new_tokens=5, prompt_lookup_num_tokens=3)
    cache.rollback()
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == out.shape[1] - 1
    cache.reset()
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, n)], 1)
    for piece in (slice(0, 5), slice(5, n + 5)):  # behind padding alone
        positions = (mask[:, : piece.stop].cumsum(1) - 1).clamp(min=0).long()[:, piece]
        more = {"attention_mask": mask[:, : piece.stop], "position_ids": positions}
        logits(model, ids(n + 5)[:, piece], cache, **more)
    assert cache.get_seq_length() == n + 5
    for read in (n + 5, n + 2):  # of a padded prompt; its mask, which generate() gives, ends where that does
        cache.reset()
        logits(model, ids(n + 5)[:, :read], cache, attention_mask=mask[:, :read])
        with pytest.raises(ValueError, match=f"position_ids begin at 0 again, and the cache has {n + 5} tokens"):
            given = {"attention_mask": mask.long(), "max_new_tokens": 5, "use_cache": False}
            model.generate(ids(n + 5), past_key_values=cache, **given)
    cache.reset()
    logits(model, prompt[:, :1], cache)
    mask = torch.tensor([[1] + [0] * 4 + [1] * (n - 1)])  # padding behind one token has position 0
    more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, 1:]}
    padded = logits(model, torch.cat([prompt[:, :4], prompt[:, 1:]], 1), cache, **more)
    cache.reset()
    logits(model, prompt[:, :1], cache)
    torch.testing.assert_close(padded[:, 4:], logits(model, prompt[:, 1:], cache), **CLOSE)


@pytest.mark.parametrize("n", [40, 50, 80])
def test_a_model_that_makes_another_cache_goes_on_with_ours(n: int) -> None:
    """Phi 3 does for prompts of more tokens than RoPE has short factors for, and when a text comes to so many."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_type": "longrope", "rope_theta": 1e4}
    sizes = {"max_position_embeddings": 512, "original_max_position_embeddings": 48, "rope_parameters": factors}
    sizes |= {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    prompt, mask = ids(n, 2), torch.ones(2, n, dtype=torch.long)
    mask[0, :5] = 0
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    exact = copy.deepcopy(model).generate(prompt, **given)
    whole, cache = ExpressCache(model, rows=Rows(2, 200)), ExpressCache(model, rows=Rows(2, 14))
    assert torch.equal(model.generate(prompt, past_key_values=whole, **given), exact)
    out = model.generate(prompt, past_key_values=cache, return_dict_in_generate=True, **given)
    assert out.past_key_values is cache and cache.get_seq_length() == n + 19 and cache.rows_held < 20
    assert torch.equal(model.generate(prompt, **given), exact)
    embeds = {**given, "inputs_embeds": model.model.embed_tokens(prompt)}
    assert model.generate(past_key_values=ExpressCache(model, rows=Rows(2, 14)), **embeds).shape == (2, 20)


def test_models_that_change_what_a_cache_gives_or_have_cross_attention_say_so() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    repeated = transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(**size, num_key_value_heads=2, kv_channels=8, num_local_experts=4)
    ).eval()
    for n in (10, 100):
        with pytest.raises(RuntimeError, match=re.escape("compute keys and values anew from what a cache gives")):
            logits(repeated, ids(n), ExpressCache(repeated, rows=Rows(2, 14)))
    crossed = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    )
    with pytest.raises(ValueError, match="share the layers of a cache, as with cross attention; such models"):
        ExpressCache(crossed)
    shared = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(
        **{**size, "num_hidden_layers": 4}, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
    ))  # fmt: skip
    with pytest.raises(ValueError, match=re.escape("layers [3] attend to the keys and values that earlier ones have")):
        ExpressCache(shared, budget=16)


@pytest.mark.parametrize("policy", [None, {"methods": ["express"], "budget": 16}])
def test_a_cache_that_is_refused_leaves_the_model_as_it_was(policy: dict[str, Any] | None, tmp_path: Path) -> None:
    model = llama(seed=1)
    other = llama()
    cache = ExpressCache(other, rows=Rows(2, 14))
    logits(other, ids(40), cache)
    cache.save(tmp_path / "other")
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    for each in (model, falcon):
        if policy is not None:
            rewrite_attention(each, **policy)
        before = {path: dict(module.__dict__) for path, module in each.named_modules()}
        with pytest.raises(ValueError, match="no full-attention layer at 'lm'|transformers lets"):
            ExpressCache(each, rows={"lm": Rows(2, 14)})
        with pytest.raises(ValueError, match="was saved from another model"):
            ExpressCache.load(tmp_path / "other", each)
        assert all(module.__dict__ == before[path] for path, module in each.named_modules())


def test_a_part_of_a_rewritten_model_holds_the_rows_of_its_policy() -> None:
    """As the language model in a wrapper with a value head: its paths are others than those of the policy."""
    whole = torch.nn.ModuleDict({"lm": llama()})
    modules = {"lm.model.layers.0.*": PerHead(Rows(2, 14)), "*.1.self_attn": PerHead(Rows(1, 9))}
    rewrite_attention(whole, modules=modules)
    assert [layer.own.rows for layer in ExpressCache(whole["lm"]).express_layers] == [(Rows(2, 14),), (Rows(1, 9),)]


def test_a_cache_is_copied_deeply_or_saved_but_not_pickled() -> None:
    cache = ExpressCache(llama(), rows=MIXED)
    for copied in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=re.escape("cannot be pickled, for it belongs to a model in memory")):
            copied(cache)


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("kind", ["rewritten", "plain"])
def test_another_model_says_so(n: int, kind: str) -> None:
    cache = ExpressCache(llama(), rows=Rows(2, 14))
    other = llama() if kind == "plain" else rewrite_attention(llama(), methods=["exact"])
    words = "belongs to the model it was built for|attention did not run|would ignore the weights"
    with pytest.raises((ValueError, RuntimeError), match=words):
        logits(other, ids(n), cache)


@pytest.mark.parametrize("n", [10, 100])
def test_a_model_that_is_restored_meanwhile_says_so(n: int) -> None:
    model = llama()
    cache = ExpressCache(model, rows=Rows(2, 14))
    logits(model, ids(n), cache)
    restore_attention(model)
    with pytest.raises(RuntimeError, match="attention did not run|would ignore the weights"):
        logits(model, ids(1), cache)


def test_another_dtype_batch_or_mask_says_so() -> None:
    model = llama()
    cache = ExpressCache(model, rows=Rows(2, 14))
    logits(model, ids(100, 2), cache)
    with pytest.raises(ValueError, match=re.escape("sequences: 2; the new tokens have 1")):
        logits(model, ids(1), cache)
    model.double()
    with pytest.raises(ValueError, match=re.escape("dtype: torch.float32; the new tokens have torch.float64")):
        logits(model, ids(1, 2), cache)
    model.float()
    mask = torch.ones(2, 101, dtype=torch.long)
    mask[1, :7] = 0
    with pytest.raises(ValueError, match=re.escape("the mask shows [100, 93] earlier tokens of the sequences")):
        logits(model, ids(1, 2), cache, attention_mask=mask)
    cache.rollback()
    custom = torch.ones(2, 1, 2, 102, dtype=torch.bool)
    with pytest.raises(ValueError, match="from 17 tokens on its mask must be causal and hide nothing but padding"):
        logits(model, ids(2, 2), cache, attention_mask=custom)
    cache.rollback()
    logits(model, ids(1, 2), cache)


def test_attention_weights_gradients_and_dropout_are_refused_once_rows_are_thinned() -> None:
    model = llama()
    cache = ExpressCache(model, rows=Rows(2, 14))
    with pytest.raises(ValueError, match=re.escape("run under torch.no_grad()")):
        model(ids(100), past_key_values=cache)
    cache.rollback()
    with pytest.raises(ValueError, match="weighted rows have no attention weights"):
        logits(model, ids(100), cache, output_attentions=True)
    cache.rollback()
    assert cache.get_seq_length() == 0
    logits(model, ids(100), cache)


def test_a_watched_model_is_refused_once_rows_are_thinned_and_goes_on_when_the_watch_ends() -> None:
    model = rewrite_attention(llama(), methods=[own(BLOCKS)])
    expected = logits(model, ids(200), ExpressCache(model, rows=BLOCKS, block=16))
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    with watch(model, fraction=1.0) as watched:
        with pytest.raises(ValueError, match=re.escape(f"'{PATHS[0]}' is watched, and what its error is cannot be")):
            logits(model, ids(200), cache)
        cache.rollback()
        assert not any(watched.errors.values())
    assert torch.equal(logits(model, ids(200), cache), expected)


def test_models_without_full_attention_and_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a PreTrainedModel"):
        ExpressCache(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no layer of full attention; use DynamicCache"):
        ExpressCache(transformers.MistralForCausalLM(config))


def test_soft_caps_are_refused_with_the_first_tokens() -> None:
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    cache = ExpressCache(model, budget=8)
    with pytest.raises(ValueError, match=r"has a logit soft-cap \(softcap\), which it does not compute"):
        logits(model, ids(5), cache)


# ---- other layers ----------------------------------------------------------------------------------------------------


def hybrids() -> dict[str, Any]:
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kinds = ["sliding_attention", "full_attention"]
    qwen = transformers.Qwen2Config(
        **small, layer_types=kinds, sliding_window=24, use_sliding_window=True, initializer_range=0.3
    )
    lfm = transformers.Lfm2Config(**small, layer_types=["conv", "full_attention"], initializer_range=0.3)
    return {"sliding": transformers.Qwen2ForCausalLM(qwen), "linear": transformers.Lfm2ForCausalLM(lfm)}


@pytest.mark.parametrize("kind", ["sliding", "linear"])
def test_layers_of_other_kinds_stay_those_of_transformers(kind: str) -> None:
    model, prompt = hybrids()[kind].eval(), ids(70)
    given = {"max_new_tokens": 20, "do_sample": False}
    exact = model.generate(prompt, past_key_values=DynamicCache(config=model.config), **given)
    whole = ExpressCache(model, budget=32, recent=40)
    assert torch.equal(model.generate(prompt, past_key_values=whole, **given), exact)
    assert [isinstance(layer, ExpressLayer) for layer in whole.layers] == [False, True]
    thinned = ExpressCache(model, rows=Rows(2, 14, 8))
    model.generate(prompt, past_key_values=thinned, **given)
    assert thinned.layers[1].held is not None
    # a layer that sees its window alone makes the keys that it made before: the first full layer holds its own rows
    assert max(map(len, held_tokens(thinned.layers[1]))) < 6 * 8 + 16 + 1
    with pytest.raises(ValueError, match="cannot be saved"):
        thinned.save("never.safetensors")


@pytest.mark.parametrize("n", [30, 70])
def test_where_another_layer_cannot_take_tokens_back_none_does(n: int) -> None:
    """Also where it comes behind one that could."""
    torch.manual_seed(0)
    config = hybrids()["sliding"].config
    config.layer_types = config.layer_types[::-1]
    model, prompt = transformers.Qwen2ForCausalLM(config).eval(), ids(n + 1)
    cache = ExpressCache(model, rows=Rows(2, 14, 8))
    logits(model, prompt[:, :n], cache)
    assert [isinstance(layer, ExpressLayer) for layer in cache.layers] == [True, False]
    expected = logits(model, prompt[:, n:], copy.deepcopy(cache))
    with pytest.raises(RuntimeError, match="the current layer does not track past states"):
        cache.crop(-3)
    with pytest.raises(ValueError, match=re.escape("crop(3): must be minus the number of tokens")):
        cache.crop(3)
    assert torch.equal(logits(model, prompt[:, n:], cache), expected)


# ---- steps that do not end -------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Stop


WHERE = ["between layers", "before the second layer", "while it attends", "before it is counted"]


def interrupted(model: Any, tokens: torch.Tensor, cache: ExpressCache, where: str) -> None:
    """A step that is stopped somewhere."""
    with pytest.MonkeyPatch.context() as patch:
        hook = None
        if where == "between layers":
            hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
        elif where == "before the second layer":
            hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(stop)
        elif where == "while it attends":
            held = cache.layers[1].held
            assert held is not None
            patch.setattr(held.parts[-1], "attend", stop)  # other heads have attended, and hold the new tokens
        else:
            patch.setattr(Held, "_count", stop)
        with pytest.raises(Stop):
            logits(model, tokens, cache)
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize(("n", "where"), [(9, WHERE[0]), (9, WHERE[1]), *((100, where) for where in WHERE)])
def test_after_an_interrupted_step_the_cache_says_so_and_can_go_back(n: int, where: str, new: int) -> None:
    model, tokens = llama(), ids(n + new)
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    logits(model, tokens[:, :n], cache)
    expected = logits(model, tokens[:, n:], copy.deepcopy(cache))
    interrupted(model, tokens[:, n:], cache, where)
    for call in (
        lambda: logits(model, tokens[:, n:], cache), lambda: cache.crop(-1), lambda: cache.save("never"),
        lambda: cache.batch_repeat_interleave(2), lambda: cache.reorder_cache(torch.tensor([0])),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"the last step ended half-way.*rollback\(\) takes the step back"):
            call()
    cache.rollback()
    assert cache.get_seq_length() == n
    cache.rollback()  # nothing is left to take back
    assert torch.equal(logits(model, tokens[:, n:], cache), expected)


def test_a_step_that_thins_first_and_is_interrupted_can_go_back() -> None:
    model, tokens = llama(), ids(20)
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    logits(model, tokens[:, :14], cache)
    expected = logits(model, tokens[:, 14:], copy.deepcopy(cache))
    for where in (WHERE[0], WHERE[1], WHERE[3]):
        interrupted(model, tokens[:, 14:], cache, where)
        cache.rollback()
        assert [layer.get_seq_length() for layer in cache.layers] == [14, 14] and cache.layers[0].held is None
    assert torch.equal(logits(model, tokens[:, 14:], cache), expected)


def test_an_interrupted_prompt_that_has_moved_rows_cannot_go_back_but_be_forgotten() -> None:
    model, tokens = llama(), ids(300)
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    expected = logits(model, tokens[:, :100], copy.deepcopy(cache))
    logits(model, tokens[:, :100], cache)
    for where, words in ((WHERE[0], "half-way"), (WHERE[3], "holds no whole state")):
        interrupted(model, tokens[:, 100:], cache, where)
        with pytest.raises(RuntimeError, match=words):
            logits(model, tokens[:, 100:], cache)
        with pytest.raises(RuntimeError, match="has moved rows of it already; reset"):
            cache.rollback()
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        assert torch.equal(logits(model, tokens[:, :100], cache), expected)


def test_rows_that_were_being_moved_are_not_used_again() -> None:
    model, tokens = llama(), ids(101)
    cache = ExpressCache(model, rows=BLOCKS, block=16)
    logits(model, tokens[:, :100], cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Held, "settle", stop)
        with pytest.raises(Stop):
            logits(model, tokens[:, 100:], cache)
    with pytest.raises(RuntimeError, match="was interrupted while rows were moved and holds no whole state"):
        logits(model, tokens[:, 100:], cache)
    with pytest.raises(RuntimeError, match="has moved rows of it already"):
        cache.rollback()


# ---- copies and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [9, 200])
def test_a_prefix_is_shared_by_copying(n: int) -> None:
    model, prefix, tails = llama(), ids(n), [ids(40, seed=1), ids(40, seed=2)]
    expected = []
    for tail in tails:
        fresh = ExpressCache(model, rows=MIXED, block=16)
        logits(model, prefix, fresh)
        expected.append(logits(model, tail, fresh))
    cache = ExpressCache(model, rows=MIXED, block=16)
    logits(model, prefix, cache)
    for tail, result in zip(tails, expected, strict=True):
        assert torch.equal(logits(model, tail, copy.deepcopy(cache)), result)
    assert cache.get_seq_length() == n


@pytest.mark.parametrize("n", [9, 200, 400])  # from 257 on selecting heads leave pages out
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_cache_goes_on_as_it_was(n: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, prompt, tail = llama().to(dtype), ids(n, 2), ids(40, 2, seed=1)
    mask = torch.ones(2, n + 40, dtype=torch.long)
    mask[1, :5] = 0
    cache = ExpressCache(model, rows=MIXED, block=16, seed=9)
    logits(model, prompt, cache, attention_mask=mask[:, :n])
    logits(model, tail[:, :1], cache, attention_mask=mask[:, : n + 1])
    cache.save(tmp_path / "cache.safetensors")
    for options in ({}, {"rows": MIXED, "block": 16, "seed": 9}):
        loaded = ExpressCache.load(tmp_path / "cache.safetensors", model, **options)
        assert loaded.get_seq_length() == n + 1 and loaded.rows_held == cache.rows_held
        assert loaded.layers[0].croppable == cache.layers[0].croppable
        rest = {"attention_mask": mask}
        assert torch.equal(
            logits(model, tail[:, 1:], loaded, **rest), logits(model, tail[:, 1:], copy.deepcopy(cache), **rest)
        )


@pytest.mark.parametrize("source", ["sinks", "recent", "thinned", "protected", "selected"])
def test_rows_that_no_text_has_reserve_no_memory(source: str) -> None:
    model, prompt = llama(), ids(60)
    expected = logits(model, prompt, DynamicCache(config=model.config))
    cache = ExpressCache(model, rows=[Rows(**{source: 2**40}), Rows(2, 14)], block=16)
    assert [x.everything for x in cache.express_layers[0].own.rows] == [True, False]
    found = logits(model, prompt[:, :12], cache)
    torch.testing.assert_close(found, expected[:, :12])


def test_a_file_says_what_does_not_fit(tmp_path: Path) -> None:
    path, model = tmp_path / "cache.safetensors", llama()
    cache = ExpressCache(model, rows=MIXED, block=16)
    with pytest.raises(ValueError, match="there are no tokens to save"):
        cache.save(path)
    logits(model, ids(100), cache)
    cache.save(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="was saved from another model: num_attention_heads=4, the model has 8"):
        ExpressCache.load(path, llama(num_attention_heads=8))
    with pytest.raises(ValueError, match="dtype='float32', the model has 'float64'"):
        ExpressCache.load(path, llama().double())
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    with pytest.raises(ValueError, match=re.escape("rope_parameters={'rope_theta': 10000.0, 'rope_type': 'default'}")):
        ExpressCache.load(path, llama(**theta))
    with pytest.raises(ValueError, match="was saved from another model: its weights of attention were others"):
        ExpressCache.load(path, llama(1))
    with pytest.raises(TypeError, match="model=NoneType: must be a PreTrainedModel"):
        ExpressCache.load(path, None)
    with pytest.raises(OSError, match=re.escape(f"{str(tmp_path / 'none' / 'x')!r} cannot be written")):
        cache.save(tmp_path / "none" / "x")
    untouched = llama()
    for each in (model, untouched):
        with pytest.raises(ValueError, match=re.escape(f"'{PATHS[0]}' holds 1 head: 2 sinks + 14 recent, 1 head")):
            ExpressCache.load(path, each, budget=9)
    assert not is_rewritten(untouched)
    with pytest.raises(ValueError, match=re.escape("(seed 0), asked is")):
        ExpressCache.load(path, model, rows=MIXED, block=16, seed=4)
    with pytest.raises(FileNotFoundError):
        ExpressCache.load(tmp_path / "none", model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape("is no file that save() of this version wrote")):
        ExpressCache.load(path, model)


def test_a_cache_can_be_moved_away_and_back() -> None:
    model = llama()
    cache = ExpressCache(model, rows=MIXED, block=16)
    logits(model, ids(100), cache)
    expected = logits(model, ids(1), copy.deepcopy(cache))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(logits(model, ids(1), cache), expected)
