"""Plots of predictions: where the methods cross. It needs matplotlib, an optional package."""

from __future__ import annotations

import io
import math

import matplotlib
from matplotlib.figure import Figure

from ..core.cost import Device
from ..core.policy import Policy
from ..core.spec import AttentionSpec
from ..planning.predict import MARGIN, at_length, crossover, predict, without_padding

_FROM, _TO = 256, 1 << 20


def crossover_plot(methods: tuple[str, ...], spec: AttentionSpec, policy: Policy, device: Device, title: str) -> str:
    """Predicted milliseconds of ``methods`` and of exact attention over the number of keys, as an SVG document.

    All but the numbers of keys (and queries, where they are as many) is that of ``spec``; the number of keys from which
    a method is chosen is marked.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    least = spec.Lq if isinstance(spec.Lq, int) and str(spec.Lq) != str(spec.Lk) else 1
    lengths = [n for i in range(8 * int(math.log2(_TO // _FROM)) + 1) if (n := round(_FROM * 2 ** (i / 8))) >= least]
    for name in ("exact", *methods):
        times = [predict(name, at_length(spec, n), policy, device) for n in lengths]
        known = [ms for ms in times if ms is not None]
        if len(known) == len(lengths):
            axes.plot(lengths, known, label=f"{name}, without padding" if without_padding([name], spec) else name)
    for name in methods:
        crosses = crossover(name, "exact", spec, policy, device, margin=MARGIN)
        if crosses is not None and lengths[0] <= crosses <= _TO:
            axes.axvline(crosses, color="grey", linestyle=":", label=f"{name} from {crosses:,} keys on")
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="predicted ms", title=title)
    axes.legend()
    text = io.StringIO()
    # names inside the document follow from the title: the same ones at every run, others in another plot of a page
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
