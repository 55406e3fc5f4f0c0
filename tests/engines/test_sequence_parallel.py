"""Sequences that two or four processes have in parts, over gloo: what work_sequence.py found there."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from express_compile.engines.distributed import SequenceParts


@pytest.fixture(scope="module")
def two(of_ranks: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return of_ranks("work_sequence.py", 2)


@pytest.fixture(scope="module")
def four(of_ranks: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return of_ranks("work_sequence.py", 4)


@pytest.fixture(params=["two", "four"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


def test_all_to_all_gives_the_bits_of_one_process_for_every_method(found: list[dict[str, Any]]) -> None:
    for parts in found:
        same = {case: equal for case, equal in parts["all_to_all"].items() if case != "copied"}
        assert set(same) == {"express", "exact", "heads", "query heads", "sparse", "eager", "thinformer"}
        assert all(same.values()), same


def test_all_to_all_copies_kv_heads_where_there_are_fewer_than_processes(found: list[dict[str, Any]]) -> None:
    assert all(parts["all_to_all"]["copied"] < 1e-5 for parts in found)


def test_gradients_through_all_to_all_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    for parts in two:
        assert len(parts["gradients"]) == 21 and max(parts["gradients"].values()) < 1e-5


def test_gradients_of_weights_that_fsdp_shards_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    for parts in two:
        assert len(parts["FSDP"]) == 21 and max(parts["FSDP"].values()) < 1e-5


def test_by_coresets_the_first_part_has_the_bits_of_one_process(found: list[dict[str, Any]]) -> None:
    assert found[0]["coresets"]["plan"] == ["express", 512]
    assert found[0]["coresets"]["first part as one process"]


def test_by_coresets_nothing_sees_what_comes_later(found: list[dict[str, Any]]) -> None:
    assert all(parts["coresets"]["causal"] for parts in found)
    assert found[0]["coresets"]["changed"] == 0.0 and found[-1]["coresets"]["changed"] > 1.0


def test_by_coresets_logits_are_approximate_and_exact_where_parts_are_short(found: list[dict[str, Any]]) -> None:
    for parts in found:
        assert 0.01 < parts["coresets"]["error"] < 1.2 * parts["coresets"]["error of one process"]
        assert parts["coresets"]["short parts are exact"] < 1e-5
        assert parts["coresets"]["left exact"] == 0.0


def test_bytes_that_are_sent_are_those_of_the_formulas(found: list[dict[str, Any]]) -> None:
    for parts in found:
        sent = parts["sent"]
        assert [sent["all_to_all"], sent["coresets"]] == sent["formulas"]
    sent, ranks = found[0]["sent"], len(found)
    assert sent["ring"] == (ranks - 1) * 2 * 2 * (512 // ranks) * 16 * 4
    assert sent["all_to_all"] == (ranks - 1) / ranks * 2 * (512 // ranks) * (8 + max(2, ranks)) * 16 * 4


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("gradient", "has no gradient, and one is needed; use how='all_to_all', or torch.no_grad"),
        ("padding", "some of its tokens are padding"),
        ("packed", "its mask is not proven: packed sequences"),
        ("cache", "it has 1 queries and 257 keys, so it continues a cache"),
        ("uneven", r"processes have parts of [256, 255] tokens"),
        ("window", "it has a window of 412 tokens"),
        ("weights", "the call asks for attention weights"),
        ("heads", "is for Express, and its plan has heads; use how='all_to_all'"),
        ("odd", "1 heads and 1 KV heads for 2 processes"),
        ("query heads", "rows lists 8 heads, the site has 1 KV heads and 4 query heads"),
        ("watched", "cannot be watched; use how='all_to_all'"),
        ("how", "how='ring': must be one of 'all_to_all', 'coresets'"),
        ("not rewritten", "has no rewritten attention; call rewrite_attention(model) first"),
        ("mesh", "mesh: 2 dimensions"),
        ("captured", "is no call that transformers chooses by name"),
    ],
)
def test_what_parts_cannot_do_raises_with_its_reason_on_every_process(
    two: list[dict[str, Any]], case: str, words: str
) -> None:
    kind = "ValueError: " if case in ("how", "not rewritten", "mesh", "captured") else "RuntimeError: "
    kind = "Unmet: " if case == "query heads" else kind
    for parts in two:
        assert parts["refused"][case].startswith(kind) and words in parts["refused"][case]


def test_copies_have_the_same_parts_and_pickles_none() -> None:
    parts = SequenceParts(None, 0, 2, "all_to_all", "")
    assert deepcopy([parts])[0] is parts
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(parts)
