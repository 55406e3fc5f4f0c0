"""Plans per query head: each one sees its own rows, of which those that are chosen are of what its KV head chose."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.call import Call
from express_compile.core.cost import Cost
from express_compile.core.method import METHODS, cost_at
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows, to_numbers
from express_compile.core.spec import AttentionSpec, HeadShard, Mask, Site
from express_compile.kernels import heads as P
from express_compile.kernels.attend import segments
from express_compile.kernels.attend.job import HEAD, PART, SHIFT, STOP
from express_compile.kernels.attend.segments import SegmentTiles
from express_compile.kernels.launch import Widths
from express_compile.kernels.select import blocks, contest, thinning
from express_compile.kernels.select.blocks import NONE, select_blocks_triton
from express_compile.planning.choose import plan
from express_compile.planning.devices import shipped
from express_compile.planning.predict import predict

SEED = torch.tensor(7)
WINDOW, CORE, PLACES = Rows(2, 9), Rows(2, 9, 8), Rows(3, 5, protected=20)
KEPT, ONE, TWO, WHOLE = Rows(2, 9, 8, 20), Rows(2, 9, selected=1), Rows(2, 9, selected=2), Rows(everything=True)
LATE = Rows(2, 40, selected=1)  # another tail
FEWER, MORE = Rows(3, 300, protected=20), Rows(3, 9, 8, 300)  # contests than PLACES, and places
SOURCES = [WINDOW, CORE, PLACES, KEPT, ONE, TWO, LATE, WHOLE]

mixtures = st.sampled_from([(1, 2), (1, 3), (2, 2), (2, 3), (3, 3)]).flatmap(
    lambda x: st.tuples(st.just(x[0]), st.lists(st.sampled_from(SOURCES), min_size=x[0] * x[1], max_size=x[0] * x[1]))
)
"""The number of KV heads, and the rows of every query head."""


def op(q, k, v, rows, padding=None, min_length=0, last=0):
    options = dict(halving="balanced", inflation=-1, flatten=0.0, block=16, min_length=min_length, last=last)
    return METHODS["heads"].op(q, k, v, padding, SEED, 0.5, 3, rows=to_numbers(rows), **options)


def one_by_one(q, k, v, rows, **own: Any) -> list[torch.Tensor]:
    """Every query head where all heads of the layer have its rows."""
    alone = [op(q, k, v, [x], **own) for x in rows]
    return [torch.stack([found[i][:, head] for head, found in enumerate(alone)], 1) for i in range(2)]


@given(mixture=mixtures, n=st.sampled_from([64, 200, 513]), past=st.sampled_from([0, 40]))
@settings(max_examples=20)
def test_a_query_head_gets_what_it_gets_where_all_heads_have_its_rows(tokens, mixture, n, past):
    H_kv, rows = mixture
    q, k, v = tokens(n, len(rows), H_kv, B=1, Lq=n - past)
    for x, e in zip(op(q, k, v, rows), one_by_one(q, k, v, rows), strict=True):
        torch.testing.assert_close(x, e)


def test_it_is_the_call_with_a_key_and_a_value_for_every_query_head(tokens):
    """Of rows that are not chosen."""
    rows = [WINDOW, WHOLE, Rows(0, 30), Rows(5, 0), WINDOW, Rows()]
    q, k, v = tokens(400, 6, 2)
    expanded = op(q, *(x.repeat_interleave(3, 1) for x in (k, v)), rows)
    for x, e in zip(op(q, k, v, rows), expanded, strict=True):
        torch.testing.assert_close(x, e)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(expanded[0][:, 1], exact[:, 1])
    assert not torch.allclose(expanded[0][:, 2], exact[:, 2])


@pytest.mark.parametrize("rows", [[CORE, KEPT], [ONE, WINDOW]], ids=str)
def test_equal_rows_in_every_group_are_the_plan_per_kv_head_bit_for_bit(tokens, rows):
    q, k, v = (x.requires_grad_() for x in tokens(400, 6, 2, dtype=torch.float32))
    found, expected = (op(q, k, v, x) for x in (np.repeat(np.array(rows, object), 3).tolist(), rows))
    grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out, _ in (found, expected)]
    for x, e in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert torch.equal(x, e)


def test_more_blocks_are_the_blocks_of_fewer_and_others(tokens):
    """The query heads of a KV head have one order of its blocks."""
    q, k, v = tokens(400, 3, 1, B=1)
    v = torch.eye(400, dtype=torch.float64)[None, None]
    one, two, three = (op(q, k, v, [ONE, TWO, Rows(2, 9, selected=3)])[0][0] > 0).unbind()
    assert (one <= two).all() and (two <= three).all()
    assert [int(x[-1].sum() - one[-1].sum()) for x in (two, three)] == [64, 128]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_a_least_length_and_exact_last_queries(tokens, side):
    rows = [WINDOW, CORE, TWO, ONE, ONE, WHOLE]
    q, k, v = tokens(300, 6, 2)
    padding = torch.ones(2, 300, dtype=torch.bool)
    padding[0, slice(90) if side == "left" else slice(210, 300)] = False
    for own in (dict(min_length=250), dict(last=5), {}):
        expected = one_by_one(q, k, v, rows, padding=padding, **own)
        for x, e in zip(op(q, k, v, rows, padding=padding, **own), expected, strict=True):
            torch.testing.assert_close(x, e)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [[WINDOW, CORE, TWO, ONE, ONE, WHOLE], [KEPT, KEPT, PLACES, KEPT, CORE, LATE]], ids=str
)
def test_gradients_are_the_sums_of_those_of_the_query_heads(tokens, rows):
    """Padded, the last queries exact."""
    leaves = [x.requires_grad_() for x in tokens(330, 6, 2, Lq=300)]
    padding = torch.arange(330) >= torch.tensor([[40], [0]])
    grad = torch.randn(2, 6, 300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(op(*leaves, rows, padding, last=3)[0], leaves, grad)
    expected = [torch.zeros_like(x) for x in leaves]
    for head, own in enumerate(rows):
        alone = torch.zeros_like(grad)
        alone[:, head] = grad[:, head]
        parts = torch.autograd.grad(op(*leaves, [own], padding, last=3)[0], leaves, alone)
        expected = [x + part for x, part in zip(expected, parts, strict=True)]
    for x, e in zip(found, expected, strict=True):
        torch.testing.assert_close(x, e)


def test_gradcheck(tokens):
    leaves = [x.requires_grad_() for x in tokens(150, 3, 1, B=1, D=2, Dv=2)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, [CORE, ONE, WINDOW])[0], leaves, atol=1e-6, fast_mode=True)


def test_opcheck(tokens):
    leaves = [x.requires_grad_() for x in tokens(150, 4, 2)]
    options = dict(rows=to_numbers([CORE, ONE, WINDOW, WHOLE]), halving="balanced", inflation=-1, flatten=0.0, block=16)
    args = (*leaves, None, SEED, 0.5, 3)
    torch.library.opcheck(METHODS["heads"].op, args, {**options, "min_length": 0})
    out, lse = (x.detach() for x in METHODS["heads"].op(*args, **options, min_length=0))
    given_back = (out, out, lse, *(x.detach() for x in leaves), *args[3:])
    torch.library.opcheck(torch.ops.express_compile.heads_backward.default, given_back, {**options, "min_length": 0})


# -- the kernels, in the interpreter -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("H_kv", "rows", "n", "Lq", "last"),
    [
        (2, [WINDOW, ONE, WHOLE, TWO, ONE, CORE], 250, None, 33),
        (2, [CORE, CORE, KEPT, CORE, WHOLE, WHOLE], 310, 60, 0),
        (3, [WHOLE, WINDOW, PLACES, WHOLE, WHOLE, WHOLE], 310, None, 0),
        (1, [LATE, Rows(2, 9, selected=3), TWO], 350, 100, 70),
        (3, [TWO, TWO, ONE, TWO, WINDOW, LATE], 250, None, 0),
        (3, [KEPT, KEPT, KEPT, WINDOW, KEPT, KEPT], 310, 60, 5),
        (2, [PLACES, MORE, FEWER, FEWER, KEPT, PLACES], 620, 60, 0),
    ],
    ids=str,
)
def test_one_launch_for_all_query_heads_gives_each_what_the_reference_gives(
    tokens, H_kv, rows, n, Lq, last, judge_together
):
    """Two sequences; whatever was in the memory that it takes."""
    q, k, v = tokens(n, len(rows), H_kv, D=16, Dv=16, Lq=Lq, dtype=torch.float32)
    judge_together(q, k, v, rows, last)


def test_kv_heads_with_equal_rows_thin_together_however_many_query_heads_have_them():
    rows = P.PerHead([KEPT, KEPT, KEPT, WINDOW, KEPT, KEPT, CORE, WHOLE], block=32)
    what = P._together(rows, 2, 2, 4, 1000, 1000, mixed=False)
    assert [x.heads for x in what.thinned] == [(0, 2, 1), (3,)]
    assert [x.queries for x in what.mixture.shares] == [(0, 1, 4, 5), (2,), (3,), (6,)]


def test_rows_of_three_kinds_compete_in_four_launches_and_those_behind_other_sinks_in_three_more(tokens, launches_of):
    """Two of them in one. And a coreset of one kind begins with zeros that a contest of another one has written."""
    launches, thinned = launches_of(contest), launches_of(thinning)
    q, k, v = tokens(620, 8, 2, D=16, Dv=16, dtype=torch.float32, Lq=60)
    kernels = [contest._sum_kernel, contest._score_kernel, contest._contest_kernel]
    for other, more in ((WINDOW, []), (Rows(2, 9, protected=20), kernels)):
        launches.clear()
        thinned.clear()
        P.together(Call(q, k, v, None, SEED, 0.5, 3), P.PerHead([PLACES, MORE, FEWER, other] * 2, block=32), None)
        assert [kernel for kernel, _ in launches] == [*kernels, kernels[-1], *more]
        assert launches[0][1][-1] == launches[1][1][-1] == 4, "two sequences of two KV heads"
        assert [kernel for kernel, _ in thinned] == [thinning._thin_kernel]


def test_keys_are_scored_once_for_all_query_heads_of_a_kv_head(tokens, launches_of):
    rows = [ONE, TWO, TWO, WINDOW, WINDOW, WINDOW, TWO, Rows(2, 9 + 32, selected=3), ONE]
    q, k, v = tokens(250, 9, 3, D=16, Dv=16, dtype=torch.float32)
    call, own = Call(q, k, v, None, SEED, 0.5, 3), P.PerHead(rows, block=32)
    launches = launches_of(blocks)
    (family,) = P._families(own, 3, 9, 250)
    chosen = P._choose(call, family, None)
    # two KV heads of two sequences; of the first one block and two, of the last one, two and three
    assert [grid[-1] for _, grid in launches] == [4, 10]
    assert sorted(zip(family.heads, (x.selected for x in family.rows), strict=True)) == [
        (0, 1), (0, 2), (2, 1), (2, 2), (2, 3)
    ]  # fmt: skip
    for group in family.groups:
        query, key = (group.take(x, 3) for x in (q, k))
        alone = select_blocks_triton(query, key, own.config(group.rows), 0.5)
        found, beyond = chosen[:, family.at(group)].tensor_split([group.rows.selected], 3)
        assert torch.equal(found, alone) and (beyond == NONE).all()


@given(
    mixture=mixtures, n=st.sampled_from([64, 290, 1000]), past=st.sampled_from([0, 200]), hopper=st.booleans(),
    mixed=st.booleans(), last=st.sampled_from([0, 17]),
)  # fmt: skip
def test_every_query_of_every_head_that_is_not_exact_is_in_one_job(mixture, n, past, hopper, mixed, last):
    (H_kv, rows), Lq = mixture, max(1, n - past)
    H, last = len(rows), min(last, Lq - 1)
    what = P._together(P.PerHead(rows, block=32), 2, H // H_kv, H_kv, Lq, n, mixed, last)
    exact = [h for h, x in enumerate(rows) if n <= P.exact_up_to(x)]
    if mixed and what.mixture is not None:
        exact = []
    assert sorted(h for group in what.exact for h in group.queries) == exact
    for group in what.exact:
        G = len(group.queries) // len(group.heads)
        assert [h * H_kv // H for h in group.queries] == [h for h in group.heads for _ in range(G)]
    if what.mixture is None:
        assert len(exact) == H
        return
    jobs = what.mixture.lists(SegmentTiles(Widths(8, 8, 16, 16), 16, 16, 4, 1, hopper), 1)[0]
    covered = np.zeros((H, Lq), int)
    for job in jobs.tolist():
        first = job[PART] * 16 - job[SHIFT]
        covered[job[HEAD], max(0, first) : min(first + 16, job[STOP])] += 1
    assert (covered == np.isin(np.arange(H), exact, invert=True)[:, None]).all()


# -- as a method ---------------------------------------------------------------------------------------------------


def spec(**changes: Any) -> AttentionSpec:
    base = dict(B=1, H=6, H_kv=2, Lq=600, Lk=600, D=8, Dv=8, dtype=torch.float32, device="cpu", scale=0.5)
    return AttentionSpec(**{**base, "mask": Mask(causal=True), **changes})


def test_a_site_takes_rows_for_its_query_heads_and_no_other_number(tokens):
    rows = [CORE, ONE, WHOLE, WINDOW, TWO, TWO]
    policy = Policy(methods=[P.PerHead(rows)])
    made = plan(spec(), policy)
    assert made.verdict == "rewritten", made.reason
    assert made.rows == tuple(rows) and made.params["rows"] == to_numbers(rows)
    assert Policy.from_json(policy.to_json()) == policy
    refused = plan(spec(H=12, H_kv=4), policy)
    assert refused.reason == "rows lists 6 heads, the site has 4 KV heads and 12 query heads"
    with pytest.raises(ValueError, match="rows lists 3 heads, the call has 2 KV heads and 6 query heads"):
        op(*tokens(20, 6, 2), [CORE] * 3)


def test_a_part_of_the_heads_takes_the_rows_of_their_query_heads():
    rows = [CORE, ONE, WHOLE, WINDOW, TWO, TWO]
    params = METHODS["heads"].params(Site(), Policy(methods=[P.PerHead(rows)]))
    assert METHODS["heads"].part(params, HeadShard(1, 1, 2))["rows"] == to_numbers(rows[3:])


def cost_of(rows: list[Rows], **own: Any) -> Cost:
    """For 8,192 tokens, six query heads on two KV heads."""
    params = METHODS["heads"].params(Site(), Policy(methods=[P.PerHead(rows, **own)]))
    found = cost_at("heads", spec(Lq=8192, Lk=8192), params)
    assert found is not None
    return found


FAR, FEW, MANY, NEAR = Rows(32, 256, 64), Rows(32, 256, selected=8), Rows(32, 256, selected=16), Rows(32, 256)
HELD = Rows(32, 256, protected=64)


def test_the_heads_of_a_kv_head_that_are_alike_cost_what_a_plan_per_kv_head_says():
    for rows in ([FEW, MANY], [FAR, WHOLE], [HELD, NEAR]):
        assert cost_of(np.repeat(np.array(rows, object), 3).tolist()) == cost_of(rows)


def test_what_is_done_for_a_kv_head_is_counted_once_however_many_of_its_query_heads_need_it():
    """To thin, to let rows compete, to score blocks; what query heads attend to is counted for each."""
    for name in ("entries", "scores", "bytes"):

        def of(*rows: Rows, name: str = name) -> float:
            return getattr(cost_of(list(rows)), name)

        whole, none = of(*[FAR] * 6), of(*[NEAR] * 6)
        one, three, apart = of(FAR, *[NEAR] * 5), of(*[FAR] * 3, *[NEAR] * 3), of(FAR, NEAR, NEAR, FAR, NEAR, NEAR)
        if name == "scores":
            assert one - none == pytest.approx((whole - none) / 6) and three - none == pytest.approx((whole - none) / 2)
        if name == "entries":
            assert one == three == whole / 2 > 0 == none and apart == whole
        if name == "bytes":  # of its keys what it attends to, and contests
            read, again = 4 * 2 * 8 * (8192 - 32 - 256), 4 * 2 * 8 * 30 * contest.CONTEST
            assert of(HELD, *[NEAR] * 5) - of(Rows(32, 320), *[NEAR] * 5) == read
            other, long, longer = Rows(32, 256, protected=128), Rows(32, 320), Rows(32, 384)
            one = of(HELD, other, *[NEAR] * 4) - of(long, longer, *[NEAR] * 4)
            two = of(HELD, NEAR, NEAR, other, NEAR, NEAR) - of(long, NEAR, NEAR, longer, NEAR, NEAR)
            assert one == 2 * read - again and two == 2 * read, "kinds of one KV head, and of two"
    alone = {x: cost_of([x] * 6).scores / 6 for x in (FEW, MANY, NEAR)}
    choice = 8192 / 128 * 8192 / 2
    of_one, of_both = ([FEW] + [NEAR] * 5, [FEW, MANY] + [NEAR] * 4), [FEW, NEAR, NEAR, MANY, FEW, FEW]
    for rows, KV_heads in ((of_one[0], 1), (of_one[1], 1), (of_both, 2)):
        attention = sum(alone[x] - choice * bool(x.selected) for x in rows)
        assert cost_of(rows).scores == pytest.approx(attention + 3 * KV_heads * choice)


def test_launches_are_those_that_the_kernels_make(tokens, monkeypatch):
    """All but fills: one of attention, two for choices that go together, and of all rows that thin; three of all that
    protect, and one more for each other kind of contests."""
    calls = Counter[str]()
    for module in (blocks, contest, segments, thinning):

        def counted(kernel: Any, *args: Any, run: Any = module.launch, **options: Any) -> None:
            calls.update([kernel.fn.__name__])
            run(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    late = Rows(2, 9 + 32, selected=3)
    held = [PLACES, FEWER, MORE, Rows(3, 5, protected=600), KEPT, PLACES]
    for rows in (
        [KEPT, WINDOW, KEPT, ONE, TWO, CORE], [ONE, late, LATE, WINDOW, CORE, CORE], [PLACES, WINDOW] * 3, held
    ):  # fmt: skip
        own = P.PerHead(rows, block=32, last=7)
        q, k, v = tokens(700, 6, 2, B=1, D=16, Dv=16, dtype=torch.float32, Lq=40)
        calls.clear()
        P.together(Call(q, k, v, None, SEED, 0.5, 3), own, None, own.last)
        params = METHODS["heads"].params(Site(), Policy(methods=[own]))
        at = spec(Lq=40, Lk=700, D=16, Dv=16, mask=Mask(causal=True, offset=660))
        assert cost_at("heads", at, params).launches == calls.total() - calls["_zero_kernel"], (rows, calls)


def test_fewer_exact_query_heads_are_predicted_to_be_faster():
    H200 = shipped()["NVIDIA H200"]
    at = spec(H=24, H_kv=8, Lq=32_768, Lk=32_768, D=128, Dv=128, dtype=torch.bfloat16, device="cuda")
    times = [
        predict("heads", at, Policy(methods=[P.PerHead([WHOLE] * i + [Rows(32, 256)] * (24 - i))]), H200)
        for i in range(25)
    ]
    assert times[:-1] == sorted(times[:-1]) and times[24] == predict("exact", at, Policy(), H200)
    assert times[12] < times[24]
