"""The command line: what it prints and writes is what explain() gives, and bad arguments are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import express_compile
from express_compile.__main__ import POLICY, main
from express_compile.core.cost import Device
from express_compile.core.plan import SavedPlan
from express_compile.core.policy import Policy
from express_compile.planning import devices, measure
from express_compile.report import commands
from express_compile.report.commands import MODULE
from express_compile.report.explain import explain

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
from heads_of_test_main import HEADS


class Attention(nn.Module):
    def forward(self, x, keep=None):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        mask = None if keep is None else keep[:, None, None]
        return F.scaled_dot_product_attention(q, q, q, mask, is_causal=keep is None).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(2, 32), Attention(), Attention()

    def forward(self, ids, times=None, keep=None):
        assert ids.dtype == torch.int64 and (times is None or times.dtype == torch.float16)
        x = self.embed(ids)
        return self.b(self.a(x if times is None else x * times), keep)


def make():
    torch.manual_seed(0)
    return Model()


def with_tokenizer():
    return make(), lambda text: {"input_ids": [ord(letter) % 2 for letter in text]}


def needs(config):
    return Model()


def nothing():
    pass


def function():
    return lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "heads_of_test_main.py").write_text("HEADS = 4")
    path = tmp_path / "model_of_test_main.py"
    path.write_text(SOURCE)
    yield str(path)
    for name in (MODULE, "heads_of_test_main"):
        sys.modules.pop(name, None)


OPTIONS = ["--budget", "16", "--methods", "express,thinformer", "--modules", "b=exact", "--sinks", "4"]
FIELDS = {"budget": 16, "methods": ["express", "thinformer"], "modules": {"b": "exact"}, "sinks": 4}


def test_what_is_printed_and_written_is_what_explain_says(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("report.json", "page.html", "plan.json")]
    written = ["--json", str(files[0]), "--html", str(files[1]), "--save-plan", str(files[2])]
    assert main(["explain", f"{model}:make", "--shape", "1x24", *OPTIONS, *written]) == 0
    built = sys.modules[MODULE].make()
    report = explain(built, torch.ones(1, 24, dtype=torch.int64), **FIELDS)
    assert capsys.readouterr().out == f"{report}\n"
    assert [site.verdict for site in report.sites] == ["rewritten", "exact"]
    assert (
        files[0].read_text() == report.to_json() + "\n"
        and files[1].read_text() == report.to_html(report.crossovers()) + "\n"
    )
    assert SavedPlan.load(files[2]) == report.plan
    # and the plan may be given back
    assert main(["explain", f"{model}:make", "--shape", "1x24", "--plan", str(files[2]), "--strict"]) == 0
    assert "causal attention; as saved" in capsys.readouterr().out


def test_inputs_have_the_shapes_and_dtypes_that_were_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--kwargs", "keep=3x24:bool", "--json", str(tmp_path / "report.json")]
    shapes = ["--shape", "3x24", "--shape", "3x24x1:float16"]
    assert main(["explain", f"{model}:make", *shapes, *named, "--methods", "thinformer"]) == 0
    sites = json.loads((tmp_path / "report.json").read_text())["sites"]
    assert [(site["mask"], site["verdict"]) for site in sites] == [("causal", "refused"), ("key padding", "rewritten")]
    assert sites[0]["shape"] == "B=3 H=4 Lq=24 Lk=24 D=8 float32"
    capsys.readouterr()
    options = ["--shape", "1x2x24x8", "--dtype", "bfloat16", "--methods", "express", "--json", str(tmp_path / "f")]
    assert main(["explain", f"{model}:function", *options]) == 0
    (site,) = json.loads((tmp_path / "f").read_text())["sites"]
    assert (site["shape"], site["verdict"]) == ("B=1 H=2 Lq=24 Lk=24 D=8 bfloat16", "rewritten")


def test_errors_are_measured_on_request(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "express", "--budget", "4", "--sinks", "0", "--window", "4", "--protected", "0"]
    options += ["--method-options", '{"express": {"block": 16}}', "--json", str(tmp_path / "f")]
    assert main(["explain", f"{model}:function", "--shape", "1x2x64x8:float32", *options, "--error"]) == 0
    printed = capsys.readouterr()
    (site,) = json.loads((tmp_path / "f").read_text())["sites"]
    assert 0.05 < site["error"] < 1 and f" {site['error']:.3g} " in printed.out and printed.err == ""
    assert main(["explain", f"{model}:make", "--shape", "1x64", *options, "--error"]) == 0
    assert "integers are ones, so errors are those of equal tokens" in capsys.readouterr().err
    assert json.loads((tmp_path / "f").read_text())["sites"][0]["error"] < 1e-5, "equal keys are thinned without loss"


def test_a_plan_is_fitted_to_a_text_and_saved(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, plan, ids = tmp_path / "sample.txt", tmp_path / "plan.json", tmp_path / "ids.pt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 24)
    written = ["--tokens", "1400", "--save-plan", str(plan)]
    assert main(["fit", f"{model}:with_tokenizer", "--sample", str(text), "--tolerance", "0.01", *written]) == 0
    printed, found = capsys.readouterr().out, SavedPlan.load(plan)
    assert found.fitted["tokens"] == found.fitted["held_out"] == (700,) and found.fitted["kl"] <= 0.01
    assert [len(site.rows) for site in found.sites] == [1, 1] or [len(site.rows) for site in found.sites] == [4, 4]
    assert f"KL {found.fitted['kl']:.4g} nats per token on 700 tokens held out; " in printed
    assert main(["explain", f"{model}:make", "--shape", "1x1400", "--plan", str(plan), "--strict"]) == 0

    torch.save(torch.tensor([ord(letter) % 2 for letter in text.read_text()]), ids)
    assert main(["fit", f"{model}:make", "--sample", str(ids), "--tolerance", "0.01", *written]) == 0
    assert SavedPlan.load(plan) == found and SavedPlan.load(plan).fitted == found.fitted

    asked, run = [], commands.fit_plan
    monkeypatch.setattr(commands, "fit_plan", lambda *a, **own: asked.append(own["query_heads"]) or run(*a, **own))
    for flags in ([], ["--query-heads"]):
        assert main(["fit", f"{model}:make", "--sample", str(ids), "--tolerance", "0.01", *flags, *written]) == 0
    assert asked == [False, True] and "questions" not in SavedPlan.load(plan).fitted
    both = [str(ids), str(ids)]
    assert main(["fit", f"{model}:make", "--sample", str(ids), "--rows", "700", *written, "--questions", *both]) == 0
    assert SavedPlan.load(plan).fitted["questions"] == (len(text.read_text()),) * 2


def test_what_cannot_be_fitted_is_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, broken, empty = tmp_path / "sample.txt", tmp_path / "broken.pt", tmp_path / "empty.txt"
    text.write_text("It was a dark and stormy night.")
    empty.write_text("")
    broken.write_text("no tensor")
    for arguments, words in (
        (["--rows", "5"], "the following arguments are required: --sample"),
        (["--sample", str(text)], "one of the arguments --tolerance --rows --speedup is required"),
        (["--sample", str(text), "--rows", "5", "--tolerance", "1"], "--tolerance: not allowed with argument --rows"),
        (["--sample", str(text), "--rows", "5"], f"--sample='{text}': is a text, and MODEL returned no tokenizer"),
        (["--sample", str(broken), "--rows", "5"], f"--sample='{broken}': "),
        (["--sample", "/none.pt", "--rows", "5"], "--sample='/none.pt': [Errno 2]"),
        (["--sample", str(text), "--rows", "5", "--device", "none"], "--device='none': "),
    ):
        with pytest.raises(SystemExit) as error:
            main(["fit", f"{model}:make", *arguments])
        message = capsys.readouterr().err
        assert error.value.code == 2 and words in message and message.count("\n") == 1, message
    nothing, zipped, flags = (tmp_path / name for name in ("nothing.pt", "zipped.pt", "flags.pt"))
    nothing.touch()
    zipped.write_bytes(b"PK\x03\x04")
    torch.save(torch.ones(8, dtype=torch.bool), flags)
    for file, words in (
        (nothing, "EOFError"),
        (zipped, "PytorchStreamReader failed"),
        (flags, "must be token ids, int"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["fit", f"{model}:make", "--sample", str(file), "--rows", "5"])
        message = capsys.readouterr().err
        assert error.value.code == 2 and f"--sample='{file}': {words}" in message, message
    for tokenizer, words in (
        (5, "is a text, and MODEL returned 5; must be token ids"),
        (lambda text: None, "must be token ids, integers"),
        (lambda text: {"ids": [1]}, "must be token ids, integers"),
    ):
        monkeypatch.setattr(commands, "_load", lambda _, it=tokenizer: lambda: (torch.nn.Linear(2, 2), it))
        with pytest.raises(SystemExit) as error:
            main(["fit", f"{model}:make", "--sample", str(text), "--rows", "5"])
        message = capsys.readouterr().err
        assert error.value.code == 2 and f"--sample='{text}': {words}" in message, message
    monkeypatch.undo()
    for arguments, words in (
        (["--rows", "1"], "rows=1.0: the cheapest options take "),
        (["--tolerance", "-1"], "tolerance=-1.0: must be above 0 and finite"),
        (["--rows", "5", "--tokens", "3"], "--tokens=3: must be 4 or more"),
        (["--rows", "5", "--sample", str(empty)], f"--sample='{empty}': has no tokens"),
        (["--rows", "5", "--questions", str(text), str(empty)], f"--questions='{empty}': has no tokens"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["fit", f"{model}:with_tokenizer", "--sample", str(text), *arguments])
        message = capsys.readouterr().err
        assert error.value.code == 2 and words in message, message


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"express-compile {express_compile.__version__}\n"
    assert express_compile.__version__.split(".")[0].isdigit()


def test_every_field_that_matters_is_an_option(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(POLICY) == set(Policy.option_names()) - {"seed"}
    asked: list[dict] = []
    monkeypatch.setattr(
        "express_compile.report.commands.report_of",
        lambda *inputs, example_kwargs, error, **fields: asked.append(fields) or explain(*inputs),
    )
    given = {
        "--budget": ("0.25", 0.25),
        "--methods": ("express", ["express"]),
        "--sinks": ("1", 1),
        "--window": ("2", 2),
        "--protected": ("3", 3),
        "--halving": ("uniform", "uniform"),
        "--inflation": ("4", 4),
        "--min-length": ("5", 5),
        "--method-options": ('{"express": {"block": 64}}', {"express": {"block": 64}}),
        "--modules": ('*.x={"budget": 8}', {"*.x": {"budget": 8}}),
    }
    flags = ["--strict", "--causal-only", "--no-training", "--cuda-graphs"]
    main(["explain", f"{model}:make", "--shape", "1x24", *flags, *(x for k, v in given.items() for x in (k, v[0]))])
    expected = {name[2:].replace("-", "_"): value for name, (_, value) in given.items()}
    assert asked == [{**expected, "strict": True, "causal_only": True, "training": False, "cuda_graphs": True}]
    main(["explain", f"{model}:make", "--shape", "1x24"])
    assert asked[1] == {}  # what is not given has its default


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["{model}:mke"],
            "MODEL={model}:mke: must be a function there; it has Attention, Model, function, make, needs, nothing",
        ),
        (["{model}"], "argument MODEL: '{model}': must be FILE.py:FUNCTION or MODULE:FUNCTION, e.g. model.py:make"),
        (["nowhere.py:make"], "MODEL=nowhere.py:make: must be a Python file or a module that can be imported"),
        (["no_such_module:make"], "MODEL=no_such_module:make: must be a Python file or a module that can be imported"),
        (["{model}:make", "--shape", "1by8"], "argument --shape: '1by8': must be sizes such as 1x8192"),
        (
            ["{model}:make", "--shape", "1x8:int9"],
            "argument --shape: '1x8:int9': must be sizes such as 1x8192, with one of",
        ),
        (["{model}:make", "--dtype", "int9"], "argument --dtype: invalid choice: 'int9' (choose from int64, int32"),
        (["{model}:make", "--kwargs", "1x8"], "argument --kwargs: '1x8': must be NAME=SIZES or NAME=SIZES:DTYPE"),
        (["{model}:make", "--budget", "many"], "argument --budget: 'many': must be a number of rows or a fraction"),
        (["{model}:make", "--budget", "2"], "budget=2: must be at least 4 rows"),
        (["{model}:make", "--methods", "fast"], "methods=['fast']: unknown method 'fast'; allowed are "),
        (["{model}:make", "--modules", "b"], "argument --modules: 'b': must be GLOB=METHOD or GLOB="),
        (["{model}:make", "--modules", "b={}}"], "argument --modules: '{}}': must be JSON, but: Extra data"),
        (
            ["{model}:make", "--plan", "nowhere.json"],
            "plan='nowhere.json': No such file or directory; must be the path",
        ),
        (["{model}:make", "--device", "abacus"], "--device='abacus': "),
        (["{model}:make", "--device", "cuda:99"], "--device='cuda:99': "),
        (["{model}:make", "--device", "xla"], "--device='xla': "),
        (["{model}:HEADS"], "MODEL={model}:HEADS: must be a function there"),
        (["{model}:needs"], "MODEL={model}:needs: must be a function that can be called without arguments: missing a"),
        (["{model}:nothing"], "MODEL={model}:nothing: returned None; must return a torch.nn.Module or a function"),
        (["{model}:make"], "--shape, --kwargs: the model takes (ids, times=None, keep=None), but: missing a required"),
        (["{model}:make", "--shape", "1x8", "--kwargs", "mask=1x8"], "but: got an unexpected keyword argument 'mask'"),
        (["{folder}/none.py:make"], "must be a Python file or a module that can be imported: FileNotFoundError"),
        (["{folder}/bad.py:make"], "must be a Python file or a module that can be imported: SyntaxError: "),
        (["{folder}/ends.py:make"], "imported: SystemExit: 0 ({folder}/ends.py, line 2)"),
        (["{folder}/fails.py:make"], "imported: ZeroDivisionError: division by zero ({folder}/fails.py, line 1)"),
        (["..up:make"], "MODEL=..up:make: must be a Python file or a module that can be imported: TypeError"),
        (["{model}:make", "--shape", "99999999999999999999"], "--shape 99999999999999999999: "),
        (["{model}:make", "--shape", "9999999999x9999999999:float32"], "--shape 9999999999x9999999999: "),
        (["{model}:make", "--shape", "-1x8"], "argument --shape: expected one argument"),
        (["{model}:make", "--json", "/nonexistent/a"], "argument --json: '/nonexistent/a': must be a file that can be"),
        (["{model}:make", "--html", "{folder}"], "argument --html: '{folder}': must be a file that can be written"),
        (["{model}:make", "--save-plan", "/proc/a"], "argument --save-plan: '/proc/a': must be a file that can be"),
        (["{model}:make", "--sinks", "9223372036854775808"], "sinks=9223372036854775808: must be below 2**63"),
        (["{model}:make", "--budget", "nan"], "budget=nan: a float is a fraction of the keys"),
        (["{model}:make", "--method-options", "[1]"], "method_options=[1]: must map method names"),
        (["{model}:make", "--method-options", "[" * 100_000], "...: is nested too deeply"),
        (["{model}:make", "--method-options", '{"express": {"block": 64.0}}'], "block=64.0: must be of type int"),
        (["{model}:make", "--modules", 'a={"flatten": 1}'], "modules['a']: unknown option 'flatten'"),
        (["{model}:make", "--plan", "{folder}/bad.py"], "plan='{folder}/bad.py': must be JSON, but: Expecting value"),
        (
            ["{model}:make", "--plan", "{folder}"],
            "plan='{folder}': Is a directory; must be the path of a file that save()",
        ),
        (["{model}:make", "--plan", ""], "plan='': Is a directory; must be the path of a file that save() wrote"),
        (["{model}:make", "--methods", "thinformer", "--sinks", "3"], "sinks=3: does nothing beside methods=['thinfor"),
    ],
)
def test_bad_arguments_are_named(
    model: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(model).parent
    for name, text in (("bad", "def make(:"), ("ends", "import sys\nsys.exit(0)"), ("fails", "1 / 0")):
        (folder / f"{name}.py").write_text(text)

    def filled(text: str) -> str:
        return text.replace("{model}", model).replace("{folder}", str(folder))

    with pytest.raises(SystemExit) as error:
        main(["explain", *map(filled, arguments)])
    assert error.value.code == 2
    message = capsys.readouterr().err.replace("'int64'", "int64").replace("'int32'", "int32")  # older Pythons quote
    assert filled(words) in message
    assert message.count("\n") == 1 and len(message) < 1500, "one line"


def test_strict_ends_with_a_message_and_no_traceback(model: str) -> None:
    command = [sys.executable, "-m", "express_compile", "explain", f"{model}:make", "--shape", "1x24"]
    run = subprocess.run([*command, "--methods", "thinformer", "--strict"], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr and run.stdout == ""
    assert "strict=True: 2 attention sites were refused" in run.stderr and "it is causal; Thinformer" in run.stderr


def test_calibrate_prints_and_keeps_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [measure._prefill("exact", n, H=2, H_kv=1, D=16, dtype=torch.float32) for n in (64, 128)]
    monkeypatch.setattr(measure, "shapes", lambda device, dtype: few)
    monkeypatch.setattr(measure, "_SECONDS", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "--out", str(tmp_path / "own.json")]) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "own.json"], "no planner finds it"
    device = Device.from_dict(json.loads((tmp_path / "own.json").read_text()))
    assert set(device.rates["float32"]) == {"exact"}
    words = capsys.readouterr().out
    assert device.source in words and "float32" in words and "at most" in words
    devices.known.cache_clear()
    assert main(["calibrate"]) == 0
    try:
        found = devices.device_of("cpu")
        assert found.source == device.source and str(devices.path_of(found.name)) in capsys.readouterr().out
    finally:
        devices.known.cache_clear()


@pytest.mark.parametrize("called", ["json", "statistics", "torch", "rich"])
def test_a_file_may_be_called_like_a_module_even_in_the_current_folder(called: str, tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("import torch\nattend = torch.nn.functional.scaled_dot_product_attention\n")
    source = "from beside_it import attend\ndef make(): return lambda x: attend(x, x, x, is_causal=True)\n"
    (tmp_path / f"{called}.py").write_text(source)
    if called == "json":  # all at once, as a process of its own
        for other in ("statistics", "torch", "rich"):
            (tmp_path / f"{other}.py").write_text(source)
        command = [
            sys.executable,
            "-m",
            "express_compile",
            "explain",
            f"{called}.py:make",
            "--shape",
            "1x2x9x8:float32",
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert run.returncode == 0 and "1 attention site" in run.stdout, run.stderr
        return
    before, path = sys.modules.get(called), list(sys.path)
    try:
        assert main(["explain", f"{tmp_path / called}.py:make", "--shape", "1x2x9x8:float32"]) == 0
        assert sys.modules.get(called) is before
    finally:
        sys.path[:] = path
        for name in (MODULE, "beside_it"):
            sys.modules.pop(name, None)


def test_outputs_that_could_be_written_are_not_touched_by_a_bad_argument(model: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    with pytest.raises(SystemExit):
        files = ["--json", str(tmp_path / "old.json"), "--html", str(tmp_path / "new.html")]
        main(["explain", f"{model}:make", *files, "--budget", "1"])
    assert (tmp_path / "old.json").read_text() == "old" and not (tmp_path / "new.html").exists()


def test_calibrate_says_at_once_where_rates_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "calibrate", lambda *a: pytest.fail("nothing may be measured"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    for arguments, words in (
        ([], "the rates cannot be kept ("),
        (["--out", str(tmp_path)], f"argument --out: '{tmp_path}': must be a file"),
        (["--out", "/nonexistent/x"], "argument --out: '/nonexistent/x': must be a file"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["calibrate", *arguments])
        message = capsys.readouterr().err
        assert error.value.code == 2 and words in message and message.count("\n") == 1
