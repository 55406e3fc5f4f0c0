"""Steps of an ExpressCache that are recorded once and replayed give what steps that run eagerly give.

A replay is here the same step again, by the reference; on a GPU it is a CUDA graph (tests/gpu/test_cache.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from express_compile.core.rows import Rows
from express_compile.routes.transformers import steps as S
from express_compile.routes.transformers.cache import ExpressCache

ROWS = (Rows(2, 9), Rows(2, 9, 2, 4), Rows(everything=True), Rows(0, 12, 4), Rows(2, 5, selected=1))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=40, intermediate_size=16, num_hidden_layers=2, vocab_size=31, head_dim=8)
    config = LlamaConfig(**sizes, num_attention_heads=10, num_key_value_heads=5, max_position_embeddings=4096)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replays every record had."""
    counts: list[int] = []

    def record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        run()
        out, mine = run(), len(counts)
        counts.append(0)

        def replay() -> None:
            counts[mine] += 1
            for name, x in run().items():
                if isinstance(x, torch.Tensor):
                    out[name].copy_(x)

        return replay, out

    monkeypatch.setattr(S, "record", record)
    return counts


def prompt(model: LlamaForCausalLM, n: int, pads: tuple[int, ...] = (0, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 31, (len(pads), n), generator=draw)
    return ids, torch.stack([torch.arange(n) >= pad for pad in pads]).long()


def inputs(ids: torch.Tensor, mask: torch.Tensor, cache: ExpressCache) -> dict[str, Any]:
    positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1
    return dict(input_ids=ids, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("pads", [(0, 0), (0, 33)])
def test_replayed_steps_are_eager_steps(model, recorded: list[int], pads: tuple[int, ...]) -> None:
    ids, mask = prompt(model, 420, pads)
    cache = ExpressCache(model, rows=ROWS)
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    other = copy.deepcopy(cache)
    for i in (*range(120, 135), *range(376, 392)):
        if i == 376:  # a longer piece in between
            for x in (cache, other):
                model(**inputs(ids[:, 135:376], mask[:, :376], x))
        step = ids[:, i : i + 1], mask[:, : i + 1]
        out = cache.steps(model, inputs(*step, cache))
        expected = model(**inputs(*step, other))
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert cache.get_seq_length() == other.get_seq_length() == i + 1
        assert out.past_key_values is cache
    assert sum(recorded) == 31 and len(recorded) <= 4  # memory of the growing heads moves with the longer piece
    assert cache.rows_held == other.rows_held
    for one, two in zip(cache.express_layers, other.express_layers, strict=True):
        assert one.held.length == two.held.length and one.held.exact_tail == two.held.exact_tail


@torch.no_grad()
def test_a_step_that_was_replayed_can_be_cropped_and_the_next_one_counts_on(model, recorded: list[int]) -> None:
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4))
    model(**inputs(ids[:, :120], mask[:, :120], cache))
    first = [cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache)).logits for i in range(120, 125)]
    cache.crop(-3)
    again = [cache.steps(model, inputs(ids[:, i : i + 1], mask[:, : i + 1], cache)).logits for i in range(122, 125)]
    torch.testing.assert_close(torch.cat(again), torch.cat(first[2:]))
    assert sum(recorded) == 8 and len(recorded) == 1


@torch.no_grad()
def test_masks_that_hide_what_is_held_are_refused_and_what_cannot_be_recorded_runs_eagerly(model, recorded) -> None:
    ids, mask = prompt(model, 140)
    cache = ExpressCache(model, rows=Rows(2, 9, 2, 4))
    cache.steps(model, inputs(ids[:, :120], mask[:, :120], cache))
    hidden = mask.clone()
    hidden[1, 5] = 0
    with pytest.raises(ValueError, match=r"shows \[121, 120\] tokens .* holds \[120, 120\]"):
        cache.steps(model, inputs(ids[:, 120:121], hidden[:, :121], cache))
    out = cache.steps(model, dict(inputs(ids[:, 120:121], mask[:, :121], cache), output_hidden_states=True))
    assert len(out.hidden_states) == 3 and not recorded


def test_generate_asks_for_recorded_steps_on_a_gpu_alone(model) -> None:
    cache = ExpressCache(model, rows=ROWS)
    call = model.get_compiled_call(None)
    ids, mask = prompt(model, 8)
    with torch.no_grad():
        out = call(**inputs(ids, mask, cache))
    assert out.past_key_values is cache and cache.get_seq_length() == 8
    config = model.generation_config
    assert not model._valid_auto_compile_criteria({"past_key_values": cache}, config)


def test_generate_writes_with_recorded_steps_what_it_writes_without(model, recorded, monkeypatch) -> None:
    ids, mask = prompt(model, 120, (0, 33))
    outs = []
    for is_recorded in (True, False):
        monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_, answer=is_recorded: answer)
        cache = ExpressCache(model, rows=ROWS)
        more = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
        outs.append(model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=0, **more))
        assert cache.get_seq_length() == 139
    assert torch.equal(*outs) and sum(recorded) == 19
