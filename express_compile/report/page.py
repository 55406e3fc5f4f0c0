"""A report as one self-contained HTML page: no script, no file and no address beside it.

Sites of which the same was decided are one row, whose modules unfold.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..core.plain import shown
from ..core.sites import SiteReport
from .groups import grouped, name_of
from .picture import picture, rows_in_table

if TYPE_CHECKING:
    from .explain import Report

_TEMPLATE = """\
{% macro measured(site) %}
{%- for name, ms in site.measured_ms.items() %}{{ "<br>measured: "|safe if loop.first else ", " }}
{{- name }} {{ "%.3g" | format(ms) }} ms
{%- endfor %}
{%- if site.error is not none %}{{ "<br>"|safe }}error: {{ "%.3g" | format(site.error) }}{% endif %}
{%- if site.unmeasured %}{{ "<br>"|safe }}error not measured: {{ site.unmeasured }}{% endif %}
{% endmacro %}
{% macro errors(group) %}
{%- set found = group | map(attribute="error") | reject("none") | list %}
{%- if found %}{{ "<br>"|safe }}error: {{ "%.3g to %.3g" | format(found | min, found | max) }}{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Attention sites</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
  table { border-collapse: collapse; }
  th, td { text-align: left; vertical-align: top; padding: .4em .8em; border-bottom: 1px solid #ddd; }
  th { position: sticky; top: 0; background: #fff; }
  small, code { color: #666; font-size: .85em; overflow-wrap: anywhere; }
  ul { margin: 0; padding-left: 1.1em; }
  .rewritten { color: #176f2c; } .exact { color: #555; } .refused { color: #a02020; }
  figure { margin: 2em 0; } figure svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Attention sites</h1>
<p>{{ report.sites | length }} in all:
{% for verdict, count in totals.items() %}
<span class="{{ verdict }}">{{ count }} {{ verdict }}</span>{{ "," if not loop.last else "." }}
{% endfor %}
{% if report.made %}{{ report.made }}.{% endif %}</p>
{% if report.breaks %}
<ul>{% for words in report.breaks %}<li>graph break at {{ words }}</li>{% endfor %}</ul>
{% endif %}
{% if report.unmatched %}
<p class="refused">No site matches {{ report.unmatched | join(", ") }}.</p>
{% endif %}
{% if report.sites %}
<table>
<thead><tr><th>module</th><th>form</th><th>shape</th><th>mask</th><th>method</th><th>verdict</th><th>reason</th>
<th>other methods</th></tr></thead>
<tbody>
{% for group in groups %}
{% set site = group[0] %}
<tr>
<td>
{%- if group | length == 1 %}{{ site.module or "(root)" }}<br><small>{{ site.source or "source unknown" }}</small>
{%- else %}<details><summary>{{ name_of(group | map(attribute="module") | list) }}</summary><ul>
{% for site in group %}
<li>{{ site.module or "(root)" }}<br><small>{{ site.source or "source unknown" }}</small>{{ measured(site) }}</li>
{% endfor %}
</ul></details>
{%- endif %}</td>
<td>{{ site.form }}</td>
<td>{{ site.shape or "–" }}</td>
<td>{{ site.mask or "–" }}</td>
<td>{{ site.method }}
{%- for name, value in told(site).items() %}{{ "," if not loop.first }}
{{ "<br>"|safe if loop.first }}<code>{{ name }}={{ value }}</code>
{%- endfor %}</td>
<td class="{{ site.verdict }}">{{ site.verdict }}</td>
<td>{{ site.reason }}{{ measured(site) if group | length == 1 else errors(group) }}</td>
<td>{% if site.rejected %}<ul>{% for words in site.rejected %}<li>{{ words }}</li>{% endfor %}</ul>{% endif %}</td>
</tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>No attention site was found.</p>
{% endif %}
{% if heads %}
<h2>Rows of every head</h2>
{{ heads }}
{% endif %}
{% for title, svg in figures.items() %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>
{% endfor %}
</body>
</html>
"""


def render(report: Report, figures: Mapping[str, str]) -> str:
    """The page of a report, with ``figures`` below it: title -> an SVG document.

    Raises ``TypeError`` for figures that are no mapping of strings, ``ValueError`` for one that is no SVG. Figures are
    put in as they are, so they must be yours.
    """
    if not isinstance(figures, Mapping) or not all(isinstance(x, str) for x in figures.values()):
        raise TypeError(f"figures={shown(figures)}: must map titles to SVG documents")
    groups = grouped(report.sites, _decided)
    inline = {title: Markup(_svg(title, text)) for title, text in figures.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"name_of": name_of, "told": _told, "heads": Markup(picture(report.sites))}
    page = environment.from_string(_TEMPLATE)
    return page.render(report=report, groups=groups, totals=report.totals(), figures=inline)


def _told(site: SiteReport) -> dict[str, str]:
    """The parameters of a site as they are shown: rows in words."""
    return {name: rows_in_table(site) if name == "rows" else str(value) for name, value in site.params.items()}


def _decided(site: SiteReport) -> tuple[Hashable, ...]:
    """What the page says of a site but for where it is and what was measured there."""
    params = tuple(_told(site).items())
    return site.form, site.shape, site.mask, site.method, params, site.verdict, site.reason, site.rejected


def _svg(title: str, text: str) -> str:
    """The ``<svg>`` element of a document: in a page it stands without its prolog."""
    found = re.search(r"<svg[\s>].*</svg>", text, re.DOTALL)
    if found is None:
        raise ValueError(f"figures[{title!r}]: {text[:40]!r}; must be an SVG document, <svg ...>...</svg>")
    return found.group()
