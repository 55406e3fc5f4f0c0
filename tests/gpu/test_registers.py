"""What ptxas makes of the kernels: no uniform register is read that nothing wrote.

ptxas 12.8, which Triton 3.6 uses for sm_90, takes the base of some descriptors of shared memory from such a register
where tiles of float32 keys and values are swizzled in two ways: sums that are wrong and that change from run to run, or
reads of illegal memory (see ``Widths.alike``). Results alone show it by luck only, machine code always.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from triton import knobs

from express_compile import METHODS, AttentionSpec, Mask, Policy, Site
from express_compile.kernels import launch, prepared

_LABEL, _INSTRUCTION = re.compile(r"(\.L_x_\d+):"), re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_REGISTER, _BRANCH = re.compile(r"\bUR(\d+)\b"), re.compile(r"\bBRA.*`\((\.L_x_\d+)\)")


def read_and_written(instruction: str) -> tuple[set[int], set[int]]:
    """Numbers of the uniform registers: a first operand that is one is written, others are read."""
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    operands = [x.strip() for x in rest.split(",")]
    if "GMMA" in name:  # a descriptor takes two registers, that of the first factor comes before that of the second
        at = next(i for i, x in enumerate(operands) if x.startswith("gdesc"))
        n = int(_REGISTER.findall(operands[at])[0])
        return set(range(n if at == 1 else n + 2, n + 4)), set()
    written = set()
    if re.fullmatch(r"UR\d+", operands[0]):
        n = int(operands.pop(0)[2:])
        written = set(range(n, n + (4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1)))
    return {int(n) for x in operands for n in _REGISTER.findall(x)}, written


def _following(sass: str) -> tuple[list[str], list[list[int]]]:
    """The instructions with their addresses, and which of them may come after each."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, sass.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(texts)
        elif found := _INSTRUCTION.match(line):
            texts.append(" ".join(found.groups()))
    following = []
    for i, text in enumerate(texts):
        branch = _BRANCH.search(text)
        never_on = re.match(r"[0-9a-f]+ (BRA\S* `|EXIT|RET)", text)  # without a condition
        following.append(([labels[branch[1]]] if branch else []) + ([] if never_on else [i + 1]))
    return texts, following


def unwritten(sass: str) -> list[str]:
    """The instructions that read a uniform register which is not written before on any way from the entry."""
    texts, following = _following(sass)
    used = [read_and_written(text.partition(" ")[2]) for text in texts]
    before: dict[int, set[int]] = {0: set()}
    todo = [0]
    while todo:
        i = todo.pop()
        known = before[i] | used[i][1]
        for j in following[i]:
            if j not in before or known - before[j]:
                before[j] = before.get(j, set()) | known
                todo.append(j)
    return [texts[i] for i in sorted(before) if used[i][0] - before[i]]


def run(method: str, D: int, Dv: int, Lq: int, dtype: torch.dtype, **options: object) -> tuple[torch.Tensor, ...]:
    """The result of a method over 200 keys and its gradients; the same inputs every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (2, 4, Lq, D), (2, 1, 200, D), (2, 1, 200, Dv), (2, 4, Lq, Dv)
    *given, grad = (torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes)
    causal = method != "thinformer"
    mask = Mask(causal=causal, offset=200 - Lq if causal else 0)
    spec = AttentionSpec(2, 4, 1, Lq, 200, D, Dv, dtype, "cuda", 0.3, mask)
    own = {name: x for name, x in options.items() if name not in Policy.option_names()}
    rest = {name: x for name, x in options.items() if name in Policy.option_names()}
    policy = Policy(methods=(method,), method_options={method: own}, **rest)
    params = METHODS[method].params(Site(spec, "layers.3"), policy)
    op = getattr(torch.ops.express_compile, method)
    differentiable = method != "santa"
    given = [x.requires_grad_(differentiable) for x in given]
    out, lse = op(*given, None, torch.tensor(5, device="cuda"), 0.3, 3, **params)
    if not differentiable:
        return out, lse
    return out.detach(), lse.detach(), *torch.autograd.grad(out, given, grad)


CALLS = {
    "express": {"budget": 8, "sinks": 2, "window": 9, "protected": 0, "block": 16},
    "thinformer": {"budget": 16},
    "sparse": {},
    "sparse strided": {"pattern": "strided", "stride": 16, "summary": 3},
}
SHAPES = [(16, 24), (64, 32), (64, 16), (16, 128), (64, 64)]


@pytest.mark.parametrize("Lq", [37, 200])
@pytest.mark.parametrize("D, Dv", SHAPES[:2])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time_in_float32(name: str, D: int, Dv: int, Lq: int) -> None:
    method = name.split()[0]
    first = run(method, D, Dv, Lq, torch.float32, **CALLS[name])
    assert all(x.isfinite().all() for x in first)
    for _ in range(5):
        again = run(method, D, Dv, Lq, torch.float32, **CALLS[name])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_kernel_reads_a_uniform_register_that_nothing_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    launch._recent.clear(), launch._compiled.clear()
    prepared.forget()  # calls that are code launch without looking for kernels
    for D, Dv in SHAPES:
        for name, options in CALLS.items():
            run(name.split()[0], D, Dv, 200, dtype, **options)
        run("santa", D, Dv, 1, dtype, budget=16, min_length=0)
    file, bad = tmp_path / "kernel.cubin", {}
    for (kernel, *kind), (compiled, _) in launch._compiled.items():
        file.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", file]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert _INSTRUCTION.search(sass) and "EXIT" in sass
        if found := unwritten(sass):
            bad[f"{kernel.__module__}.{kernel.__name__} {kind}"] = found[:2]
    assert launch._compiled and not bad


def test_such_a_read_is_found() -> None:
    """As ptxas 12.8 made it, on one way of two and behind a loop."""
    sass = """
        /*0000*/                   S2UR UR4, SR_CgaCtaId ;
        /*0010*/                   ULDC.64 UR6, c[0x0][0x208] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   UIADD3 UR21, UP0, {base}, 0x1, URZ ;
.L_x_1:
        /*0040*/                   UIADD3 UR34, UP0, UR21, 0x1f, URZ ;
        /*0050*/                   UIADD3.X UR35, UR7, URZ, URZ, UP0, !UPT ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R40, R24, gdesc[UR32], R40, gsb0 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/                   EXIT ;
"""
    assert unwritten(sass.replace("{base}", "UR4")) == []
    assert unwritten(sass.replace("{base}", "UR21")) == ["0030 UIADD3 UR21, UP0, UR21, 0x1, URZ"]
