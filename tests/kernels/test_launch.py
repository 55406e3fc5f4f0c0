"""Arguments of kernels: what a launch takes for the same kernel, and what the compiler gets to see."""

from __future__ import annotations

from collections import namedtuple

import torch

from express_compile.kernels.launch import Strided, Widths, _kind, _values, stand_in, strided

Sizes = namedtuple("Sizes", "n rows")


def test_numbers_of_a_general_tuple_are_one_kind_up_to_32_bits() -> None:
    kinds = {_kind((Sizes(n, rows), None), True) for n in (1, 7, 16, 4096) for rows in (0, 3)}
    assert len(kinds) == 1
    assert _kind((Sizes(1 << 31, 3), None), True) not in kinds
    assert len({_kind(Sizes(n, 3)) for n in (1, 7, 16, 1 << 31)}) == 4


def test_the_compiler_sees_neither_1_nor_multiples_of_16_in_a_general_tuple() -> None:
    x = torch.zeros(2, 3, 4, 16)
    given = (Sizes(1, 1 << 35), (16, 0.5, None), strided(x))
    seen = stand_in(given, True)
    assert type(seen[0]) is Sizes and seen[0].n == 3 and seen[0].rows > 1 << 31 and seen[0].rows % 16 == 3
    assert seen[1] == (3, 0.5, None) and seen[2].p is x
    assert stand_in(given, False) == given


def test_tensors_are_told_apart_by_dtype_strides_and_alignment() -> None:
    base = torch.zeros(2 * 3 * 8 * 16 + 4)
    first = base[: 2 * 3 * 8 * 16].view(2, 3, 8, 16)
    others = [
        first.half(), first.transpose(1, 2), base[1 : 1 + 2 * 3 * 8 * 16].view(2, 3, 8, 16), first[:, :, :, ::2], None,
    ]  # fmt: skip
    keys = [tuple(_values((strided(x), Sizes(1, 2), 0.5), [])) for x in (first, *others)]
    assert len(set(keys)) == len(keys)
    assert keys[0] == tuple(_values((strided(first.clone()), Sizes(1, 2), 1.5), []))


def test_rows_with_gaps_between_columns_are_copied() -> None:
    x = torch.zeros(2, 3, 16, 4).mT
    assert strided(x).p is not x and strided(x)[1:] == (192, 64, 16)
    assert strided(x.contiguous())[1:] == (192, 64, 16) and strided(None) == Strided(None, 0, 0, 0)


def test_tiles_of_float32_are_equally_wide_or_at_least_64_columns_each() -> None:
    def tiles(D: int, Dv: int, dtype: torch.dtype) -> tuple[int, int]:
        key, value = torch.zeros(1, 1, 1, D, dtype=dtype), torch.zeros(1, 1, 1, Dv, dtype=dtype)
        widths = Widths.alike(key, value)
        assert widths[:2] == (D, Dv) and widths.BD >= D and widths.BDV >= Dv
        return widths.BD, widths.BDV

    assert tiles(16, 24, torch.float32) == (32, 32) and tiles(64, 24, torch.float32) == (64, 64)
    for D in (1, 16, 24, 64, 80, 256):
        for Dv in (1, 16, 24, 64, 80, 256):
            narrow, wide = sorted(tiles(D, Dv, torch.float32))
            assert narrow == wide or narrow >= 64
            assert tiles(D, Dv, torch.bfloat16) == Widths.of(torch.zeros(1, D), torch.zeros(1, Dv))[2:]
