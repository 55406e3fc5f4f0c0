"""Files of measured rates: one that is not there, not whole or not true is as none, and says so once."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from express_compile.core.cost import Device
from express_compile.planning import devices


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(devices, "name_of", lambda kind: "CPU, 99 threads")  # of which nothing is shipped
    devices.device_of.cache_clear()
    yield
    devices.known.cache_clear()


def mine() -> Device:
    return replace(next(iter(devices.shipped().values())), name=devices.name_of("cpu"))


def place() -> Path:
    path = devices.path_of(devices.name_of("cpu"))
    path.parent.mkdir(exist_ok=True)
    return path


def changed(key: str, value: object) -> str:
    data = asdict(mine())
    data["rates"]["float32"]["exact"][key] = value
    return json.dumps(data)


def without_time() -> str:
    data = asdict(mine())
    data["rates"]["float32"]["exact"] = dict.fromkeys(data["rates"]["float32"]["exact"], 0.0)
    return json.dumps(data)


def test_what_was_saved_is_found() -> None:
    path = devices.save(mine())
    assert path == place() and devices.device_of("cpu") == mine() and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ('{"name": "CPU", "rates": {', "Expecting property name"),
        pytest.param("[" * 100_000, "nested too deeply", id="bomb"),
        ("[]", "must be an object of name, rates, source"),
        ("null", "must be an object"),
        ('{"version": 2}', "must be an object of name, rates, source"),
        ('{"name": 5, "source": "", "rates": {}}', "name=5: must be a string"),
        ('{"name": "", "source": "", "rates": [1]}', r"rates=\[1\]: must map"),
        ('{"name": "", "source": "", "rates": {"half": 3}}', "must map dtypes to methods"),
        (
            '{"name": "", "source": "", "rates": {"half": {"exact": 3}}}',
            r"rates\['half'\]\['exact'\]: 3; must be an object",
        ),
        (
            '{"name": "", "source": "", "rates": {"half": {"exact": {"flop": 1}}}}',
            "flop; must be an object of bytes, cache",
        ),
        ('{"name": "another", "source": "", "rates": {}}', "it is of 'another', not 'CPU"),
        (lambda: changed("flops", -1e-12), r"\['exact'\]\['flops'\]=-1e-12: must be from 0 to 1 seconds"),
        (lambda: changed("bytes", float("nan")), r"\['bytes'\]=nan: must be from 0"),
        (lambda: changed("scores", 1e9), r"\['scores'\]=1000000000.0: must be from 0 to 1 seconds"),
        (lambda: changed("call", "fast"), r"\['call'\]='fast': must be of type int or float"),
        (lambda: changed("steps", True), r"\['steps'\]=True: must be of type"),
        (lambda: changed("cache", 1e30), r"\['cache'\]=1e\+30: must be from 0 to 1.09951e\+12 bytes"),
        (without_time, r"\['exact'\]: nothing takes any time"),
    ],
)
def test_a_file_that_cannot_be_true_is_left_out_with_one_warning_that_names_it(text, words: str) -> None:
    place().write_text(text if isinstance(text, str) else text())
    with pytest.warns(RuntimeWarning, match=words) as told:
        assert devices.device_of("cpu") is None
    assert len(told) == 1 and str(told[0].message).startswith(str(place()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.device_of("cpu") is None, "said once"
    devices.save(mine())
    assert devices.device_of("cpu") == mine(), "measuring anew repairs it"


def test_bytes_that_are_no_text_and_a_folder_are_told() -> None:
    place().write_bytes(b"\xff\xfe")
    with pytest.warns(RuntimeWarning, match="decode"):
        assert devices.device_of("cpu") is None
    devices.known.cache_clear()
    place().unlink()
    place().mkdir()
    with pytest.warns(RuntimeWarning, match="directory"):
        assert devices.device_of("cpu") is None


def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )


def a_file_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")


def forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    found = devices.versions()
    monkeypatch.setattr(devices, "versions", lambda: found)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("home", [no_home, a_file_for_a_folder, nowhere, forbidden])
def test_without_a_place_for_it_nothing_is_known_and_saving_says_why(home, tmp_path, monkeypatch) -> None:
    device = mine()
    home(tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.device_of("cpu") is None
    with pytest.raises(OSError, match="home directory|[Nn]ot a directory|No such file|File exists|Permission"):
        devices.save(device)


def test_readers_never_see_a_part_of_it(tmp_path: Path) -> None:
    device, stop = mine(), threading.Event()
    devices.save(device)
    writer = threading.Thread(target=lambda: [devices.save(device) for _ in iter(stop.is_set, True)])
    writer.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(devices._measured(device.name) == device for _ in range(100))
    finally:
        stop.set()
        writer.join()
    assert os.listdir(tmp_path / "express_compile") == [place().name]
