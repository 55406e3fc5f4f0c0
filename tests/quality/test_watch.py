"""watch: the errors it samples, what it leaves alone, and when a site falls back to exact attention."""

from __future__ import annotations

import copy
import math
import pickle
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import express_compile
from express_compile import record_sites, restore_attention, rewrite_attention, watch
from express_compile.core.call import Call
from express_compile.core.method import METHODS
from express_compile.quality import watch as shadow
from express_compile.routes.eager import rewritten_sites

VOCAB = 97
EXPRESS = dict(
    methods=["express"], budget=4, sinks=2, window=4, protected=0, method_options={"express": {"block": 16}}
)  # fmt: skip
THINFORMER = dict(methods=["thinformer"], budget=8)
FIRST = "model.layers.0.self_attn"


def sizes(layers: int) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"vocab_size": VOCAB, "max_position_embeddings": 256, **dict(zip(names, (32, 48, layers, 4), strict=True))}


def over(options: dict, policy: dict) -> dict:
    """``policy`` over ``options``, or alone where it names methods that do not take them."""
    return {**options, **policy} if "express" in policy.get("methods", ["express"]) else policy


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, **policy) -> nn.Module:
    """Two queries per key; scores far from 0, so that attention is not an average of all values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes(layers), num_key_value_heads=2, initializer_range=0.3)
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    return rewrite_attention(model, **over(EXPRESS, policy))


def bert(layers: int = 2, dtype: torch.dtype = torch.float32, **policy) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes(layers), initializer_range=0.3))
    return rewrite_attention(model.eval().to(dtype), **{**THINFORMER, **policy})


def ids(n: int = 64, B: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (B, n), generator=torch.Generator().manual_seed(seed))


def padding(side: str, n: int = 64) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[1, slice(0, 20) if side == "left" else slice(n - 20, n)] = 0
    return mask


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, **more) -> torch.Tensor:
    return model(input_ids=x, attention_mask=mask, **more).logits


class Calls(TorchDispatchMode):
    """Arguments and results of the attention ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (METHODS["express"].op, METHODS["thinformer"].op):
            self.seen.append((*args[:4], args[5], result[0]))
        return result


@pytest.fixture
def chosen(monkeypatch) -> list:
    """What ``choose_rows`` returned, call by call."""
    found = []
    original = shadow.choose_rows
    monkeypatch.setattr(shadow, "choose_rows", lambda *args: found.append(original(*args)) or found[-1])
    return found


def by_hand(query, key, value, mask, scale, out, rows, counts, causal: bool) -> float:
    """The relative error, query by query, in float64."""
    group, shift = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    query, key, value, out = (x.double() for x in (query, key, value, out))
    above = below = 0.0
    for b, r in np.ndindex(*rows.shape):
        if not counts[b, r]:
            continue
        i = int(rows[b, r])
        seen = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[b].clone()
        if causal:
            seen[i + shift + 1 :] = False
        for h in range(query.shape[1]):
            weights = (scale * key[b, h // group, seen] @ query[b, h, i]).softmax(0)
            exact = weights @ value[b, h // group, seen]
            above += float((out[b, h, i] - exact).square().sum())
            below += float(exact.square().sum())
    return math.sqrt(above / below)


# ----------------------------------------------------------------------------------------------------- the error


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, bert], ids=lambda make: make.__name__)
def test_errors_are_those_by_hand(make, dtype, side, chosen):
    model, mask = make(dtype=dtype), padding(side)
    watched = watch(model, fraction=1.0, queries=9, threshold=math.inf)
    with Calls() as calls:
        logits(model, ids(), mask)
    assert not any(watched.errors.values()), "an error is read at the next call, never at its own"
    logits(model, ids(8), None)  # too short to be approximated: it only reads
    errors = list(watched.errors.values())
    assert [len(x) for x in errors] == [1, 1] and len(calls.seen) == len(chosen) == 2
    for (error,), call, (rows, counts) in zip(errors, calls.seen, chosen, strict=True):
        assert counts.all() and rows.shape == (2, 9)
        truth = by_hand(*call, rows, counts, make is llama)
        assert truth > 0.02 and abs(error - truth) <= (1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("side", ["none", "left"])
def test_a_chunk_that_continues_a_cache(side, chosen):
    model, mask = llama(dtype=torch.float64), padding(side, 104)
    watched = watch(model, fraction=1.0, queries=30, threshold=math.inf)
    cache = transformers.DynamicCache(config=model.config)
    with Calls() as calls:
        for a, b in ((0, 64), (64, 104), (104, 105)):  # the last one is decoding, which stays exact
            part = None if mask is None else nn.functional.pad(mask, (0, 1), value=1)[:, :b]
            logits(model, ids(105)[:, a:b], part, past_key_values=cache)
    assert [call[0].shape[2] for call in calls.seen] == [64, 64, 40, 40] and calls.seen[2][1].shape[2] == 104
    errors = [watched.errors[f"model.layers.{layer}.self_attn"][i] for i in (0, 1) for layer in (0, 1)]
    for error, call, found in zip(errors, calls.seen, chosen, strict=True):
        assert abs(error - by_hand(*call, *found, causal=True)) <= 1e-6 < error


def test_errors_are_computed_in_float32_under_autocast(chosen):
    model = llama(layers=1)
    watched = watch(model, fraction=1.0, threshold=math.inf)
    with torch.autocast("cpu", torch.bfloat16):
        with Calls() as calls:
            logits(model, ids())
        logits(model, ids(8))
    (call,), ((error,),) = calls.seen, watched.errors.values()
    assert abs(error - by_hand(*call, *chosen[0], causal=True)) <= 1e-5


def qkv(B=2, H=4, H_kv=2, Lq=40, Lk=64, D=8, Dv=6, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((B, H, Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("offset", [None, 24])
def test_keys_in_chunks_give_the_same_within_bounded_memory(offset, monkeypatch):
    query, key, value = qkv(dtype=torch.float64)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1, :50] = False  # whole chunks without any key
    rows = torch.arange(40).expand(2, 40)
    seen = mask[:, None, None] if offset is None else mask[:, None, None] & torch.ones(40, 64).bool().tril(offset)
    truth = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.5, enable_gqa=True)
    truth = truth.masked_fill(~seen.any(-1, keepdim=True), 0)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in (result if isinstance(result, tuple) else (result,))))
            return result

    for elements in (1 << 24, 4000):
        monkeypatch.setattr(shadow, "_ELEMENTS", elements)
        largest = 0
        with Sizes():
            found = shadow.exact_rows(query, key, value, mask, 0.5, offset, rows)
        assert (found - truth).abs().max() <= 1e-12
        assert (largest <= 4000) == (elements == 4000), "one element of scores more would be 20480"


def test_errors_where_there_is_nothing_to_compare_or_the_result_is_not_finite():
    query, key, value = qkv(Lq=64)
    rows, counts = shadow.choose_rows(None, 0, query, 8, 0)
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5, enable_gqa=True)

    def error(out, value=value, counts=counts):
        return float(shadow.relative_error(out, Call(query, key, value, None, None, 0.5, 0), 0, rows, counts))

    assert error(exact) <= 1e-6 and abs(error(1.25 * exact) - 0.25) <= 1e-6
    assert error(exact.masked_fill(torch.ones(64, 1).bool(), math.nan)) == math.inf
    assert error(exact, torch.zeros_like(value)) == math.inf  # something where there should be nothing
    assert math.isnan(error(0 * exact, torch.zeros_like(value)))
    assert math.isnan(error(exact, value * math.nan))
    assert math.isnan(error(exact, counts=torch.zeros_like(counts)))


# -------------------------------------------------------------------------------------------------- the sampling


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**63 - 1), st.booleans(), st.integers(0, 2**32 - 1))
def test_queries_are_distinct_and_those_that_see_nothing_come_last(Lq, count, seed, causal, real):
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(real)) < 0.4
    mask[2] = False
    query = torch.empty(3, 1, Lq, 1)
    rows, counts = shadow.choose_rows(mask, 64 - Lq if causal else None, query, count, seed)
    assert rows.shape == counts.shape == (3, min(count, Lq))
    for b in range(3):
        assert len(set(rows[b].tolist())) == rows.shape[1] and 0 <= int(rows[b].min()) <= int(rows[b].max()) < Lq
        allowed = mask[b, 64 - Lq :] if causal else mask[b].any().expand(Lq)
        assert torch.equal(allowed[rows[b]], counts[b])
        assert int(counts[b].sum()) == min(count, int(allowed.sum()))


def test_every_query_is_as_likely():
    times = np.zeros(32)
    for seed in range(4000):
        rows, _ = shadow.choose_rows(None, 0, torch.empty(1, 1, 32, 1), 4, seed)
        times[rows[0].numpy()] += 1
    # 500 expected each; the statistic has mean 31 * 28/31 for draws without replacement and 99.9% quantile below 62
    assert ((times - 500) ** 2 / 500).sum() < 62


def test_sampled_errors_agree_with_the_error_of_all_queries():
    model, calls = llama(layers=1, dtype=torch.float64), 300
    with watch(model, fraction=1.0, queries=16, threshold=math.inf) as watched:
        for _ in range(calls + 1):
            logits(model, ids(B=1))
    with watch(model, fraction=1.0, queries=64, threshold=math.inf) as whole, Calls() as seen:
        logits(model, ids(B=1)), logits(model, ids(8, B=1))
    errors, full = np.array(watched.errors[FIRST]), whole.errors[FIRST][0]
    assert len(errors) == calls and errors.std() > 0.01 * full
    # the law of one sample, by an independent generator: squares of 16 of 64 queries
    query, key, value, _, scale, out = seen.seen[0]
    exact = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    above, below = ((x**2).sum((0, 1, 3)).numpy() for x in (out - exact, exact))
    generator = np.random.default_rng(0)
    picks = np.stack([generator.choice(64, 16, replace=False) for _ in range(20000)])
    law = np.sqrt(above[picks].sum(1) / below[picks].sum(1))
    # 99.9% of a normal law; the whole error is off by the bias of a ratio, 5% at most here
    assert abs(errors.mean() - law.mean()) <= 3.3 * law.std() / math.sqrt(calls)
    assert abs(errors.mean() - full) <= 0.05 * full
    biased = np.sqrt(above[-16:].sum() / below[-16:].sum())  # control: the last queries alone
    assert abs(biased - law.mean()) > 3.3 * law.std() / math.sqrt(calls)


def sampled_calls(monkeypatch, calls: int, **options) -> list[set[int]]:
    """Which calls were sampled, of each of two sites."""
    done: list[None] = []
    monkeypatch.setattr(shadow, "relative_error", lambda *args: torch.tensor(float(len(done))))
    model = bert(budget=4)
    watched = watch(model, threshold=math.inf, **options)
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    x = torch.randn(1, 6, 32)
    with torch.no_grad():
        for _ in range(calls):
            done.append([layer(x) for layer in layers])
        [layer(x[:, :4]) for layer in layers]
    return [{int(call) for call in errors} for errors in watched.errors.values()]


def test_a_tenth_of_the_calls_is_sampled_by_each_site_for_itself(monkeypatch):
    first, second = sampled_calls(monkeypatch, 1000, fraction=0.1)
    low, high = 69, 131  # 100 and 3.29 standard deviations of 9.5: 99.9%
    assert low <= len(first) <= high and low <= len(second) <= high
    assert len(first & second) <= 21  # 10 are expected; it would be all if sites chose alike


def test_calls_are_chosen_by_the_seed(monkeypatch):
    first = sampled_calls(monkeypatch, 60, fraction=0.3)
    assert first == sampled_calls(monkeypatch, 60, fraction=0.3)
    assert first != sampled_calls(monkeypatch, 60, fraction=0.3, seed=1)


def test_what_is_exact_anyway_is_not_sampled():
    model = llama(modules={FIRST: "exact"})
    watched = watch(model, fraction=1.0)
    logits(model, ids(22)), logits(model, ids(22))  # 4 * 4 + 2 + 4 tokens are exact
    assert list(watched.errors) == ["model.layers.1.self_attn"] and watched.errors["model.layers.1.self_attn"] == []
    logits(model, ids(40)), logits(model, ids(22))
    assert len(watched.errors["model.layers.1.self_attn"]) == 1


def test_santa_decodes_unwatched_beside_express():
    model = llama(methods=["express", "santa"], budget=16)
    watched = watch(model, fraction=1.0, threshold=math.inf)
    cache = transformers.DynamicCache(config=model.config)
    with record_sites() as sites:
        for a, b in ((0, 120), (120, 121), (121, 122)):
            logits(model, ids(122)[:, a:b], past_key_values=cache)
    assert [site.method for site in sites] == ["express"] * 2 + ["santa"] * 4
    assert [len(x) for x in watched.errors.values()] == [1, 1]


def test_only_the_last_errors_are_kept(monkeypatch):
    monkeypatch.setattr(shadow, "_KEPT", 3)
    model = bert(layers=1)
    watched = watch(model, fraction=1.0, threshold=math.inf)
    for n in range(20, 26):
        logits(model, ids(n))
    assert len(next(iter(watched.errors.values()))) == 3


# ------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("make", [llama, bert], ids=lambda make: make.__name__)
def test_results_and_random_numbers_are_bitwise_those_without(make):
    model = make(seed=None)  # draws from torch's generator at every call

    def run() -> list:
        torch.manual_seed(3)
        random.seed(3)
        outputs = [logits(model, ids(n), mask) for n, mask in ((64, None), (64, padding("left")), (50, None))]
        return [*outputs, torch.get_rng_state(), torch.tensor(random.random())]

    before = run()
    with watch(model, fraction=1.0, threshold=math.inf) as watched:
        during = run()
    assert all(map(torch.equal, before, during)) and all(map(torch.equal, before, run()))
    assert [len(x) for x in watched.errors.values()] == [2, 2]


def test_gradients_are_bitwise_those_without():
    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(input_ids=ids()).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    model = llama()
    before = gradient()
    watched = watch(model, fraction=1.0, threshold=math.inf)
    assert torch.equal(gradient(), before) and torch.equal(gradient(), before)
    assert [len(x) for x in watched.errors.values()] == [1, 1]


def functions_of_shadow(model: nn.Module) -> set[str]:
    called = set()

    def see(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == shadow.__file__:
            called.add(frame.f_code.co_name)

    sys.setprofile(see)
    try:
        logits(model, ids())
    finally:
        sys.setprofile(None)
    return called


def test_nothing_of_it_runs_when_it_is_off():
    ops = {name: METHODS[name].op for name in ("express", "thinformer")}
    model, other = llama(), llama()
    assert functions_of_shadow(model) == set()
    watched = watch(model)
    assert {"follow", "sample"} <= functions_of_shadow(model) and functions_of_shadow(other) == set()
    watched.close()
    assert functions_of_shadow(model) == set()
    assert ops == {name: getattr(torch.ops.express_compile, name).default for name in ops}


def test_copies_are_not_watched():
    model = llama()
    watched = watch(model, fraction=1.0, threshold=math.inf)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert functions_of_shadow(other) == set()
        assert torch.equal(logits(other, ids()), logits(model, ids()))
    assert [len(x) for x in watched.errors.values()] == [1, 1]
    assert watch(other).fallen == ()


def test_training_is_not_watched():
    model = llama()
    watched = watch(model, fraction=1.0)
    model.train()
    assert functions_of_shadow(model) == functions_of_shadow(model) == set()
    model.eval()
    logits(model, ids()), logits(model, ids())
    assert [len(x) for x in watched.errors.values()] == [1, 1]


# --------------------------------------------------------------------------------------------------- falling back


def test_a_site_falls_back_once_and_is_then_bitwise_the_original():
    before = logits(restore_attention(llama()), ids())
    model = llama(modules={"*.1.*": "exact"}, strict=True)
    approximate = logits(model, ids())
    watched = watch(model, fraction=1.0, threshold=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            assert torch.equal(logits(model, ids()), approximate) and watched.fallen == ()
    with pytest.warns(UserWarning) as caught, record_sites() as sites:
        assert torch.equal(logits(model, ids()), before)
    assert not torch.equal(approximate, before) and watched.fallen == (FIRST,)
    (warning,) = caught
    words, errors = str(warning.message), watched.errors[FIRST]
    assert words.startswith(f"{FIRST}: ") and "threshold=0.01" in words and "modules={" in words
    assert f"{sorted(errors)[2]:.3g}" in words and min(errors) > 0.01 and len(errors) == 5
    assert sites[0].verdict == sites[0].method == "exact" and "threshold" in sites[0].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(logits(model, ids()), before)
    assert len(watched.errors[FIRST]) == 5
    watched.close()
    assert torch.equal(logits(model, ids()), approximate) and watched.fallen == (FIRST,)


def test_a_fallen_site_is_exact_over_a_cache_and_with_padding():
    original, model = restore_attention(llama()), llama()
    watched = watch(model, fraction=1.0, threshold=1e-3)
    with pytest.warns(UserWarning):
        for _ in range(6):
            logits(model, ids())
    assert len(watched.fallen) == 2
    for side in ("left", "right"):
        assert torch.equal(logits(model, ids(), padding(side)), logits(original, ids(), padding(side)))
    caches = [transformers.DynamicCache(config=x.config) for x in (model, original)]
    for a, b in ((0, 40), (40, 63), (63, 64)):
        found = [
            logits(x, ids()[:, a:b], past_key_values=cache) for x, cache in zip((model, original), caches, strict=True)
        ]
        assert torch.equal(*found)


def test_without_errors_above_the_threshold_nothing_falls():
    model = llama()
    watched = watch(model, fraction=1.0, threshold=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(25):
            logits(model, ids(seed=seed))
    errors = [error for found in watched.errors.values() for error in found]
    assert len(errors) == 48 and 0.01 < max(errors) < 1.0 and watched.fallen == ()


@pytest.mark.parametrize(
    ("errors", "falls_after"),
    [
        ([0.5] * 5, 5),
        ([0.5] * 4, None),
        ([math.inf, 0.1, math.inf, 0.1, 0.1, 0.1, 0.1, math.inf, 0.1, 0.1, math.inf], None),  # two of five at most
        ([0.1, 0.1, math.inf, 0.1, math.inf, 0.1, 0.5], 7),
        ([0.3] * 20, None),  # not above
        ([math.nan] * 20, None),
        ([0.5, 0.5, math.nan, 0.5, 0.5, math.nan, 0.5], 7),  # nothing to compare: not counted
    ],
)
def test_the_median_of_the_last_five_decides(errors, falls_after, monkeypatch):
    model, left = bert(layers=1), list(errors)
    monkeypatch.setattr(shadow, "relative_error", lambda *args: torch.tensor(left.pop(0), dtype=torch.float64))
    watched, fell = watch(model, fraction=1.0, threshold=0.3), None
    for now in range(len(errors)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits(model, ids(20)), logits(model, ids(4))  # sampled, and read
        fell = now + 1 if watched.fallen and fell is None else fell
    assert fell == falls_after


def test_an_error_that_has_not_come_is_neither_waited_for_nor_lost(monkeypatch):
    class Event:
        there = False

        def query(self) -> bool:
            return self.there

    events, capturing = [], False
    monkeypatch.setattr(shadow, "_to_host", lambda error: (error, events.append(Event()) or events[-1]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    model = bert(layers=1)
    watched = watch(model, fraction=1.0, threshold=math.inf)
    (path,) = watched.errors
    for n in (20, 21, 22):
        logits(model, ids(n))
    assert len(events) == 3 and watched.errors[path] == []
    events[1].there = True
    logits(model, ids(4))
    assert watched.errors[path] == [], "in order"
    events[0].there = capturing = True
    logits(model, ids(4))
    assert watched.errors[path] == [], "nothing is asked for while a graph is captured"
    capturing = False
    logits(model, ids(4))
    assert len(watched.errors[path]) == 2
    events[2].there = True
    logits(model, ids(4))
    assert len(watched.errors[path]) == 3


def test_threads_share_a_watch():
    model, before = llama(), logits(restore_attention(llama()), ids())
    watched = watch(model, fraction=1.0, threshold=1e-3)
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(lambda _: logits(model, ids()), range(40)))
    assert len(watched.fallen) == len([x for x in caught if "threshold" in str(x.message)]) == 2
    assert [len(x) for x in watched.errors.values()] == [5, 5] and torch.equal(logits(model, ids()), before)


# ---------------------------------------------------------------------------------------------- captured graphs


class Written(nn.Module):
    """Attention that the module writes itself, over 4 heads."""

    def __init__(self, causal: bool, times: int = 1) -> None:
        super().__init__()
        self.causal, self.times = causal, times

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        mask = None if keep is None else keep[:, None, None]
        for _ in range(self.times):
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(q, q, q, mask, is_causal=self.causal, scale=1.0)
            x = x.transpose(1, 2).flatten(2)
        return x


class Captured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Written(True), Written(False)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(self.first(x), keep)


BOTH = {**EXPRESS, "methods": ["express", "thinformer"]}


def captured(**policy) -> nn.Module:
    return rewrite_attention(Captured().eval(), **over(BOTH, policy))


def tokens(n: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(seed))


def test_errors_in_captured_graphs_are_those_by_hand(chosen):
    """At two lengths, of which the second has its graph captured with symbolic sizes, and with padding."""
    model, keep = captured(), torch.ones(2, 64, dtype=torch.bool)
    keep[1, 40:] = False
    watched = watch(model, fraction=1.0, queries=9, threshold=math.inf)
    inputs = [(tokens(64), None), (tokens(80), None), (tokens(96), None), (tokens(64), keep)]
    expected = []
    for x, mask in inputs:
        with record_sites() as sites:
            model(x, mask)
        for site, causal in zip(sites, (True, False), strict=True):
            q = x.unflatten(-1, (4, -1)).transpose(1, 2)
            padding = None if causal else mask
            out, _ = METHODS[site.method].op(q, q, q, padding, torch.tensor(0), 1.0, site.layer, **site.params)
            expected.append(by_hand(q, q, q, padding, 1.0, out, *chosen[len(expected)], causal))
            x = out.transpose(1, 2).flatten(2)
    assert [len(x) for x in watched.errors.values()] == [3, 3], "an error is read at the next call"
    model(tokens(8))
    errors = [error for pair in zip(watched.errors["first"], watched.errors["second"], strict=True) for error in pair]
    assert errors == pytest.approx(expected, abs=1e-5) and min(errors) > 0.02 and len(errors) == 8
    assert "Lq=s" in sites[0].shape or len({site.shape for site in sites}) == 1


def test_a_captured_site_falls_back_once():
    x, model = tokens(), captured(modules={"second": "exact"})
    before, approximate = Captured().eval()(x), model(x)
    watched = watch(model, fraction=1.0, threshold=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            assert torch.equal(model(x), approximate) and watched.fallen == ()
    with pytest.warns(UserWarning) as caught, record_sites() as sites:
        fallen = model(x)
    assert (fallen - before).abs().max() < 1e-5 < (approximate - before).abs().max() and watched.fallen == ("first",)
    (warning,) = caught
    assert str(warning.message).startswith("first: ") and "threshold=0.01" in str(warning.message)
    first, second = sites
    assert first.verdict == first.method == first.saved.method == "exact" and "threshold" in first.reason
    assert not first.params and second.reason == "modules['second'] names 'exact' first"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), fallen) and len(watched.errors["first"]) == 5
        assert (model(tokens(90)) - Captured()(tokens(90))).abs().max() < 1e-5, "in every graph"
    watched.close()
    assert torch.equal(model(x), approximate) and watched.fallen == ("first",)


def test_captured_models_are_left_alone_as_others_are():
    model = captured(seed=None)
    torch.manual_seed(3)
    before = [model(tokens()), torch.get_rng_state()]
    watched = watch(model, fraction=1.0, threshold=math.inf)
    torch.manual_seed(3)
    assert all(map(torch.equal, before, [model(tokens()), torch.get_rng_state()]))
    model.train()(tokens()), copy.deepcopy(model).eval()(tokens())
    model.eval()(tokens(4)), model(tokens(4))
    assert [len(x) for x in watched.errors.values()] == [1, 1], "neither training nor copies"
    express_compile.explain(model, tokens(), error=True), model(tokens(4))
    assert [len(x) for x in watched.errors.values()] == [1, 1], "what is explained is not in use"
    with pytest.raises(ValueError, match="watched already"):
        watch(model)
    with pytest.raises(ValueError, match="is a part of a rewritten model, whose graphs hold its attention"):
        watch(model.first)
    restore_attention(model)
    model(tokens()), model(tokens())
    watched.close()
    rewrite_attention(model, **BOTH)
    model(tokens()), model(tokens())
    assert [len(x) for x in watched.errors.values()] == [1, 1]


def test_names_of_captured_sites():
    model = nn.Sequential(nn.Identity(), rewrite_attention(Written(True, times=2).eval(), **EXPRESS))
    watched = watch(model, fraction=1.0, threshold=math.inf)
    model(tokens()), model(tokens())
    assert {path: len(x) for path, x in watched.errors.items()} == {"1": 1, "1#1": 1}
    for policy in (dict(methods=["santa"]), dict(modules={"*": "santa"}, methods=["exact"])):
        with pytest.raises(ValueError, match="santa: random by design"):
            watch(captured(**policy))
    plan = express_compile.explain(Captured().eval(), tokens(), **{**EXPRESS, "modules": {"second": "exact"}}).plan
    watched = watch(rewrite_attention(Captured().eval(), plan=plan), fraction=1.0, threshold=math.inf)
    watched._model(tokens()), watched._model(tokens())
    assert list(watched.errors) == ["first"]


# -------------------------------------------------------------------------------------------------- the interface


def test_it_ends_with_the_rewriting():
    model = llama()
    watched = watch(model, fraction=1.0, threshold=math.inf)
    logits(model, ids()), logits(model, ids())
    restore_attention(model)
    logits(model, ids())
    watched.close()
    assert [len(x) for x in watched.errors.values()] == [1, 1]
    rewrite_attention(model, **EXPRESS)
    assert functions_of_shadow(model) == set()
    second = watch(model)
    watched.close()  # of the old one
    assert all(site.shadow is not None for site in rewritten_sites(model).values())
    rewrite_attention(model, **EXPRESS)
    assert functions_of_shadow(model) == set() and second.fallen == ()


def test_a_part_of_a_model_is_watched_by_its_own_paths():
    model = llama()
    watched = watch(model.model.layers, fraction=1.0, threshold=math.inf)
    logits(model, ids()), logits(model, ids())
    assert {path: len(x) for path, x in watched.errors.items()} == {"0.self_attn": 1, "1.self_attn": 1}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (dict(methods=["santa"]), "santa: random by design"),
        (dict(methods=["santa", "exact"]), "allowed are express, thinformer"),
        (dict(methods=["exact"]), "exact: exact"),
        (dict(modules={"*": "santa"}), "santa: random by design"),
    ],
)
def test_refused_are_methods_that_cannot_be_watched(policy, words):
    model = llama(**policy)
    with pytest.raises(ValueError, match=words):
        watch(model)
    assert functions_of_shadow(model) == set()


def test_a_saved_plan_is_watched_where_it_says_express():
    plain = restore_attention(llama())
    plan = express_compile.explain(plain, ids(), **EXPRESS, modules={FIRST: "exact"}).plan
    model = rewrite_attention(plain, plan=plan)
    assert list(watch(model).errors) == ["model.layers.1.self_attn"]


def test_refused_are_models_that_are_not_rewritten_or_watched_already():
    with pytest.raises(ValueError, match="rewrite_attention"):
        watch(restore_attention(llama()))
    with pytest.raises(ValueError, match="Linear: has no attention"):
        watch(nn.Linear(2, 2))
    model = llama()
    watched = watch(model)
    with pytest.raises(ValueError, match="watched already"):
        watch(model)
    watched.close()
    watched.close()
    watch(model)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (dict(fraction=0.0), ValueError, "fraction=0.0"),
        (dict(fraction=1.5), ValueError, "fraction=1.5"),
        (dict(fraction=math.nan), ValueError, "fraction=nan"),
        (dict(fraction="1%"), TypeError, "fraction='1%'"),
        (dict(queries=0), ValueError, "queries=0"),
        (dict(queries=1.5), TypeError, "queries=1.5"),
        (dict(threshold=0), ValueError, "threshold=0"),
        (dict(threshold=math.nan), ValueError, "threshold=nan"),
        (dict(seed=None), TypeError, "seed=None"),
        (dict(seed=True), TypeError, "seed=True"),
    ],
)
def test_arguments_are_checked(arguments, kind, words):
    with pytest.raises(kind, match=words):
        watch(llama(layers=1), **arguments)
