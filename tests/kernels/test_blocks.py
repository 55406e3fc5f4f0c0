"""Selected rows: which blocks of keys a block of queries chooses, and that kernels choose as well as the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.kernels.padding import Packing
from express_compile.kernels.select import blocks as S


def tokens(n, B=1, H=2, H_kv=1, D=8, Lq=None, dtype=torch.float64, seed=0):
    """Queries ``[B, H, Lq, D]`` and keys ``[B, H_kv, n, D]``, sharp enough that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, heads, n, D, generator=generator, dtype=torch.float64) for heads in (H, H_kv))
    return (2 * q).to(dtype)[:, :, n - (Lq or n) :], k.to(dtype)


@st.composite
def configs(draw, most=3):
    return S.BlockConfig(
        draw(st.integers(1, most)),
        sinks=draw(st.sampled_from([0, 1, 32, 64, 70, 130])),
        recent=draw(st.sampled_from([0, 5, 64, 100])),
        samples=draw(st.integers(1, 3)),
        stride=draw(st.sampled_from([1, 7, 64])),
        block=draw(st.sampled_from([16, 32, 64, 128])),
    )


def attend(q, k, v, seen, scale):
    """Attention over the tokens that ``seen`` bool ``[B, H_kv, Lq, Lk]`` shows, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v, seen = (x.repeat_interleave(group, 1) for x in (k, v, seen))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)


def brute_mass(q, k, config, scale, position):
    """The score of every candidate of the block of queries that ``position`` is in, one query at a time, from the text
    at the head of the module: float64 ``[B, H_kv, candidates]``."""
    Lk, group = k.shape[2], q.shape[1] // k.shape[1]
    q_offset = Lk - q.shape[2]
    begin = max(0, position - (position - config.sinks - config.recent) % config.block)
    candidates = max(0, (begin - config.recent - config.sinks) // 64)
    mass = torch.zeros(k.shape[0], k.shape[1], candidates, dtype=torch.float64)
    for b in range(k.shape[0]):
        for h in range(q.shape[1]):
            for s in range(config.samples):
                at = max(begin, q_offset) - s * config.stride
                if at >= q_offset:
                    p = (scale * k[b, h // group, : at + 1].double() @ q[b, h, at - q_offset].double()).softmax(0)
                    for j in range(candidates):
                        first = config.sinks + 64 * j
                        mass[b, h // group, j] += p[first : first + 64].sum()
    return mass


# -- what a query sees -------------------------------------------------------------------------------------------


@given(config=configs(), n=st.integers(1, 900), past=st.integers(0, 600))
@settings(max_examples=20)
def test_every_token_is_sink_candidate_or_tail(config, n, past):
    past = min(past, n - 1)
    layout = S.query_blocks(config, n - past, n)
    for begin, candidates, tail in zip(layout.begin, layout.candidates, layout.tail, strict=True):
        assert tail == (config.sinks + 64 * candidates if candidates else 0)
        assert tail <= max(0, begin - config.recent), "the recent tokens are seen in any case"
        assert begin - config.recent - max(tail, config.sinks) < 64, "no block more would fit before them"
    q, k = tokens(n, Lq=n - past)
    seen = S.rows_visible(S.select_blocks_reference(q, k, config, 0.5), config, n - past, n)
    position = torch.arange(past, n)[:, None]
    token = torch.arange(n)
    assert not seen[..., token > position].any()
    always = (token <= position) & ((token < config.sinks) | (token >= position - config.recent))
    assert seen[..., always].all()
    assert torch.equal(seen.sum(-1)[0, 0], torch.from_numpy(layout.rows_seen(n - past)))


def test_at_the_defaults_no_row_is_rounded_to_a_block():
    config = S.BlockConfig(16)
    rows = S.query_blocks(config, 8192, 8192).rows_seen(8192)
    assert rows[:1440].tolist() == list(
        range(1, 1441)
    )  # 32 sinks, 256 recent, 128 own, 16 blocks: as many as there are
    assert (rows[1440:].min(), rows[1440:].max()) == (32 + 1024 + 256 + 1, 32 + 1024 + 256 + 128)


@given(config=configs(most=20), n=st.integers(1, 900), past=st.integers(0, 600), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_attention_is_exact_where_all_candidates_are_chosen(config, n, past, seed):
    past = min(past, n - 1)
    q, k = tokens(n, Lq=n - past, seed=seed)
    layout = S.query_blocks(config, n - past, n)
    chosen = S.select_blocks_reference(q, k, config, 0.5)
    seen = S.rows_visible(chosen, config, n - past, n)
    whole = torch.ones(n - past, n, dtype=torch.bool).tril(past)
    enough = torch.from_numpy(layout.candidates <= config.blocks)
    assert torch.equal((seen == whole).all(-1)[0, 0], enough[(torch.arange(n - past) + layout.shift) // config.block])
    out, exact = (attend(q, k, k, m, 0.5) for m in (seen, whole.expand_as(seen)))
    exactly = (seen == whole).all(-1)[0, 0]
    assert torch.equal(out[:, :, exactly], exact[:, :, exactly])


# -- the choice --------------------------------------------------------------------------------------------------


@given(config=configs(), n=st.integers(1, 700), past=st.integers(0, 400), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_scores_are_the_mass_of_whole_queries(config, n, past, seed):
    past = min(past, n - 1)
    q, k = tokens(n, B=2, H=4, H_kv=2, Lq=n - past, seed=seed)
    layout, mass = S.query_blocks(config, n - past, n), S.block_mass(q, k, config, 0.5)
    for i, candidates in enumerate(layout.candidates):
        position = max(int(layout.begin[i]), past)
        torch.testing.assert_close(mass[:, :, i, :candidates], brute_mass(q, k, config, 0.5, position))
        assert (mass[:, :, i, candidates:] == 0).all()


@given(config=configs(), n=st.integers(1, 900), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_the_reference_chooses_the_best(judge_blocks, config, n, seed):
    q, k = tokens(n, H=4, H_kv=2, seed=seed)
    judge_blocks(S.select_blocks_reference(q, k, config, 0.5), q, k, config, 0.5, tolerance=0)


def test_a_key_that_the_first_query_asks_for_is_found():
    q, k = tokens(2048, H=2, H_kv=2, D=16)
    config = S.BlockConfig(1)
    begin = int(S.query_blocks(config, 2048, 2048).begin[-1])
    for head, token in enumerate((32 + 64 * 5, 32 + 64 * 9 + 63)):
        k[0, head, token] = 5 * q[0, head, begin]
    assert S.select_blocks_reference(q, k, config, 0.25)[0, :, -1].tolist() == [[5], [9]]


def test_more_blocks_hold_the_fewer_and_catch_more_mass():
    n = 2048
    q, k = tokens(n, H=4, H_kv=2, D=16)
    weights = [S.rows_visible(S.select_blocks_reference(q, k, S.BlockConfig(b), 0.25), S.BlockConfig(b), n, n)
               for b in (1, 2, 4, 8, 16, 32)]  # fmt: skip
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT) * 0.25
    p = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    caught = [float((p * seen[:, :, None]).sum(-1)[..., 1500:].mean()) for seen in weights]
    for fewer, more in zip(weights, weights[1:], strict=False):
        assert not (fewer & ~more).any()
    assert all(a < b for a, b in zip(caught, caught[1:], strict=False)) and caught[-1] == pytest.approx(1)
    last = torch.from_numpy(S.query_blocks(S.BlockConfig(4), n, n).candidates)[:, None] - torch.arange(4, 0, -1)
    newest = S.rows_visible(last.clamp(min=S.NONE).expand(1, 2, -1, 4), S.BlockConfig(4), n, n)
    assert caught[2] > float((p * newest[:, :, None]).sum(-1)[..., 1500:].mean())


def test_of_equal_blocks_the_first_ones_are_chosen():
    config = S.BlockConfig(3, sinks=0, recent=0, block=64)
    k = torch.ones(1, 1, 640, 8)
    chosen = S.select_blocks_reference(k, k, config, 1.0)
    assert chosen[0, 0, 3:].tolist() == [[0, 1, 2]] * 7
    assert torch.equal(chosen, S.select_blocks_triton(k, k, config, 1.0))


# -- causality, chunks, batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples, stride, block", [(1, 4, 128), (4, 9, 64), (3, 1, 16)])
def test_what_comes_later_changes_nothing_before_it(samples, stride, block):
    n, config = 700, S.BlockConfig(2, sinks=5, recent=20, samples=samples, stride=stride, block=block)
    q, k = tokens(n)
    out = attend(q, k, k, S.rows_visible(S.select_blocks_reference(q, k, config, 0.5), config, n, n), 0.5)
    changes = 0
    for token in range(130, n, 19):
        q2, k2 = q.clone(), k.clone()
        q2[:, :, token:] *= -3
        k2[:, :, token:] = q2[:, :1, token:].flip(2)
        seen = S.rows_visible(S.select_blocks_reference(q2, k2, config, 0.5), config, n, n)
        other = attend(q2, k2, k2, seen, 0.5)
        assert torch.equal(out[:, :, :token], other[:, :, :token])
        changes += not torch.equal(out[:, :, token:], other[:, :, token:])
    assert changes == len(range(130, n, 19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples, stride", [(1, 4), (3, 9)])
def test_a_prefill_in_chunks_chooses_what_a_single_piece_does(samples, stride, dtype):
    config = S.BlockConfig(2, sinks=5, recent=20, samples=samples, stride=stride, block=64)
    q, k = tokens(700, B=2, H=4, H_kv=2, dtype=dtype)
    whole = S.select_blocks_reference(q, k, config, 0.5)
    again = stride * (samples - 1)
    for first, stop in ((0, 345), (345, 409), (409, 601), (601, 700)):  # blocks begin 25 behind multiples of 64
        given = max(0, first - again)
        chosen = S.select_blocks_reference(q[:, :, given:stop], k[:, :, :stop], config, 0.5)
        own = (first + config.in_block(given) - given) // 64
        at = (first + config.in_block(0)) // 64
        assert torch.equal(chosen[:, :, own:], whole[:, :, at : at + chosen.shape[2] - own])


def test_a_single_query_chooses_for_itself():
    config = S.BlockConfig(2, sinks=0, recent=64)
    q, k = tokens(1000, H=4, H_kv=2)
    for Lk in (1, 64, 300, 777, 1000):
        chosen = S.select_blocks_reference(q[:, :, Lk - 1 : Lk], k[:, :, :Lk], config, 0.5)
        mass = brute_mass(q[:, :, Lk - 1 : Lk], k[:, :, :Lk], config, 0.5, Lk - 1)
        best = S.choose(mass[:, :, None], torch.tensor([mass.shape[-1]]), 2)
        assert torch.equal(chosen, best)


@pytest.mark.parametrize("run", [S.select_blocks_reference, S.select_blocks_triton])
def test_a_padded_sequence_chooses_what_it_does_alone(run):
    n, Lq, config = 300, 180, S.BlockConfig(2, sinks=3, recent=20, samples=2, block=64)
    q, k = tokens(n, B=4, H=4, H_kv=2, Lq=Lq, dtype=torch.float32)
    padding = torch.ones(4, n, dtype=torch.bool)
    padding[0, :130], padding[1, -70:], padding[2, 100:160] = False, False, False
    pad = Packing(padding)
    start = pad.length - padding[:, n - Lq :].sum(1)
    chosen = run(pad.pack(q), pad.pack(k), config, 0.5, start)
    for b in range(4):
        real = padding[b]
        alone = run(q[b : b + 1, :, real[n - Lq :]], k[b : b + 1, :, real], config, 0.5)
        first = int(start[b] + config.in_block(0)) // 64  # the block that its first query is in
        assert torch.equal(chosen[b : b + 1, :, first : first + alone.shape[2]], alone)


@pytest.mark.parametrize("run", [S.select_blocks_reference, S.select_blocks_triton])
def test_a_sequence_chooses_the_same_in_any_batch(run):
    config = S.BlockConfig(2, sinks=3, recent=20, samples=2, block=64)
    q, k = tokens(300, B=3, H=4, H_kv=2, dtype=torch.float32)
    together = run(q, k, config, 0.5)
    for b in range(3):
        assert torch.equal(together[b : b + 1], run(q[b : b + 1], k[b : b + 1], config, 0.5))


# -- the kernels -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "n, Lq, B, H, H_kv, D, config",
    [
        (900, 900, 1, 2, 1, 16, S.BlockConfig(3, samples=2)),
        (700, 700, 2, 3, 1, 20, S.BlockConfig(2, sinks=0, recent=0, block=64)),
        (650, 333, 1, 4, 4, 8, S.BlockConfig(4, sinks=70, recent=33, samples=3, stride=40, block=32)),
        (650, 1, 2, 6, 2, 33, S.BlockConfig(5, sinks=1, recent=9, samples=2, stride=1)),
        (40, 40, 1, 1, 1, 4, S.BlockConfig(2)),
        (500, 480, 1, 2, 2, 1, S.BlockConfig(40, sinks=64, recent=1, block=16)),
    ],
)
def test_the_kernel_chooses_the_best(judge_blocks, n, Lq, B, H, H_kv, D, config, dtype):
    q, k = tokens(n, B, H, H_kv, D, Lq, dtype)
    chosen = S.select_blocks_triton(q, k, config, 0.5)
    judge_blocks(chosen, q, k, config, 0.5)
    assert torch.equal(chosen, S.select_blocks_reference(q, k, config, 0.5)), "no mass of these is so near to another"


@given(config=configs(), n=st.integers(1, 500), past=st.integers(0, 300), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_kernel_chooses_the_best_whatever_the_shape(judge_blocks, config, n, past, seed):
    scale = (0.5, -0.5, 0.0)[seed % 3]
    q, k = tokens(n, H=2, H_kv=2, Lq=n - min(past, n - 1), dtype=torch.float32, seed=seed)
    judge_blocks(S.select_blocks_triton(q, k, config, scale), q, k, config, scale)


def test_a_long_prefill_in_parts_chooses_the_same(monkeypatch, launches_of):
    config = S.BlockConfig(2, sinks=3, recent=20, samples=2, block=32)
    q, k = tokens(400, B=2, H=2, H_kv=1, dtype=torch.float32)
    whole, launches = S.select_blocks_triton(q, k, config, 0.5), launches_of(S)
    for workspace, parts in ((1, 13), (4 * 2 * 8 * 4 * 5, 3)):  # bytes, sequences, columns, rows a block, blocks
        launches.clear()
        monkeypatch.setattr(S, "_WORKSPACE", workspace)
        assert torch.equal(S.select_blocks_triton(q, k, config, 0.5), whole)
        assert len(launches) == 2 * parts


@given(total=st.integers(1, 300), step=st.sampled_from([1, 7, 64]), fixed=st.integers(0, 50), each=st.integers(0, 9))
def test_parts_cover_all_blocks_once_and_fit_into_the_workspace(total, step, fixed, each):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S, "_WORKSPACE", 1000)
        parts = list(S._parts(total, step, lambda n: 1 + fixed + each * n))
    assert [x for first, blocks in parts for x in range(first, first + blocks)] == list(range(total))
    for first, blocks in parts:
        assert blocks == 1 or blocks * (1 + fixed + each * (first + blocks)) <= 1000
        more = min(first + blocks + step, total)
        assert blocks < step or first + blocks == total or (blocks + step) * (1 + fixed + each * more) > 1000
        assert blocks <= step or blocks % step == 0 or first + blocks == total


@pytest.mark.parametrize("run", [S.select_blocks_reference, S.select_blocks_triton])
def test_strides_and_gradients_do_not_matter(run):
    config = S.BlockConfig(2, sinks=3, recent=20, block=32)
    q, k = tokens(300, H=2, H_kv=1, dtype=torch.float32)
    wide = torch.full((1, 300, 3, 16), math.nan)
    wide[:, :, :2, ::2], wide[:, :, 2:, ::2] = q.transpose(1, 2), k.transpose(1, 2)
    strided = wide.transpose(1, 2)[..., ::2].requires_grad_()
    chosen = run(strided[:, :2], strided[:, 2:], config, 0.5)
    assert torch.equal(chosen, run(q, k, config, 0.5))
    assert not chosen.requires_grad


@pytest.mark.parametrize("run", [S.select_blocks_reference, S.select_blocks_triton])
def test_nan_chooses_the_first_blocks_and_spoils_no_other_head(run):
    config = S.BlockConfig(2, sinks=3, recent=20, block=32)
    q, k = tokens(300, H=2, H_kv=2, dtype=torch.float32)
    clean = run(q, k, config, 0.5)
    k[0, 0, 0] = math.nan
    chosen = run(q, k, config, 0.5)
    assert torch.equal(chosen[0, 1], clean[0, 1])
    assert chosen[0, 0, -3:].tolist() == [[0, 1]] * 3


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, message",
    [
        ({"blocks": 0}, "blocks=0: must be 1 or more"),
        ({"sinks": -1}, "sinks=-1: must be 0 or more"),
        ({"recent": -1}, "recent=-1: must be 0 or more"),
        ({"samples": 0}, "samples=0: must be 1 or more"),
        ({"stride": 0}, "stride=0: must be 1 or more"),
        ({"block": 48}, "block=48: must be 16, 32, 64 or 128 queries"),
    ],
)
def test_options_that_mean_nothing_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        S.BlockConfig(**{"blocks": 1, **option})


@pytest.mark.parametrize("run", [S.select_blocks_reference, S.select_blocks_triton])
def test_tensors_that_do_not_fit_are_named(run):
    q, k = tokens(64)
    with pytest.raises(ValueError, match="query: 64 rows; must be at most the number of keys, 60"):
        run(q, k[:, :, :60], S.BlockConfig(1), 1.0)
    with pytest.raises(ValueError, match=r"start: torch.int32 of shape \(1,\); must be int64 \[1\]"):
        run(q, k, S.BlockConfig(1), 1.0, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="query: shape .*; heads and length must be 1 or more"):
        run(q[:, :, :0], k, S.BlockConfig(1), 1.0)
    with pytest.raises(TypeError, match="key: dtype"):
        run(q, k.float(), S.BlockConfig(1), 1.0)


def test_the_kernel_takes_no_float64():
    with pytest.raises(TypeError, match="query: dtype torch.float64; the kernel takes float16, bfloat16 or float32"):
        S.select_blocks_triton(*tokens(64), S.BlockConfig(1), 1.0)
