"""Pieces of work beside each other: what waits for what, by streams that only say so."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from express_compile.core.call import Call
from express_compile.core.rows import Rows
from express_compile.kernels import heads as P
from express_compile.kernels import streams

DEVICE = torch.device("cuda", 0)


class Work:
    """What was given to streams: ``before[x]`` is what has to be done before ``x`` starts."""

    def __init__(self) -> None:
        self.before: dict[str, frozenset[str]] = {}
        self.current = [Stream(self)]

    def __call__(self, name: str) -> None:
        stream = self.current[-1]
        self.before[name] = stream.done
        stream.done |= {name}

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()


class Stream:
    def __init__(self, work: Work) -> None:
        self.work, self.done = work, frozenset[str]()

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(streams, "_own", threading.local())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(work))
    monkeypatch.setattr(torch.cuda, "stream", work.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work.current[-1])
    return work


@pytest.mark.parametrize("stops", [False, True])
def test_pieces_are_behind_what_was_before_and_beside_everything_else(work: Work, stops: bool) -> None:
    for turn in "ab":  # the second time with the same streams
        work(f"{turn}0")
        with contextlib.suppress(KeyError), streams.beside(DEVICE) as piece:
            for i in (1, 2):
                with piece():
                    work(f"{turn}{i}")
                    work(f"{turn}{i}, then")
            work(f"{turn}3")
            if stops:
                raise KeyError
        work(f"{turn}4")
    first = {f"a{x}" for x in ("0", "1", "2", "3", "4", "1, then", "2, then")}
    for turn, past in (("a", set()), ("b", first)):
        start = past | {f"{turn}0"}
        assert all(work.before[turn + x] == start for x in "123")
        assert all(work.before[f"{turn}{i}, then"] == start | {f"{turn}{i}"} for i in (1, 2))
        assert work.before[f"{turn}4"] == start | {turn + x for x in ("1", "2", "3", "1, then", "2, then")}


def test_threads_have_streams_of_their_own_and_use_them_again(work: Work) -> None:
    found: list[Any] = []

    def run() -> None:
        found.append([streams._stream(DEVICE, i) for i in (0, 1, 0)])

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert all(x[0] is x[2] is not x[1] for x in found) and not {*map(id, found[0])} & {*map(id, found[1])}


def test_elsewhere_pieces_are_done_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "current_stream")
    with streams.beside(torch.device("cpu")) as piece, piece():
        pass


@pytest.mark.parametrize("other", [Rows(2, 9), Rows(2, 9, selected=1)], ids=str)
def test_heads_thin_beside_each_other_and_beside_choices(
    work: Work, monkeypatch: pytest.MonkeyPatch, other: Rows
) -> None:
    """The longest chain first, attention after all, and the results are what they are elsewhere."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 150, 16, generator=generator) for _ in range(3))
    call = Call(q, k, v, None, torch.tensor(7), 0.5, 3)
    own = P.PerHead([Rows(2, 9, 4), Rows(2, 9, 8), other, Rows(2, 9, 4)], block=32)
    expected = P.together(call, own, None)

    def told(function: str, name: Callable[..., str]) -> None:
        run = getattr(P, function)
        monkeypatch.setattr(P, function, lambda *args: (work(name(*args)), run(*args))[1])

    told("select_into", lambda *args: f"thin {args[3].config.s}")
    told("select_blocks_triton", lambda *_: "choose")
    told("mixed_attention_triton", lambda *_: "attend")
    monkeypatch.setattr(P, "beside", lambda device: streams.beside(DEVICE))
    assert all(map(torch.equal, P.together(call, own, None), expected))
    *before, last = work.before
    assert before == ["thin 8", "thin 4", *["choose"] * bool(other.selected)] and last == "attend"
    assert all(work.before[x] == frozenset() for x in before) and work.before[last] == {*before}
    assert len(streams._own.__dict__[str(DEVICE)]) == len(before) - 1  # the last one needs no stream of its own
