"""Heads that two processes share, over gloo: what work_tensor.py found there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from express_compile import METHODS, Policy, Rows
from express_compile.core.shards import SEEDS, declare, seed_of, shard_at, shard_of
from express_compile.core.spec import AttentionSpec, HeadShard, Mask
from express_compile.kernels.launch import philox_uniform
from express_compile.planning.choose import Question, answer


@pytest.fixture(scope="module")
def found(of_ranks: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return of_ranks("work_tensor.py", 2)


def test_every_op_takes_dtensors_and_gives_the_bits_of_one_process_by_heads_by_batch_and_replicated(
    found: list[dict[str, Any]],
) -> None:
    ops = {case for case, *_ in found[0]["ops"]}
    assert ops == {
        "express", "heads", "heads, each query head its own rows", "santa", "santa, each head its own rows", "sparse",
        "thinformer",
    }  # fmt: skip
    for rank in found:
        apart = {case: distance for case, distance in rank["ops"].items() if distance}
        # its reference multiplies as many blocks at once as fit, which are more of fewer heads
        rounded = {case: apart.pop(case, 0.0) for case in [("sparse", True, "S(1)")]}
        assert not apart
        assert max(rounded.values()) < 1e-5


@pytest.mark.parametrize("method", ["express", "heads", "sparse"])
def test_a_model_that_transformers_shards_gives_the_bits_of_one_process(
    found: list[dict[str, Any]], method: str
) -> None:
    for rank, parts in enumerate(found):
        one = parts["transformers"][method]
        assert one["same"] and one["error"] > 0.1
        assert one["shard"] == HeadShard(2 * rank, 2, 4)


def test_gradients_through_a_sharded_model_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for parts in found:
        gradients = parts["transformers"]["gradients"]
        assert len(gradients) == 21 and max(gradients.values()) < 1e-5


def test_sampled_decoding_draws_for_global_heads(found: list[dict[str, Any]]) -> None:
    assert all(parts["transformers"]["decoding"] for parts in found)


def test_caches_hold_what_those_of_one_process_hold(found: list[dict[str, Any]]) -> None:
    for parts in found:
        for case in ("one plan", "per head"):
            apart, error = parts["cached"][case]  # steps of fewer heads are rounded otherwise
            assert apart < 1e-6 and error > 0.1
        assert parts["cached"]["saved"]
    words = "heads 2 to 3 of 4 were saved, and this process has all heads"
    assert words in found[1]["cached"]["other heads"]


def test_a_plan_that_a_process_saves_is_that_of_all_heads(found: list[dict[str, Any]]) -> None:
    for parts in found:
        rows, H_kv, distance = parts["transformers"]["saved plan"]
        assert (rows, H_kv) == (4, 4) and distance < 1e-5


def test_processes_that_train_parts_of_a_batch_by_a_plan_have_the_gradients_of_one(found: list[dict[str, Any]]) -> None:
    for parts in found:
        own = parts["data parallel"]
        assert [len(rows) for rows in own["rows"]] == [4, 4]
        assert len(own["distances"]) == 21 and max(own["distances"].values()) < 1e-5 < 0.05 < own["error"]


def test_plain_modules_of_dtensors_on_both_routes(found: list[dict[str, Any]]) -> None:
    for rank, parts in enumerate(found):
        assert set(parts["plain"]) == {("sdpa", "local"), ("written", "local"), ("written", "DTensor")}
        for (_, tensors), case in parts["plain"].items():
            assert case["error"] > 0.01
            assert max(case["rewritten"], case["compiled"]) < 1e-6
            assert case["shard"] == (HeadShard(2 * rank, 2, 4) if tensors == "local" else None)


def test_weights_that_are_plain_tensors_need_shard_heads(found: list[dict[str, Any]]) -> None:
    assert all(parts["declared"]["distance"] < 1e-6 for parts in found)


def test_parts_that_take_turns_over_more_heads_than_a_process_has_are_refused(found: list[dict[str, Any]]) -> None:
    reason = "sparse gives every 8 heads their parts in turn; a process has 4 of them"
    assert [parts["refused"]["groups"] for parts in found] == [reason, reason]


# ---- in one process --------------------------------------------------------------------------------------------------


def test_the_upper_half_of_a_seed_is_the_number_of_the_first_head() -> None:
    heads, seed, draw = torch.arange(8)[:, None], torch.tensor(SEEDS), torch.arange(5)
    every = philox_uniform(seed, 3, draw, 1, 2, heads)
    part = philox_uniform(seed_of(seed, HeadShard(6, 2, 8)), 3, draw, 1, 2, heads[:2])
    assert torch.equal(part, every[6:]) and not torch.equal(part, every[:2])


def test_a_part_of_the_heads_takes_its_entries_of_what_is_listed_per_head() -> None:
    rows, shard = list(range(4 * 6)), HeadShard(2, 1, 4)
    assert METHODS["heads"].part({"rows": rows, "block": 64}, shard) == {"rows": list(range(12, 18)), "block": 64}
    assert METHODS["heads"].part({"rows": rows[:6]}, shard) == {"rows": rows[:6]}
    assert METHODS["santa"].part({"draws": list(range(8))}, shard)["draws"] == [4, 5]
    assert METHODS["express"].part({"s": 4}, shard) == {"s": 4}


def test_a_decision_is_that_for_all_heads() -> None:

    spec = AttentionSpec(1, 4, 2, 99, 99, 8, 8, torch.float32, "cpu", 1.0, Mask(causal=True), shard=HeadShard(2, 2, 4))
    rows = [Rows(0, 8 + i) for i in range(4)]
    policy = Policy(methods=["heads"], method_options={"heads": {"rows": rows}})
    assert answer(Question(spec=spec), policy).rows == tuple(rows)
    alone = answer(Question(spec=spec.whole), policy)
    assert answer(Question(spec=spec), policy) == alone and spec.whole.H == 8


@pytest.mark.parametrize(
    ("ranks", "total", "of_each"),
    [(1, 8, [None]), (2, 8, [(0, 4, 8), (4, 4, 8)]), (4, 2, [(0, 1, 2), (0, 1, 2), (1, 1, 2), (1, 1, 2)])],
)
def test_ranks_of_an_engine_have_their_part_or_a_copy_of_the_kv_heads(ranks: int, total: int, of_each: list) -> None:
    assert [shard_at(rank, ranks, total) for rank in range(ranks)] == of_each


def test_modules_without_sharded_weights_have_all_heads_unless_it_is_declared() -> None:
    module = torch.nn.Linear(8, 8)
    assert shard_of(module, 4, 2, 8) is None
    declare(module, 1, 3)
    assert shard_of(module, 4, 2, 8) == HeadShard(2, 2, 6)
