"""What a cache holds on a GPU: filled by the kernels of a prefill, and token by token, the same rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
import triton

from express_compile import ExpressCache
from express_compile.core.rows import Rows
from express_compile.kernels.attend.decode import decode_attention
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.kernels.held import Held, HeldRows
from express_compile.kernels.launch import Random
from express_compile.kernels.select.halving import Decider, get_rule
from express_compile.kernels.select.schedule import Halving, Schedule, stage
from express_compile.kernels.select.thinning import halve, thin
from express_compile.routes.transformers import steps

ROWS = (Rows(4, 60), Rows(4, 60, 64), EVERYTHING, Rows(4, 60, 64, 128), Rows(4, 60, 64), Rows(4, 60, selected=2))


def tokens(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, heads, n, 64, generator=draw, dtype=dtype, device="cuda") for heads in (12, 6, 6)]


def rows_of(part: HeldRows) -> list[list[tuple[int, int]]]:
    found = []
    for log_weight, token in zip(part.log_weight.flatten(0, 1), part.token.flatten(0, 1), strict=True):
        there = log_weight > -math.inf
        weights = log_weight[there].exp().round().long().tolist()
        found.append(sorted(zip(token[there].tolist(), weights, strict=True)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_and_updates_hold_the_same_rows(dtype: torch.dtype) -> None:
    """By a rule that only draws: others may decide otherwise where their rounding differs."""
    q, k, v = tokens(3000, dtype)
    caches = [Held(PerHead(ROWS, "uniform"), k, v, Random(torch.tensor(7, device="cuda"), 3), 0.125) for _ in range(2)]
    caches[0].fill(k, v)
    for first in range(0, 3000, 30):
        piece = slice(first, first + 30)
        caches[1].settle()
        caches[1].extend(q[:, :, piece], k[:, :, piece], v[:, :, piece])
    caches[1].settle()
    for one, other in zip(caches[0].parts, caches[1].parts, strict=True):
        if one.config is None or not one.config.protected:  # scores of contests are sums in another order
            assert rows_of(one) == rows_of(other)
        assert torch.equal((one.log_weight > -math.inf).sum(2), (other.log_weight > -math.inf).sum(2))


def test_contests_behind_a_prefill_lose_no_token_and_hold_none_twice() -> None:
    """The kernel of a prefill has the protected tokens by score, and contests take them by position."""
    own = PerHead((Rows(4, 60, 64, 128), Rows(4, 60, protected=128)) * 3, "uniform")
    _, k, v = tokens(3000, torch.bfloat16)
    cache = Held(own, k, v, Random(torch.tensor(7, device="cuda"), 3), 0.125)
    for first, stop in ((0, 2000), (2000, 2400), (2400, 3000)):
        cache.fill(k[:, :, first:stop], v[:, :, first:stop])
        for part in cache.parts:
            for rows in rows_of(part):
                assert len({token for token, _ in rows}) == len(rows)
                assert part.config.forgets or sum(weight for _, weight in rows) == stop


def test_weighted_attention_is_that_of_the_cpu() -> None:
    q, k, v = tokens(500, torch.bfloat16)
    log_weight = torch.randint(0, 5, (2, 6, 500), device="cuda") * math.log(2)
    log_weight[..., ::7] = -math.inf
    for n in (1, 5):
        out, lse = decode_attention(q[:, :, :n], k, v, 0.125, log_weight=log_weight)
        own = (x.cpu() for x in (q[:, :, :n], k, v))
        expected = decode_attention(*own, 0.125, log_weight=log_weight.cpu())
        torch.testing.assert_close(out.cpu(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected[1], rtol=1e-3, atol=1e-3)


def test_selecting_heads_read_what_they_read_on_a_cpu() -> None:
    """Masses of pages that are equal up to rounding could change places; with these tokens they do not."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 3000, 64, generator=draw) for heads in (12, 6, 6))
    own = PerHead((Rows(4, 60, selected=2), Rows(0, 100, selected=5)) * 3)
    outs = []
    for device in ("cuda", "cpu"):
        query, key, value = (x.to(device) for x in (4 * q, k, v))
        cache = Held(own, key, value, Random(torch.tensor(7, device=device), 3), 0.125)
        cache.fill(key[:, :, :2990], value[:, :, :2990])
        steps = [slice(2990, 2991), slice(2991, 2992), slice(2992, 3000)]
        outs.append([cache.extend(*(x[:, :, step] for x in (query, key, value))).cpu() for step in steps])
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ---- single tokens by kernels, thinning by kernels, recorded steps --------------------------------------------------


def test_a_step_by_the_kernels_of_places_is_that_of_the_kernels_of_rows_for_heads_of_all_kinds() -> None:
    q, k, v = tokens(3000, torch.float32)
    caches = [Held(PerHead(ROWS), k, v, Random(torch.tensor(7, device="cuda"), 3), 0.125, 9) for _ in range(2)]
    padding = [(True,) * 2700, tuple(i >= 90 for i in range(2700))]
    for cache in caches:
        cache.fill(k[:, :, :2700], v[:, :, :2700], padding)
    for i in range(2700, 3000):
        step = [x[:, :, i : i + 1] for x in (q, k, v)]
        caches[0].settle(single=True)
        out = caches[0].step(*step)
        caches[1].settle()
        torch.testing.assert_close(out, caches[1].extend(*step), rtol=1e-3, atol=1e-4)
    for cache in caches:
        cache.settle()
    for one, other in zip(caches[0].parts, caches[1].parts, strict=True):
        assert one.left == other.left and rows_of(one) == rows_of(other)


def test_a_step_of_so_many_sequences_that_programs_wait_is_that_of_few() -> None:
    """By tiles of half the rows, and by whole ones."""
    q, k, v = (x[:1].expand(32, -1, -1, -1) for x in tokens(3000, torch.bfloat16))
    many, few = (Held(PerHead(ROWS), x, x, Random(torch.tensor(7, device="cuda"), 3), 0.125, 9) for x in (k, k[:1]))
    for cache, x, y in ((many, k, v), (few, k[:1], v[:1])):
        cache.fill(x[:, :, :2999], y[:, :, :2999])
        cache.settle(single=True)
    step = [x[:, :, 2999:] for x in (q, k, v)]
    out, expected = many.step(*(x.contiguous() for x in step)), few.step(*(x[:1].contiguous() for x in step))
    counts = [cache._table[1].programs.shape[:2].numel() for cache in (many, few)]
    assert counts[0] > torch.cuda.get_device_properties(0).multi_processor_count >= counts[1]
    torch.testing.assert_close(out, expected.expand_as(out), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("rows", [16, 64, 1024])
def test_one_halving_is_what_the_same_halving_of_a_prefill_decides(rows: int) -> None:
    _, k, v = tokens(rows, torch.bfloat16)
    rule, seed = get_rule("balanced"), torch.tensor(7, device="cuda")
    job = Halving(0, rows, rows, 1, stage(2, 1), 5, 0.1)
    whole = Schedule(rows, 0, 0, rows + rows // 2, (), ((job,),), (), ())
    index = torch.empty(2, 3, rows // 2, dtype=torch.int32, device="cuda")
    heads = torch.tensor([4, 0, 3], dtype=torch.int32, device="cuda")
    thin(k, v, index, whole, 0, Decider(rule, 0.125, Random(seed, 3, heads)))
    own = [x.index_select(1, heads) for x in (k, v)]
    assert torch.equal(halve(*own, job, Decider(rule, 0.125, Random(seed, 3, heads))), index)
    other = halve(*own, replace(job, first=6), Decider(rule, 0.125, Random(seed, 3, heads)))
    assert not torch.equal(other, index) and (other // 2 == torch.arange(rows // 2, device="cuda")).all()


def test_after_the_first_steps_nothing_is_compiled_and_the_host_waits_for_nothing(monkeypatch) -> None:
    """What is due is done by the steps themselves, what is next is decided while the device is busy."""
    rows = tuple(x for x in ROWS if not (x.everything or x.selected))  # those grow
    q, k, v = (x[:, : len(rows) * n] for x, n in zip(tokens(3000, torch.bfloat16), (2, 1, 1), strict=True))
    cache, other = (Held(PerHead(rows), k, v, Random(torch.tensor(7, device="cuda"), 3), 0.125, 9) for _ in range(2))
    cache.fill(k[:, :, :2000], v[:, :, :2000])
    cache.settle(single=True)
    made: list[str] = []
    warm_up = triton.JITFunction.warmup
    monkeypatch.setattr(
        triton.JITFunction, "warmup", lambda self, *x, **y: made.append(self.fn) or warm_up(self, *x, **y)
    )
    before = []
    for i in range(2000, 2900):
        step = [x[:, :, i : i + 1].contiguous() for x in (q, k, v)]
        if i < 2200 or cache.rest() <= 0:
            before.append(i)
            cache.settle(single=True)
            cache.step(*step)
            made.clear()
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            cache.count_into(cache._end)
            cache.launch_step(*step)
            cache.look_ahead(1)
            cache.end_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not made and max(before) == 2199
    other.fill(k[:, :, :2900], v[:, :, :2900])
    for held in (cache, other):
        held.settle()
    for one, two in zip(cache.parts, other.parts, strict=True):  # which rows stay is up to rounding
        counts = [(x.log_weight > -math.inf).sum(2) for x in (one, two)]
        masses = [x.log_weight.exp().sum(2) for x in (one, two)]
        assert torch.equal(*counts)
        torch.testing.assert_close(*masses)


@torch.no_grad()
def test_generate_replays_a_graph_and_writes_what_eager_steps_write(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=384, intermediate_size=256, num_hidden_layers=3, vocab_size=97, initializer_range=0.3)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=6, head_dim=64,
                                      max_position_embeddings=8192)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().cuda()
    ids = torch.randint(0, 97, (2, 1500), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    records, record = [], steps.record
    monkeypatch.setattr(steps, "record", lambda *args: records.append(1) or record(*args))
    outs = []
    for disable in (False, True):
        cache = ExpressCache(model, rows=ROWS, graphs=True)
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=600, min_new_tokens=600, do_sample=False,
            disable_compile=disable, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        outs.append((out.sequences, torch.stack(out.logits, 1), cache.rows_held, cache.get_seq_length()))
    assert 1 <= len(records) <= 4, "memory of the growing heads moves a few times"
    (one, logits, *state), (other, expected, *theirs) = outs
    assert state == theirs
    same = int((one == other).all(0).long().cumprod(0).sum()) - 1500  # up to a tie that rounding breaks
    assert same >= 100
    torch.testing.assert_close(logits[:, :same], expected[:, :same], rtol=1e-2, atol=1e-2)
