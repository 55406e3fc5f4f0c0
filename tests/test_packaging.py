"""Freezes the packaging: what a wheel holds, and what each way of importing finds.

kernels/ lies at the top level of a checkout but must never be what ``import kernels`` finds: that name is Hugging
Face's, and transformers imports it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "express_compile": "express_compile",
    "kernels": "express_compile/kernels",
    "passes": "express_compile/passes",
}

THEIRS = "__version__ = '0.18.2'\nLayerRepository = 'theirs'\n"


def sources() -> dict[str, Path]:
    """Every Python file we ship: path in the wheel -> path in the checkout."""
    return {
        f"{inside}/{file.relative_to(ROOT / folder)}": file
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for source in (
        ROOT / "pyproject.toml",
        *ROOT.glob("LICENSE*"),
        *ROOT.glob("README*"),
        *map(ROOT.joinpath, FOLDERS),
    ):
        name = source.name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--no-index", "-w", str(out), str(checkout)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site directory with the wheel unpacked: a regular install."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site directory with something that looks like Hugging Face's kernels package."""
    site = tmp_path_factory.mktemp("hugging_face")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(THEIRS)
    (site / "kernels" / "layer.py").write_text("from . import LayerRepository\n")
    return site


def python(code: str, cwd: Path, path: Sequence[Path] = (), flags: Sequence[str] = ()) -> dict:
    """Run ``code``, which fills ``result``, in a fresh interpreter."""
    script = f"result = {{}}\n{code}\nimport json; print(json.dumps(result))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("PYTHONSAFEPATH", None)
    run = subprocess.run([sys.executable, *flags, "-c", script], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# `-S` leaves out site-packages, where this environment's own install of the package lies.
BARE = ("-S",)
WHERE = """
import importlib.util
import express_compile, express_compile.kernels, express_compile.passes
result["package"] = express_compile.__file__
result["kernels"] = express_compile.kernels.__file__
result["passes"] = express_compile.passes.__file__
result["names"] = [express_compile.kernels.__name__, express_compile.passes.__name__]
result["path"] = list(express_compile.__path__)
"""
TOP_LEVEL = """
import importlib.util
result["top"] = [importlib.util.find_spec(name) is not None for name in ("kernels", "passes")]
"""


# ------------------------------------------------------------------------------------------------ the wheel


def test_wheel_holds_our_modules_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {*sources(), "express_compile/py.typed", "express_compile/planning/devices.json"}
    assert "express_compile/kernels/__init__.py" in code and "express_compile/passes/__init__.py" in code
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert "Name: express-compile\n" in metadata and "Version: 0.1.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    requires = [re.sub(r"\s", "", line) for line in re.findall(r"Requires-Dist: (.*)", metadata)]
    assert {"torch>=2.11", "sympy", "rich", "numpy", "jinja2"} <= set(requires)
    assert 'triton>=3.6;platform_system=="Linux"' in requires
    assert 'transformers>=5.17;extra=="transformers"' in requires
    (points,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    vllm = ["[vllm.general_plugins]", "express_compile", "=", "express_compile.engines.vllm:register"]
    assert points.split() == [
        "[torch_dynamo_backends]",
        "express",
        "=",
        "express_compile.routes.compile:express",
        *vllm,
    ]


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


# ------------------------------------------------------------------------------------- ways of importing it


def test_regular_install_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    result = python(WHERE + TOP_LEVEL, tmp_path, [installed], BARE)
    inside = installed / "express_compile"
    assert result["package"] == str(inside / "__init__.py")
    assert result["kernels"] == str(inside / "kernels" / "__init__.py")
    assert result["passes"] == str(inside / "passes" / "__init__.py")
    assert result["names"] == ["express_compile.kernels", "express_compile.passes"]
    assert result["path"] == [str(inside)]
    assert result["top"] == [False, False]


def test_regular_install_from_the_root_of_a_checkout(installed: Path, checkout: Path) -> None:
    result = python(WHERE, checkout, [installed], BARE)
    assert result["package"] == str(checkout / "express_compile" / "__init__.py")
    assert result["kernels"] == str(checkout / "kernels" / "__init__.py")
    assert result["passes"] == str(checkout / "passes" / "__init__.py")
    assert result["names"] == ["express_compile.kernels", "express_compile.passes"]


def test_no_install_from_the_root_of_a_checkout(checkout: Path) -> None:
    assert python(WHERE, checkout, flags=BARE)["kernels"] == str(checkout / "kernels" / "__init__.py")


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (editable,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(editable).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    activate = f"import site; site.addsitedir({str(site)!r})\n"
    for cwd in (elsewhere, checkout):
        result = python(activate + WHERE, cwd, flags=BARE)
        assert result["kernels"] == str(checkout / "kernels" / "__init__.py")
        assert result["passes"] == str(checkout / "passes" / "__init__.py")
    assert python(activate + TOP_LEVEL, elsewhere, [], BARE)["top"] == [False, False]


# ------------------------------------------------------------------------------- Hugging Face's kernels package

IMPORT_THEIRS = """
import kernels, kernels.layer, sys
from kernels import LayerRepository
result["theirs"] = [LayerRepository, kernels.__version__, kernels.__file__, kernels.layer.LayerRepository]
result["one"] = sys.modules["kernels"] is kernels
"""
IMPORT_NOTHING = """
import importlib, importlib.util
result["spec"] = importlib.util.find_spec("kernels") is not None
import kernels
result["looks"] = [getattr(kernels, "__version__", None), getattr(kernels, "__file__", None)]
result["again"] = importlib.util.find_spec("kernels") is not None
result["errors"] = []
for statement in ("from kernels import LayerRepository", "import kernels.exact", "import kernels._triton"):
    try:
        exec(statement)
    except ImportError as error:
        result["errors"].append(statement)
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_top_level_kernels_is_theirs_where_it_is_installed(
    checkout: Path, hugging_face: Path, tmp_path: Path, ours_first: bool
) -> None:
    # with the root of a checkout before and after their package on the path
    path = [checkout, hugging_face] if ours_first else [hugging_face, checkout]
    result = python(IMPORT_THEIRS + WHERE, tmp_path, path, BARE)
    file = str(hugging_face / "kernels" / "__init__.py")
    assert result["theirs"] == ["theirs", "0.18.2", file, "theirs"] and result["one"]
    assert result["kernels"] == str(checkout / "kernels" / "__init__.py")


def test_from_the_root_with_their_package_installed(checkout: Path, hugging_face: Path) -> None:
    result = python(WHERE + IMPORT_THEIRS, checkout, [hugging_face], BARE)
    assert result["theirs"][0] == "theirs" and result["kernels"] == str(checkout / "kernels" / "__init__.py")


def test_both_installed_side_by_side(installed: Path, hugging_face: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    shutil.copytree(hugging_face, site, dirs_exist_ok=True)
    result = python(WHERE + IMPORT_THEIRS, tmp_path, [site], BARE)
    assert result["theirs"][0] == "theirs"
    assert result["kernels"] == str(site / "express_compile" / "kernels" / "__init__.py")
    assert result["path"] == [str(site / "express_compile")]


def test_top_level_kernels_looks_absent_where_it_is_not_installed(checkout: Path) -> None:
    result = python(IMPORT_NOTHING + WHERE, checkout, flags=BARE)
    assert result["looks"] == [None, None] and result["spec"] and result["again"]
    assert len(result["errors"]) == 3
    assert result["kernels"] == str(checkout / "kernels" / "__init__.py")


def test_transformers_from_the_root_finds_no_kernels_package() -> None:
    code = """
import transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
result["available"] = is_kernels_available()
"""
    assert python(code, ROOT) == {"available": False}


# ---------------------------------------------------------------------------------------- the installed package


def test_torch_compile_finds_the_backend_without_an_import_of_ours(tmp_path: Path) -> None:
    code = """
import sys, torch
result["listed"] = "express" in torch._dynamo.list_backends(exclude_tags=())
result["imported"] = "express_compile" in sys.modules
from torch._dynamo.backends.registry import lookup_backend
backend = lookup_backend("express")
result["backend"] = [backend.__module__, callable(backend)]
"""
    result = python(code, tmp_path)
    assert result == {"listed": True, "imported": False, "backend": ["express_compile.routes.compile", True]}


def test_importing_the_package_is_light_and_its_names_resolve(tmp_path: Path) -> None:
    code = """
import sys, express_compile
result["heavy"] = [name for name in ("torch", "triton", "transformers", "rich") if name in sys.modules]
ours = [name for name in express_compile.__all__ if name != "ExpressCache"]  # a class of transformers
result["missing"] = [name for name in ours if getattr(express_compile, name, None) is None]
result["listed"] = set(express_compile.__all__) <= set(dir(express_compile))
result["transformers"] = "transformers" in sys.modules
try:
    express_compile.nonsense
except AttributeError as error:
    result["error"] = str(error)
"""
    result = python(code, tmp_path)
    assert result["heavy"] == [] and result["missing"] == [] and result["listed"] and not result["transformers"]
    assert result["error"] == "module 'express_compile' has no attribute 'nonsense'"


OLD_NAMES = {
    "backend": "routes.compile",
    "calibrate": "quality.draws",
    "cost": "core.cost",
    "devices": "planning.devices",
    "method": "core.method",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_the_module_that_has_moved_and_says_where(old: str) -> None:
    new = f"express_compile.{OLD_NAMES[old]}"
    code = f"""
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", DeprecationWarning)
    import express_compile.{old}, {new}
    from express_compile import {old}
result["same"] = sys.modules["{new}"] is express_compile.{old} is {old} is sys.modules["express_compile.{old}"]
result["said"] = [[str(w.message), w.filename] for w in caught if "0.2" in str(w.message)]
"""
    said = f"express_compile.{old} has moved to {new}; the old name goes with 0.2"
    assert python(code, ROOT) == {"same": True, "said": [[said, "<string>"]]}


def test_nothing_of_ours_uses_an_old_name() -> None:
    code = f"""
import warnings
warnings.filterwarnings("error", "express_compile.* has moved")
import sys, express_compile, express_compile.__main__
ours = [name for name in express_compile.__all__ if name != "ExpressCache"]  # a class of transformers
result["missing"] = [name for name in ours if getattr(express_compile, name, None) is None]
result["old"] = [name for name in {[*OLD_NAMES]} if f"express_compile.{{name}}" in sys.modules]
"""
    assert python(code, ROOT) == {"missing": [], "old": []}


def test_every_dependency_of_the_development_set_up_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extras.pop("vllm")  # has an environment of its own: examples/bench/vllm-requirements.txt
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M))
    names = {re.split(r"[^A-Za-z0-9_.-]", requirement)[0] for requirement in wanted}
    assert names <= set(pins)
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.9.0"


# -------------------------------------------------------------------------------------------------- the tests


def test_poison_fills_uninitialised_memory(poison: None) -> None:
    like = torch.zeros(1000)
    fresh = [torch.empty(1000), torch.empty_like(like), like.new_empty(1000), torch.empty_strided((1000,), (1,))]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.empty(1000, dtype=torch.float16).isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_poison_ends_with_the_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_triton_is_interpreted_where_there_is_no_device() -> None:
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
