"""A picture of plans per head: a row per site, a cell per head, coloured by what the head sees: an SVG, or text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ..core.rows import Rows, describe
from ..core.sites import SiteReport

_CELL, _LINE, _LEFT = 16, 20, 8
_HUES = {"everything": "#8c1d18", "selected": "#e07b00", "protected": "#7a4fb5", "thinned": "#2469b3"}
_WINDOW = "#9aa5ad"


def rows_in_table(site: SiteReport) -> str:
    """What the heads of a site see, in a cell of a table: where they differ, that it is said below."""
    if len(set(site.rows)) > 1:
        return f"by {per([site])}, {len(site.rows)} below"
    return describe(site.rows)


def in_text(sites: Iterable[SiteReport]) -> str:
    """The picture as text: a line per site with the number of every head's plan, and what the numbers mean; ``""``
    where :func:`picture` is."""
    shown, plans = _plans(sites)
    if not plans:
        return ""
    numbers = {rows: i for i, rows in enumerate(plans, 1)}
    wide, names = len(str(len(plans))), max(len(_name(site)) for site in shown)
    lines = [f"rows of every {per(shown)}:"]
    for site in shown:
        lines.append(f"  {_name(site):<{names}}  {' '.join(f'{numbers[rows]:>{wide}}' for rows in site.rows)}")
    return "\n".join([*lines, *(f"  {numbers[rows]:>{wide}}: {_counted(rows, shown)}" for rows in plans)])


def picture(sites: Iterable[SiteReport]) -> str:
    """The ``<svg>`` element; ``""`` where no site has heads that differ. What plans there are is said below it."""
    shown, plans = _plans(sites)
    if not plans:
        return ""
    colours = {rows: (_colour(rows), _opacity(rows, plans)) for rows in plans}
    widest = max(len(site.rows) for site in shown)
    parts = []
    for i, site in enumerate(shown):
        cells = (_cell(j, i, *colours[rows], f"{_name(site)} head {j}: {rows}") for j, rows in enumerate(site.rows))
        parts += [*cells, _text(widest * _CELL + 2 * _LEFT, i, _name(site))]
    for i, rows in enumerate(plans, len(shown) + 1):
        words = _counted(rows, shown)
        parts += [_cell(0, i, *colours[rows], words), _text(_CELL + 2 * _LEFT, i, words)]
    height = (len(shown) + len(plans) + 2) * _LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{widest * _CELL + 640}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def per(sites: Iterable[SiteReport]) -> str:
    """Which heads have plans: ``"query head"`` if those of any site do."""
    found = {site.saved.per for site in sites if site.saved is not None}
    return "query head" if "query head" in found else "KV head"


def _plans(sites: Iterable[SiteReport]) -> tuple[list[SiteReport], list[Rows]]:
    """The sites that have rows, and these, by kind and number; no rows where no site has heads that differ."""
    shown = [site for site in sites if site.rows]
    if not any(len(set(site.rows)) > 1 for site in shown):
        return shown, []
    plans = {rows for site in shown for rows in site.rows}
    return shown, sorted(plans, key=lambda rows: (_kind(rows), _count(rows), str(rows)))


def _counted(rows: Rows, shown: Iterable[SiteReport]) -> str:
    """A plan in words, and how many heads have it."""
    count = sum(site.rows.count(rows) for site in shown)
    return f"{rows} ({count} head{'s' * (count > 1)})"


def _name(site: SiteReport) -> str:
    return site.module or "(root)"


def _kind(rows: Rows) -> str:
    """What tells a head from others: the first of the sources that are not sinks and recent tokens."""
    return next((name for name in _HUES if getattr(rows, name)), "")


def _count(rows: Rows) -> int:
    """Tokens and rows that it names."""
    return rows.sinks + rows.recent + rows.thinned + rows.protected + 64 * rows.selected


def _colour(rows: Rows) -> str:
    return _HUES.get(_kind(rows), _WINDOW)


def _opacity(rows: Rows, plans: list[Rows]) -> float:
    """More rows are darker, among those of one kind."""
    like = [other for other in plans if _kind(other) == _kind(rows)]
    return round(1 - 0.65 * (len(like) - 1 - like.index(rows)) / len(like), 3)


def _cell(column: int, line: int, colour: str, opacity: float, words: str) -> str:
    return (
        f'<rect x="{_LEFT + column * _CELL}" y="{line * _LINE + 2}" width="{_CELL - 2}" height="{_LINE - 4}" '
        f'fill="{colour}" fill-opacity="{opacity}"><title>{escape(words)}</title></rect>'
    )


def _text(x: int, line: int, words: str) -> str:
    return f'<text x="{x}" y="{line * _LINE + 15}">{escape(words)}</text>'
