"""Rows per KV head: what they say, what they refuse, and that plans of them come back from JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from express_compile import METHODS, Policy, SavedPlan, SavedSite, Site
from express_compile.core.rows import Rows, describe, heads

COUNTS = st.integers(0, 2**40)
ROWS = st.just(Rows(everything=True)) | st.builds(
    Rows, sinks=COUNTS, recent=COUNTS, protected=COUNTS, selected=COUNTS,
    thinned=st.just(0) | st.integers(0, 40).map(lambda k: 1 << k),
)  # fmt: skip


@given(ROWS)
def test_rows_come_back_as_they_were(rows: Rows) -> None:
    assert Rows.from_data(json.loads(json.dumps(rows.to_data()))) == rows


@given(st.lists(ROWS, max_size=5))
def test_plans_keep_the_rows_of_every_head(rows: list[Rows]) -> None:
    plan = SavedPlan((SavedSite("a", 0, "express", "rewritten", rows=tuple(rows)),))
    again = SavedPlan.from_json(plan.to_json())
    assert again == plan and again.sites[0].rows == tuple(rows)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"sinks": -1}, ValueError, "sinks=-1: must be a number of rows, 0 or more"),
        ({"recent": 2.0}, TypeError, "recent=2.0: must be of type int"),
        ({"thinned": 12}, ValueError, "thinned=12: must be 0 or a power of two"),
        ({"everything": 1}, TypeError, "everything=1: must be True or False"),
        ({"everything": True, "recent": 3}, ValueError, "recent=3: must be 0 beside everything=True"),
        (
            {"windows": 3},
            TypeError,
            "rows: windows; must be an object of everything, protected, recent, selected, sinks",
        ),
    ],
)
def test_bad_rows_name_the_source_its_value_and_what_is_allowed(given: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        Rows.from_data(given)
    with pytest.raises(error, match=rf"^rows\[1\]: {words}"):
        heads([{}, given])


def test_a_list_of_heads_is_told_from_other_things() -> None:
    for bad in (5, "rows", {"sinks": 1}):
        with pytest.raises(TypeError, match="must be a list with an entry for every KV head"):
            heads(bad)


def test_rows_read_as_what_they_are() -> None:
    assert str(Rows(32, 256, 512, 256)) == "32 sinks + 256 recent + 512 thinned + 256 protected"
    assert str(Rows(selected=8)) == "8 selected blocks"
    assert str(Rows(everything=True)) == "everything" and str(Rows()) == "nothing"
    assert describe([Rows(4)] * 3) == "4 sinks"
    assert describe([Rows(4), Rows(4), Rows(everything=True)]) == "2 heads: 4 sinks, 1 head: everything"


def test_express_says_what_each_of_its_heads_sees() -> None:
    site = Site()
    policy = Policy(budget=700, sinks=4, window=8, protected=0)
    assert METHODS["express"].heads(site, policy) == (Rows(sinks=4, recent=8, thinned=512),)
    assert METHODS["exact"].heads(site, policy) == (Rows(everything=True),)
    assert METHODS["sparse"].heads(site, policy) == ()
