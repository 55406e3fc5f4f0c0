"""Draws docs/house.svg, the picture of the house: python docs/site/house.py"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "house.svg"
WIDTH, FLOOR, GAP = 960, 78, 12

# From the top floor down; a floor is a list of rooms: folder, what it is for.
FLOORS: list[list[tuple[str, str]]] = [
    [("express_compile", "the front door: rewrite_attention, explain, watch, Policy; the command line")],
    [("express_compile/engines", "elsewhere: several GPUs, vLLM, continuous batching, torch.export")],
    [("express_compile/report", "what happened: explain, the page, plots")],
    [("express_compile/quality", "how wrong: budgets, draws, watch")],
    [("express_compile/routes", "ways in: the backend, captured modules, transformers")],
    [
        ("passes", "graphs only: match → plan → rewrite; masks are proven here"),
        ("kernels", "one file per method: select → attend; references and Triton"),
    ],
    [("express_compile/planning", "which method, how fast: predict, devices, measure")],
    [("express_compile/core", "nouns: spec, mask, policy, plan, method, cost; imports nothing above")],
]


def draw() -> str:
    """The SVG document."""
    height = GAP + len(FLOORS) * (FLOOR + GAP) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, rooms in enumerate(FLOORS):
        y = GAP + i * (FLOOR + GAP)
        width = (WIDTH - GAP * (len(rooms) + 1)) / len(rooms)
        for j, (folder, purpose) in enumerate(rooms):
            x = GAP + j * (width + GAP)
            fill = {"passes": "#fff3d6", "kernels": "#dff2e3"}.get(folder, "#e8eef8")
            lines += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{FLOOR}" rx="6" fill="{fill}" stroke="#667"/>',
                f'<text x="{x + 16:g}" y="{y + 32}" font-size="19" font-weight="bold" fill="#223">{folder}/</text>',
                f'<text x="{x + 16:g}" y="{y + 58}" font-size="15" fill="#334">{escape(purpose)}</text>',
            ]
    words = "imports go down only; passes and kernels do not know each other, nor do planning and kernels"
    lines += [f'<text x="{GAP}" y="{height - 16}" font-size="15" fill="#556">{words}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
