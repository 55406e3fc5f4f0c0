"""The pages: every link leads somewhere, every page is in the site, and what the README tells to run runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from express_compile import METHODS, Policy, is_rewritten

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), ROOT / "examples/README.md", *(ROOT / "docs").rglob("*.md")]
CONFIG = ROOT / "docs/site/mkdocs.yml"
INSTALLED = any(importlib.metadata.distributions(name="express-compile"))


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_checks_of_links_see_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for link in ("gone.md", "#gone", "page.md#here-too"):
        page.write_text(f"# Here\n\n[x]({link})\n")
        with pytest.raises(AssertionError, match=re.escape(link)):
            test_links_lead_to_files_and_headings(page)
    page.write_text("# Here, *too*\n\n[x](page.md#here-too) `y`\n```\n[z](gone.md)\n```\n")
    test_links_lead_to_files_and_headings(page)


def test_the_readme_fits_on_a_page_or_two_and_has_one_table_of_each() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert re.findall(r"<!-- ([a-z-]+) -->", text) == ["speed-summary", "plans-summary"]
    assert all(words in text for words in ("make demo", "make test", "pip install -e", "StreamingLLM", "FlexAttention"))


def test_every_page_is_in_the_site_once() -> None:
    def paths(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [path for x in (entry.values() if isinstance(entry, dict) else entry) for path in paths(x)]

    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    listed = Counter(paths(config["nav"]))
    own = {str(path.relative_to(ROOT / "docs")) for path in PAGES if path.is_relative_to(ROOT / "docs")}
    assert set(listed) == own | {"index.md", "contributing.md", "changelog.md"} and set(listed.values()) == {1}
    assert config["theme"]["font"] is False, "fonts would come from the network"


def test_the_picture_of_the_house_is_what_its_script_draws_and_every_room_exists() -> None:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs/site/house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.PICTURE.read_text(encoding="utf-8") == house.draw()
    rooms = {folder for floor in house.FLOORS for folder, _ in floor}
    own = {f"express_compile/{x.name}" for x in (ROOT / "express_compile").iterdir() if (x / "__init__.py").is_file()}
    assert rooms == {"express_compile", "passes", "kernels"} | own


def test_every_option_of_the_policy_is_explained() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/guide/options.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    for_all = {name for method in METHODS.values() for name in method.options.for_all()}
    assert set(told) == {field.name for field in fields(Policy)} - {"shared"} | for_all and len(told) == len(set(told))


def test_every_method_has_a_page_with_its_equation_and_its_options() -> None:
    for name in METHODS.shipped:
        text = (ROOT / f"docs/methods/{name}.md").read_text(encoding="utf-8")
        assert "```text\nout_i = " in text and f"kernels/{name}.py" in text
        assert ("## Options" in text and "## Limits" in text) == bool(fields(METHODS[name].options))
        for option, *_ in METHODS[name].options.table():
            assert f"| `{option}` |" in text


def test_make_lint_and_pre_commit_run_the_same_gates() -> None:
    """Every command of ``make lint``, and nothing from the network."""
    recipe = re.search(r"^lint: install\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[
        1
    ]
    lint = {line.strip().replace("$(PY)", ".venv/bin/python").removesuffix(" .") for line in recipe.splitlines()}
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    entries = {hook["entry"].removesuffix(" --force-exclude") for hook in repos[0]["hooks"]}
    assert entries == lint


@pytest.mark.skipif(not INSTALLED, reason="backend='express' by name needs express-compile installed")
def test_the_five_minutes_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # noqa: S102
    out = capsys.readouterr().out
    eager, compiled = (float(x) for x in re.findall(r"off by tensor\((\S+)\)", out))
    assert 1e-3 < eager < 0.2 and compiled == pytest.approx(eager, rel=1e-2), "the same rows on both routes"
    assert "2 attention sites: 2 rewritten, 0 exact, 0 refused" in out and out.count("(2 sites)") == 2
    assert not is_rewritten(names["model"]) and is_rewritten(names["encoder"])
    assert isinstance(names["exact"], torch.Tensor)


def test_the_page_of_exported_programs_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/guide/export.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(block, names := {})  # noqa: S102
    assert capsys.readouterr().out.count("express, causal attention") == 2
    ops = [str(node.target) for node in names["program"].graph.nodes if "express_compile" in str(node.target)]
    assert ops == ["express_compile.express.default"] * 2


def test_the_page_of_generation_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/guide/generation.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)  # noqa: S102
    rows = int(re.fullmatch(r"1087 tokens, (\d+) rows per KV head, \d+ bytes\n", capsys.readouterr().out)[1])
    assert 16 + 128 < rows < 16 + 128 + 6 * 64
    assert names["out"].shape == (1, 1024 + 30 + 20) and names["cache"].get_seq_length() == 1024
