"""The measurements of Thinformer: the real MiniLM is the published one, and what the job's numbers have to obey."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "bench"


@pytest.fixture(scope="module")
def encoders() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("encoders")


@pytest.fixture(scope="module")
def minilm(encoders: ModuleType) -> tuple[Any, Any]:
    return encoders.load_minilm("cpu")


def by(rows: list[dict], *keys: str) -> dict[tuple, dict]:
    found = {tuple(row[k] for k in keys): row for row in rows}
    assert len(found) == len(rows), "a row for each"
    return found


def test_minilm_is_the_published_model(encoders: ModuleType, minilm: tuple[Any, Any]) -> None:
    """The similarities that the documentation of sentence-transformers prints for these three sentences."""
    model, tokenizer = minilm
    sentences = "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."
    vectors = encoders.embed(model, tokenizer, [tokenizer(x, add_special_tokens=False).input_ids for x in sentences])
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(vectors @ vectors.T, expected, atol=6e-5, rtol=0)


def test_passages_lack_their_sentence(encoders: ModuleType, minilm: tuple[Any, Any]) -> None:
    queries, texts = encoders.passages(minilm[1], 20)
    words = [" ".join(map(str, x)) for x in texts]
    assert len(set(words)) == len(set(map(tuple, queries))) == 20
    for query, text in zip(queries, texts, strict=True):
        assert 24 <= len(query) <= 48 and len(text) == 510
        assert " ".join(map(str, query)) not in " ".join(map(str, text))
    with pytest.raises(ValueError, match="count=5000"):
        encoders.passages(minilm[1], 5000)


def test_retrieval_counts(encoders: ModuleType) -> None:
    vectors = torch.eye(12) + 0.01 * torch.arange(12.0)
    exact = vectors @ vectors.T
    same = encoders.retrieval(vectors, vectors, exact)
    assert all((values == 1).all() for name, values in same.items() if name != "spearman")
    assert same["spearman"] == pytest.approx(1)
    swapped = encoders.retrieval(vectors, vectors[[1, 0, *range(2, 12)]], exact)
    assert swapped["recall1"].tolist() == [0, 0] + [1] * 10  # 0 and 1 find each other's passage
    reverse = encoders.retrieval(vectors, -vectors, exact)
    assert reverse["spearman"] == pytest.approx(-1) and not reverse["recall10"].any()
    assert reverse["overlap10"] == pytest.approx(0.8)  # of 12, the two best are now the two worst


def test_minilm_rows(encoders: ModuleType) -> None:
    rows = by(encoders.minilm_rows("cpu", 10, [64]), "task", "metric", "method", "params")
    assert all(row.keys() | {"date", "gpu", "commit"} == set(encoders.QUALITY_COLUMNS) for row in rows.values())
    balanced, uniform = ("thinformer", "s=64 halving=balanced"), ("thinformer", "s=64 halving=uniform")
    exact, truncated = ("exact", ""), ("truncated", "s=64")
    for how in (balanced, uniform):  # at most s tokens: exact, in a padded batch too
        assert rows["sentences of at most s tokens", "cosine_min", *how]["value"] == pytest.approx(1, abs=1e-6)
    cosine = {how: rows["passages", "cosine", *how] for how in (exact, balanced, uniform, truncated)}
    assert cosine[exact]["value"] == pytest.approx(1, abs=1e-6)
    assert all(0 < cosine[how]["low"] < cosine[how]["high"] < 0.9 for how in (balanced, uniform, truncated))
    assert cosine[balanced]["value"] > cosine[uniform]["value"] + 0.03  # measured: 0.06
    retrieval = {
        metric: rows["retrieval of 10 passages", metric, *exact]["value"] for metric in ("recall1", "overlap10")
    }
    assert retrieval["overlap10"] == 1 and retrieval["recall1"] >= 0.5  # chance is 0.1


def test_error_law_on_low_rank_keys(encoders: ModuleType) -> None:
    """Measured: 0.14 against 0.38 at s = 64; exponents −1.0 and −0.5."""
    q, k, v = encoders.low_rank_keys(1024, 2)
    assert (torch.linalg.svdvals(k[0] - k[0].mean(1, keepdim=True))[:, 2] < 1.0).all()  # the rest is noise
    assert (q @ k.mT / 8).abs().max() < 2.3  # |<y, z>| <= 2, and noise
    rows = by(encoders.error_rows(iter([("", "keys of rank 2", [(q, k, v)])])), "params")
    assert all(row.keys() | {"date", "gpu", "commit"} == set(encoders.QUALITY_COLUMNS) for row in rows.values())
    assert {row["rows"] for row in rows.values()} == {16, 32, 64, 128, 256}
    error = {rule: [rows[(f"s={s} halving={rule}",)]["value"] for s in (16, 64, 256)] for rule in encoders.RULES}
    assert all(2 * mine < theirs for mine, theirs in zip(error["balanced"][1:], error["uniform"][1:], strict=True))
    assert all(x < y < z for x, y, z in zip(*(error[rule] for rule in encoders.RULES), strict=True))
    exponent = {rule: math.log(values[2] / values[0], 16) for rule, values in error.items()}
    assert exponent["balanced"] < -0.8 and -0.65 < exponent["uniform"] < -0.35


def test_no_error_where_nothing_is_left_out(encoders: ModuleType) -> None:
    keys = encoders.low_rank_keys(128, 4, sharpness=3.0, normal=True)
    assert encoders.squared_errors(keys, 128, "balanced").max() < 1e-10
    assert encoders.squared_errors(keys, 64, "balanced").min() > 1e-4


def test_speed_rows_and_their_check(
    encoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--tiny", "--lengths", "64", "--repeats", "1", "--commit", "0000000", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["encoders.py", "speed", "--budget", "16", *arguments])
    encoders.main()
    monkeypatch.setattr(sys, "argv", ["encoders.py", "speed", "--budget", "128", *arguments])
    encoders.main()
    monkeypatch.setattr(encoders, "rewrite_attention", lambda model, **options: model)
    monkeypatch.setattr(encoders, "restore_attention", lambda model: model)
    encoders.main()
    with (tmp_path / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    planned = [row for row in rows if row["params"].endswith(" planner=1")]
    assert [row["Lq"] for row in planned] == ["65", "64"] * 3 and all("rewritten=0" in row["params"] for row in planned)
    assert all(float(row["error"]) == 0 and float(row["speedup"]) > 0 for row in planned), "so short ones stay exact"
    rows = [row for row in rows if row not in planned]
    assert list(rows[0]) == encoders.SPEED_COLUMNS and [row["Lq"] for row in rows] == ["65", "64"] * 3
    thinned, whole, untouched = rows[:2], rows[2:4], rows[4:]
    for row in thinned:
        assert row["params"].endswith("rewritten=2") and 1e-4 < float(row["error"]) < 0.2
        assert float(row["speedup"]) == pytest.approx(float(row["opponent_ms_p50"]) / float(row["ms_p50"]))
    assert all(float(row["error"]) < 1e-5 for row in whole)
    assert all(row["speedup"] == "failed its check" for row in untouched)
    with pytest.raises(ValueError, match="n=48"):
        encoders.random_encoder("vit-b-16", 48, tiny=True)
    monkeypatch.setattr(sys, "argv", ["encoders.py", "plot"])
    with pytest.raises(SystemExit):
        encoders.main()
    assert "plot needs --out" in capsys.readouterr().err


def test_the_plot_and_what_the_committed_rows_say(encoders: ModuleType, tmp_path: Path) -> None:
    results = EXAMPLES / "results" / "quality.csv"
    encoders.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "quality.csv").write_text(",".join(encoders.QUALITY_COLUMNS) + "\n")
    with pytest.raises(ValueError, match="no rows of the job error"):
        encoders.plot(tmp_path / "quality.csv", tmp_path / "none.png")
    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "relative_error"]
    newest = {(row["task"], row["params"]): float(row["value"]) for row in rows}
    tasks = {task for task, _ in newest}
    assert {
        encoders.ERROR + name for name in ("keys of rank 2", "keys of rank 4", "keys of MiniLM", "keys of SmolLM2")
    } < tasks
    for (task, params), value in newest.items():
        if task in (encoders.ERROR + "keys of rank 2", encoders.ERROR + "keys of rank 4") and params.endswith(
            "balanced"
        ):
            assert value < 0.8 * newest[task, params.replace("balanced", "uniform")], (task, params)
