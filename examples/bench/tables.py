"""Write the tables and plots of README.md, CONTRIBUTING.md and docs/ from the committed result files and the sources:
no number in them is typed by hand.

python examples/bench/tables.py            # rewrites what stands between markers such as <!-- speed -->, and the plots
python examples/bench/tables.py --check    # fails if a page is not what the result files and the sources say
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median

import limits
from benchmark import SETTINGS
from planner import Judged, crossings, judge, newest_prefills
from records import params_of

from express_compile import METHODS
from express_compile.kernels.santa import loses

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "bench" / "results"
SHIPPED = ("express", "thinformer", "santa", "sparse", "heads", "exact")


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: list[dict[str, str]], *key: str) -> list[dict[str, str]]:
    """One row per value of the columns ``key``: the last one in the file supersedes the others."""
    return list({tuple(row[k] for k in key): row for row in rows}.values())


def of_last_run(rows: list[dict[str, str]], *key: str) -> list[dict[str, str]]:
    """Of every value of the columns ``key`` the rows of one commit, that of the last of them: no mixture of runs."""
    commits = {tuple(row[k] for k in key): row["commit"] for row in rows}
    return [row for row in rows if row["commit"] == commits[tuple(row[k] for k in key)]]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def setting(row: dict[str, str]) -> str:
    values = params_of(row)
    name = f"s={row['s']}, sinks {values['sinks']}, window {values['window']}"
    return name + (f", protected {values['protected']}" if values["protected"] != "0" else "")


def gpu_rows(**wanted: str) -> list[dict[str, str]]:
    """The newest GPU row of every measurement with these values; earlier runs stay in the file as history."""
    rows = newest(read("speed.csv"), "gpu", "job", "params", "s", "B", "Lq", "Lk", "H", "H_kv", "D", "dtype")
    rows = [row for row in rows if row["gpu"] != "CPU" and "grid=" not in row["params"]]
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def speed_rows(**wanted: str) -> list[dict[str, str]]:
    """Those of the default shape of a head."""
    wanted = {"H": "32", "H_kv": "8", "D": "128", "dtype": "bfloat16", **wanted}
    return gpu_rows(**wanted)


def prefill_rows() -> list[dict[str, str]]:
    """Whole prefills of one sequence with the settings of the benchmark, launched one by one."""
    own = [policy.of("express") for policy in SETTINGS]
    wanted = {(str(x.budget), f"sinks={x.sinks} window={x.recent} protected={x.protected}") for x in own}
    rows = speed_rows(job="prefill", B="1")
    return [row for row in rows if row["Lq"] == row["Lk"] and (row["s"], row["params"]) in wanted]


def quoted(path: str) -> str:
    """A file of the repository, word by word."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```"


def methods_table() -> str:
    rows = [[f"`{name}`", METHODS[name].summary, METHODS[name].supports, METHODS[name].refuses] for name in SHIPPED]
    return markdown(["method", "what it is", "supports", "refuses"], rows)


def speed_table() -> str:
    rows = prefill_rows()
    graphs = [row for row in speed_rows(job="prefill", B="1") if "graph" in row["params"]]
    lengths = sorted({int(row["Lq"]) for row in rows})
    exact = {int(row["Lq"]): row for row in rows}
    header = ["", *(f"n = {n:,}" for n in lengths)]
    body = [["best exact", *(f"{float(exact[n]['opponent_ms_p50']):.2f} ms ({exact[n]['opponent']})" for n in lengths)]]
    for name in dict.fromkeys(map(setting, rows)):
        cells = {int(row["Lq"]): row for row in rows if setting(row) == name}
        body.append([f"Express {name}"] + [cell(cells.get(n)) for n in lengths])
    for name in dict.fromkeys(map(setting, graphs)):
        cells = {int(row["Lq"]): row for row in graphs if setting(row) == name}
        body.append([f"… {name}, both as CUDA graphs"] + [cell(cells.get(n)) for n in lengths])
    first = rows[0]
    note = (
        f"{first['gpu']}, torch {first['torch']}, triton {first['triton']}; B={first['B']}, H={first['H']}, "
        f"H_kv={first['H_kv']}, D={first['D']}, {first['dtype']}, causal prefill, compression included; measured "
        f"{first['date']}. Bold: faster than the best exact backend."
    )
    return markdown(header, body) + f"\n\n{note}"


LENGTHS = (4096, 8192, 32768, 131072, 524288)
"""Those of the README's table; the first is one at which exact attention is faster."""


def summary_cells(rows: list[dict[str, str]], show: Callable[[dict[str, str]], str]) -> list[str]:
    found = {int(row["Lk"]): row for row in rows}
    return [show(found[n]) if n in found else "–" for n in LENGTHS]


def summary_of(method: str) -> tuple[list[list[str]], set[str]]:
    """The lines of one method: the best exact kernel, what anybody could do without this package where that was
    measured, and the method; and the cards they were measured on."""

    def exact(row: dict[str, str]) -> str:
        ms = float(row["opponent_ms_p50"])
        return f"{1e3 * ms:.0f} µs" if method == "santa" else f"{ms:,.2f} ms"

    if method == "santa":
        rows = speed_rows(job="decode", B="1", s="128")
        lines = {"one token, B = 1, best exact": exact, "… SANTA, S = 128": decode_cell}
        return [[name, *summary_cells(rows, show)] for name, show in lines.items()], {row["gpu"] for row in rows}
    if method == "thinformer":
        rows = [row for row in speed_rows(job="encode", B="1", s="256", params="") if row["Lq"] == row["Lk"]]
        lines = {"no mask, best exact": exact, "… Thinformer, s = 256": cell}
        return [[name, *summary_cells(rows, show)] for name, show in lines.items()], {row["gpu"] for row in rows}
    rows, windows = prefill_rows(), windows_by_setting()
    body = [["causal prefill, best exact", *summary_cells(rows, exact)]]
    for s in ("512", "256"):
        params = "sinks=32 window=256 protected=256"
        seen = next(r["rows"] for r in quality_rows() if r["params"] == f"s={s} {params} halving=balanced")
        own = [row for row in rows if (row["s"], row["params"]) == (s, params)]
        body.append([f"… Express, s = {s}, {float(seen):,.0f} rows", *summary_cells(own, cell)])
        body.append(["… as many first and last tokens, FlexAttention", *summary_cells(windows[s], cell)])
    return body, {row["gpu"] for row in (*rows, *windows["512"], *windows["256"])}


def windows_by_setting() -> dict[str, list[dict[str, str]]]:
    """FlexAttention over sinks and a window of as many rows as Express sees, by the budget of Express: of the newest
    run at each length the longer window is that of 512."""
    by_length: dict[int, list[dict[str, str]]] = {}
    for row in speed_rows(job="window"):
        by_length.setdefault(int(row["Lk"]), []).append(row)
    found: dict[str, list[dict[str, str]]] = {"512": [], "256": []}
    for rows in by_length.values():
        run = [rows[-1][name] for name in ("date", "commit", "gpu")]
        own = [row for row in rows if [row[name] for name in ("date", "commit", "gpu")] == run]
        for s, row in zip(found, sorted(own, key=lambda row: -int(row["s"])), strict=False):
            found[s].append(row)
    return found


def speed_summary_table(*methods: str) -> str:
    """One table for all jobs of one card."""
    found = [summary_of(method) for method in methods]
    cards = sorted(set.union(*(cards for _, cards in found)))
    note = (
        f"{' and '.join(cards)}, bfloat16, 32 query and 8 KV heads of size 128. Best exact: the faster of "
        "torch's flash and cuDNN backends in the same run; × is over it, selection of rows included. Bold: faster."
    )
    note += " †: left to exact attention." if "santa" in methods else ""
    body = [line for lines, _ in found for line in lines]
    return markdown(["", *(f"n = {n:,}" for n in LENGTHS)], body) + f"\n\n{note}"


UNTIMED = "Not measured yet: no row of `speed.csv` has it."


def mixed_table() -> str:
    """Plans per KV head beside one plan for all heads with as many rows, and beside FlexAttention, of the same runs."""
    body, machines = [], set()
    rows = [row for row in speed_rows(job="mixed") if "graph=1" not in row["params"]]
    told = {id(row): params_of(row) for row in rows}
    by_run = {(told[id(x)].get("plan", f"flex {x['s']}"), x["commit"], x["Lk"]): x for x in rows}
    mixtures = {(told[id(x)].get("plan", ""), int(x["Lk"])): x for x in rows}
    for (plan, n), row in sorted(mixtures.items()):
        if not plan or "_as_" in plan:
            continue
        machines.add(f"{row['gpu']}, {row['date']}")
        beside = [f"window_as_{plan}", f"Express_as_{plan}", f"flex {row['s']}"]
        others = [by_run.get((name, row["commit"], row["Lk"])) for name in beside]
        over = [f"{float(row['ms_p50']) / float(x['ms_p50']):.2f}" if x else "–" for x in others]
        share = told[id(row)].get("selection")
        body.append([
            plan.replace("_", " "), f"{n:,}", f"{int(row['s']):,}", f"{float(row['opponent_ms_p50']):.2f} ms",
            cell(row), *over, f"{float(share):.0%}" if share else "–",
        ])  # fmt: skip
    header = ["mixture", "n", "rows", "best exact", "time", "over a window", "over Express", "over FlexAttention"]
    return markdown([*header, "selection"], body) + f"\n\n{'; '.join(sorted(machines))}." if body else UNTIMED


def first_token_table() -> str:
    """Seconds from a prompt to its first token by a whole model, of the last run at each length."""
    rows = newest(of_last_run(gpu_rows(job="first_token"), "Lk"), "method", "Lk", "s", "opponent")
    body = []
    for row in sorted(rows, key=lambda x: int(x["Lk"])):
        told, seconds = params_of(row), float(row["ms_p50"]) / 1e3
        name = {
            "exact": f"exact ({told.get('backend')})",
            "heads": f"plan of {told.get('plan')}",
            "express": "the same Express in all heads",
            "window": "sinks + window by FlexAttention",
        }[row["method"]]
        body.append([f"{int(row['Lk']):,}", name, f"{int(row['s']):,}", f"{seconds:.2f} s",
                     f"{float(row['speedup']):.2f}×", f"{float(told['none_ms']) / 1e3:.2f} s"])  # fmt: skip
    header = ["tokens", "attention", "rows", "first token after", "over best exact", "without attention"]
    runs = sorted({f"{row['gpu']}, {row['date']}" for row in rows})
    return markdown(header, body) + f"\n\n{'; '.join(runs)}." if body else UNTIMED


def window_table() -> str:
    """Express and FlexAttention over sinks and a window of as many rows, of the same runs."""
    windows = [(s, row) for s, rows in windows_by_setting().items() for row in rows]
    if not windows:
        return UNTIMED
    body = []
    for s, row in sorted(windows, key=lambda x: int(x[1]["Lk"])):
        run = {name: row[name] for name in ("commit", "date", "gpu", "Lk")}
        params = "sinks=32 window=256 protected=256"
        wanted = {**run, "job": "prefill", "s": s, "params": params}
        express = next(x for x in read("speed.csv") if wanted.items() <= x.items())
        exact = f"{float(row['opponent_ms_p50']):.2f} ms ({row['opponent']})"
        body.append([f"{int(row['Lk']):,}", f"{int(row['s']):,}", exact, cell(express), cell(row)])
    header = ["n", "rows", "best exact", "Express", "sinks + window by FlexAttention"]
    runs = sorted({f"{row['gpu']}, {row['date']}" for _, row in windows})
    return markdown(header, body) + f"\n\n{'; '.join(runs)}."


def sparse_table() -> str:
    """Milliseconds at the default stride of both patterns, over exact attention, and over FlexAttention where timed."""
    rows = [row for row in read("speed.csv") if row["method"] == "sparse"]
    flex = {(row["job"], row["Lq"]): params_of(row)["flex"] for row in rows if "flex" in row["params"]}
    rows = newest(rows, "job", "Lq")
    lengths = sorted({int(row["Lq"]) for row in rows})
    body = []
    for job in dict.fromkeys(row["job"] for row in rows):
        own = {int(row["Lq"]): row for row in rows if row["job"] == job}
        _, kind, *train = job.split("_")
        cells = [cell(own.get(n)) for n in lengths]
        body.append([f"{kind}, {'forward and backward' if train else 'forward'}", *cells])
        timed = [flex.get((job, str(n))) for n in lengths]
        body.append(["… FlexAttention, the same pattern", *(f"{float(x):.2f} ms" if x else "" for x in timed)])
        if train:
            body.append(
                ["… memory, beside inputs and output", *(f"{float(own[n]['peak_mb']):,.0f} MB" for n in lengths)]
            )
    first = rows[0]
    note = (
        f"{first['gpu']}, torch {first['torch']}, triton {first['triton']}; B=1, H=32, H_kv=8, D=128, bfloat16, "
        f"summary 32; × over exact cuDNN of the same run; measured {first['date']}."
    )
    return markdown(["", *(f"n = {n:,}" for n in lengths)], body) + f"\n\n{note}"


def train_sparse_table() -> str:
    """Bytes a second of the byte-level model, against the exact run that is as compiled or as eager."""
    last = {row["run"]: row for row in read("train_sparse.csv")}
    body = []
    for run, compiled, opponent in (
        ("exact", "no", "exact"), ("sparse", "no", "exact"), ("speed", "yes", "speed"), ("compiled", "yes", "speed"),
    ):  # fmt: skip
        row, ratio = last[run], float(last[run]["tokens_per_s"]) / float(last[opponent]["tokens_per_s"])
        speed = f"{float(row['tokens_per_s']) / 1e3:,.0f}k" + (f", {ratio:.2f}×" if run != opponent else "")
        judged = "" if run == "speed" else f"{float(row['held_out_bpb']):.2f}"
        attention = "exact" if run == opponent else "sparse"
        body.append([attention, compiled, speed, judged, f"{float(row['peak_mb']):,.0f}"])
    row = last["exact"]
    note = (
        f"{row['gpu']}, torch {row['torch']}; {int(row['parameters']) / 1e6:.0f}M parameters, {row['batch']} × "
        f"{int(row['context']):,} bytes a step, {int(row['tokens']) / 1e6:.1f} million in all (exact and compiled: a "
        f"tenth, for its speed only); bits per byte of held-out text; measured {row['date']}."
    )
    return markdown(["attention", "compiled", "bytes / s", "bits / byte", "memory, MB"], body) + f"\n\n{note}"


BATCHES = {
    "alone": "one sequence after the other",
    "packed": "packed sequences",
    "left": "batch padded on the left",
    "right": "batch padded on the right",
    "both": "batch padded on both sides",
}


def others_table() -> str:
    rows = speed_rows(method="express")
    special = [row for row in rows if row["job"] == "train" or row["B"] != "1" or row["Lq"] != row["Lk"]]
    rows = sorted(special, key=lambda row: (row["job"], row["B"], row["Lq"])) + speed_rows(method="express", D="64")
    body = []
    for row in rows:
        values = params_of(row)
        n = f"{int(row['Lk']):,}"
        job = f"prefill of {n}"
        if row["job"] == "train":
            job = f"forward and backward, {n}"
        elif "chunk" in values:
            job = f"chunk: the last {int(row['Lq']):,} queries of {n}"
        elif "padding" in values:
            job = f"{BATCHES[values['padding']]}, lengths {values['lengths'].replace('/', ', ')}"
        opponent = f"{float(row['opponent_ms_p50']):.2f} ms ({row['opponent']})"
        heads = f"{row['H']}/{row['H_kv']}, {row['D']}"
        body.append([job, heads, setting(row), opponent, cell(row), f"{float(row['peak_mb']):,.0f}"])
    return markdown(["job", "heads, D", "setting", "best exact", "Express", "memory, MB"], body)


def encode_table() -> str:
    body = []
    for row in gpu_rows(job="encode"):
        values = params_of(row)
        n, what = f"{int(row['Lk']):,}", ""
        if row["Lq"] != row["Lk"]:
            n = f"{int(row['Lq']):,} queries, {n} keys"
        if "lengths" in values:
            n = f"padded batch of {values['lengths'].replace('/', ' and ')}"
        if "graph" in values:
            what = ", both as CUDA graphs"
        shape = f"{row['H']}/{row['H_kv']}, {row['D']}, {row['dtype']}"
        opponent = f"{float(row['opponent_ms_p50']):.2f} ms ({row['opponent']})"
        body.append([n + what, shape, row["s"], opponent, cell(row), f"{float(row['peak_mb']):,.0f}"])
    return markdown(["tokens", "heads, D, dtype", "s", "best exact", "Thinformer", "memory, MB"], body)


def left_to_exact(row: dict[str, str]) -> bool:
    """Whether SANTA leaves the sizes of a row to exact attention unless it is told not to."""
    B, H, H_kv, Lk, D, S = (int(row[x]) for x in ("B", "H", "H_kv", "Lk", "D", "s"))
    return loses(B, H, H_kv, 1, Lk, 2 * B * H_kv * Lk * D, S) is not None


def decode_cell(row: dict[str, str]) -> str:
    text = f"{float(row['ms_p50']) * 1e3:.0f} µs, {float(row['speedup']):.2f}×"
    return f"{text} †" if left_to_exact(row) else f"**{text}**" if float(row["speedup"]) > 1 else text


def decode_table() -> str:
    rows = speed_rows(job="decode")
    columns = list(dict.fromkeys(row["s"] for row in rows))
    body = []
    for B, n in dict.fromkeys((row["B"], row["Lk"]) for row in rows):
        cells = {row["s"]: row for row in rows if (row["B"], row["Lk"]) == (B, n)}
        first = next(iter(cells.values()))
        exact = f"{float(first['opponent_ms_p50']) * 1e3:.0f} µs ({first['opponent']})"
        body.append([B, f"{int(n):,}", exact, *(decode_cell(cells[s]) for s in columns)])
    return markdown(["B", "keys", "best exact", *(f"S = {s}" for s in columns)], body)


def decode_heads_table() -> str:
    """Other heads, S = 128."""
    rows = [row for row in gpu_rows(job="decode", s="128") if (row["H_kv"], row["D"]) != ("8", "128")]
    lengths = sorted({int(row["Lk"]) for row in rows})
    body = []
    for H, H_kv, D, B in dict.fromkeys((row["H"], row["H_kv"], row["D"], row["B"]) for row in rows):
        cells = {int(row["Lk"]): row for row in rows if (row["H_kv"], row["D"], row["B"]) == (H_kv, D, B)}
        body.append([f"{H}/{H_kv}, {D}", B, *(decode_cell(cells[n]) for n in lengths)])
    return markdown(["heads, D", "B", *(f"{n:,} keys" for n in lengths)], body)


def decode_bytes_table() -> str:
    """Value rows counted beside those expected, and bytes beside time, both as parts of exact attention's."""
    rows = {(r["B"], r["Lk"], r["s"]): r for r in speed_rows(job="decode") if "rows" in r["params"]}
    body = []
    for (B, n, S), row in rows.items():
        if (B, n) not in (("1", "32768"), ("1", "131072"), ("8", "32768")):
            continue
        values = params_of(row)
        group, head = int(row["H"]) // int(row["H_kv"]), int(row["D"])
        read = (1 + float(values["rows"]) / int(n)) / 2
        stash = 2 * group * 2 / (head * 2) / 2  # written and read again, 2 bytes per query head and key
        body.append([
            B, f"{int(n):,}", S, values["rows"], values["expected"], f"{read:.3f}", f"{read + stash:.3f}",
            f"{1 / float(row['speedup']):.3f}",
        ])  # fmt: skip
    header = ["B", "keys", "S", "value rows read", "expected", "bytes / exact's", "with the stash", "time / exact's"]
    return markdown(header, body)


def compiling_table() -> str:
    """What the pass takes, and the whole compilation beside inductor's."""
    rows = newest(read("speed.csv"), "job", "params")
    body = []
    for row in rows:
        if row["job"] not in ("plan", "compile") or "grid=" in row["params"]:
            continue
        values = params_of(row)
        attention = {"sdpa": "F.scaled_dot_product_attention", "eager": "written out"}[values["attention"]]
        what = {"plan": "match, plan and rewrite", "compile": "the whole compilation"}[row["job"]]
        beside = f"{float(row['opponent_ms_p50']) / 1e3:.1f} s" if row["opponent"] else ""
        seconds = f"{float(row['ms_p50']) / 1e3:.2f} s"
        body.append([f"{what}, {values['layers']} layers", attention, seconds, beside, row["gpu"]])
    return markdown(["", "attention", "express", "plain inductor", "machine"], body)


def two_gpus_table() -> str:
    """Prefill on two GPUs beside one."""
    rows = newest(read("two-gpus.csv"), "gpu", "ranks", "model", "n", "method", "how")
    names = {"8b-layer": "a layer", "8b": "32 layers", "tensor": "tensor parallel", "all_to_all": "all-to-all"}
    body = [
        [names.get(row["model"], row["model"]), f"{int(row['n']):,}", row["method"], names.get(row["how"], row["how"]),
         f"{float(row['one_ms']):.0f}", f"{float(row['all_ms']):.0f}", f"{float(row['speedup']):.2f}x",
         f"{float(row['attention_speedup']):.2f}x" if row["attention_speedup"] else "",
         f"{float(row['sent_bytes'] or row['tensor_bytes']) / 1e6:,.0f}", f"{float(row['ring_bytes']) / 1e6:,.0f}"]
        for row in rows
    ]  # fmt: skip
    header = ["8B shape", "tokens", "attention", "split by", "one GPU, ms", "two, ms", "speed-up", "of attention",
              "MB sent in a layer", "by ring attention"]  # fmt: skip
    return markdown(header, body)


def steps_table() -> str:
    """What sampled decoding costs in KL per step, beside the exact rows of largest weight."""
    rows = [row for row in quality_rows() if row["task"] == "decode"]
    rows = [row for row in rows if row["n"] == rows[-1]["n"]]
    values = {(row["params"], row["metric"]): row for row in rows}
    body = []
    for params in sorted({row["params"] for row in rows}, key=lambda x: (int(x.split("S=")[1]), x)):
        kl, top1 = values[params, "kl"], values[params, "top1"]
        body.append(
            [params.replace("=", " "), f"{float(kl['rows']):.0f}", with_interval(kl, 4), f"{float(top1['value']):.2f}"]
        )
    return markdown(["policy", "value rows per KV head", "KL per step (95%)", "top-1"], body)


def rounding_table() -> str:
    """What rounding the query of sampled decoding saves and costs on SmolLM2."""
    rows = [row for row in quality_rows() if row["task"] == "bernoulli"]
    levels_of = re.compile(r"bernoulli (\d+)")
    values = {(int(found[1]) if (found := levels_of.search(row["params"])) else 0, row["metric"]): row for row in rows}
    body = []
    for levels in sorted({levels for levels, _ in values}, key=lambda x: (x > 0, -x)):
        kl, features = values[levels, "kl"], values.get((levels, "features"))
        read = "all" if features is None or levels == 0 else f"{100 * float(features['value']):.4g}%"
        body.append([str(levels) if levels else "no rounding", read, with_interval(kl, 4)])
    return markdown(["levels", "features read per KV head", "KL per step (95%)"], body)


def rounding_speed_table() -> str:
    """Decoding with a rounded query over keys that lie feature by feature."""
    found = {}
    for row in gpu_rows(job="bernoulli"):
        values = params_of(row)
        key = row["H_kv"], row["B"], row["Lk"], values["query"]
        found.setdefault(key, {})[values["keys"], int(values["levels"])] = row, values
    body = []
    for (H_kv, B, n, query), cells in sorted(found.items(), key=lambda x: (int(x[0][0]), int(x[0][1]), x[0][3])):
        exact = next(iter(cells.values()))[0]
        line = [f"{exact['H']}/{H_kv}", B, f"{int(n):,}", query, f"{1e3 * float(exact['opponent_ms_p50']):.0f} µs"]
        for key in (("tokens", 0), ("features", 0), ("features", 8), ("features", 4)):
            row, values = cells[key]
            text = f"{1e3 * float(row['ms_p50']):.0f} µs, {float(row['speedup']):.2f}×"
            read = f"; {100 * float(values['features']):.0f}% read, off by {float(values['rounded']):.2f}"
            line.append(text + (read if key[1] else ""))
        body.append(line)
    header = ["heads", "B", "keys", "query", "best exact", "SANTA", "its keys by feature", "8 levels", "4 levels"]
    return markdown(header, body)


def encoders_table() -> str:
    """Whole models with random weights: every site rewritten, and those that the planner rewrites."""
    body, rows = [], [(params_of(row), row) for row in gpu_rows(job="encode_model")]
    planned = {(x["model"], row["Lq"]): (x, row) for x, row in rows if "planner" in x}
    for values, row in rows:
        if "planner" in values:
            continue
        opponent = f"{float(row['opponent_ms_p50']):.1f} ms ({row['opponent']})"
        x, its = planned.get((values["model"], row["Lq"]), ({}, None))
        chosen = f"{cell(its)} ({x['rewritten']} sites)" if its else "–"
        body.append([values["model"], f"{int(row['Lq']):,}", row["s"], opponent, cell(row), chosen])
    return markdown(["model", "tokens", "s", "best exact", "Thinformer", "what the planner chooses"], body)


def decode_models_table() -> str:
    """A decoding step of whole models with random weights over a static cache."""
    body = []
    for row in gpu_rows(job="decode_model"):
        values = params_of(row)
        own, best, ms = float(values["transformers_ms"]), float(row["opponent_ms_p50"]), float(row["ms_p50"])
        name = values["model"].replace("-shape", "")
        body.append([name, row["B"], f"{int(row['Lk']):,}", f"{own:.1f} ms", f"{best:.1f} ms ({row['opponent']})",
                     f"**{ms:.1f} ms, {own / ms:.1f}× and {best / ms:.2f}×**"])  # fmt: skip
    return markdown(["model", "B", "cache", "as transformers decodes", "best exact kernel", "SANTA"], body)


def whole_steps_table() -> str:
    """Whole steps of an 8B shape as generate() sees them, after a prompt."""
    names = {
        "transformers": "transformers", "exact": "exact, rewritten", "santa": "SANTA, S = 128",
        "selected": "selected pages", "cache": "ExpressCache, uniform", "planned": "ExpressCache, planned",
    }  # fmt: skip
    body, found = [], gpu_rows(job="whole_step")
    kinds = [[x for x in found if bool(int(params_of(x).get("compiled", 0))) == compiled] for compiled in (False, True)]
    rows = [row for of in kinds for row in newest(of, "method", "B", "Lk")]
    for row in sorted(rows, key=lambda x: (int(x["B"]), int(x["Lk"]), x in kinds[1], list(names).index(x["method"]))):
        told, p50 = params_of(row), float(row["ms_p50"])
        first = "–" if row["method"] == "santa" else f"{float(told['ttft_s']):.2f} s"  # its prompt is read exactly
        over = f"{float(row['speedup']):.2f}× {row['opponent']}" if row["speedup"] else "–"
        held = f"{int(told.get('rows', row['Lk'])):,}"
        kind = "compiled" if row in kinds[1] else "eager"
        body.append([row["B"], f"{int(row['Lk']):,}", names[row["method"]], kind, held, first,
                     f"{p50:.2f} ms", f"{float(told['p99_ms']) / p50:.2f}×", over,
                     f"{float(row['peak_mb']) / 1e3:.1f} GB"])  # fmt: skip
    header = ["B", "tokens", "attention", "the rest", "rows held", "first token", "a step, median",
              "99th percentile over it", "over", "memory"]  # fmt: skip
    return markdown(header, body) + f"\n\n{rows[-1]['gpu']}, {rows[-1]['date']}." if body else UNTIMED


def decode_exact_table() -> str:
    """Exact steps of whole models as CUDA graphs, and attention alone with lengths."""
    body = []
    alone = {(row["B"], row["Lk"]): row for row in speed_rows(job="decode_exact") if "rows=lengths" in row["params"]}
    for row in newest(gpu_rows(job="decode_step", method="exact"), "B", "Lk"):
        at, cudnn = alone[row["B"], row["Lk"]], float(params_of(row)["cudnn_ms"])
        own, theirs, attention, best = (float(x[name]) for x in (row, at) for name in ("ms_p50", "opponent_ms_p50"))
        body.append([row["B"], f"{int(row['Lk']):,}", f"{theirs:.1f} ms", f"{cudnn:.1f} ms",
                     f"**{own:.1f} ms, {theirs / own:.1f}×**",
                     f"{1e3 * attention:.0f} µs; {at['opponent']} {1e3 * best:.0f} µs"])  # fmt: skip
    header = ["B", "cache", "transformers", "cuDNN, all rows, no mask", "exact, rewritten", "attention alone"]
    return markdown(header, body)


def embeddings_table() -> str:
    """How far the embeddings of MiniLM move, and what a search with them finds."""
    rows = [row for row in quality_rows() if row["model"] == "all-MiniLM-L6-v2" and row["n"] == "512"]
    values = {(row["method"], row["params"], row["metric"]): row for row in rows}
    body = []
    for method, params in dict.fromkeys((row["method"], row["params"]) for row in rows if row["metric"] == "recall1"):
        cosine, recall, overlap = (values[method, params, metric] for metric in ("cosine", "recall1", "overlap10"))
        name = {"thinformer": "Thinformer"}.get(method, method) + " " + params.replace("=", " ")
        body.append(
            [
                name.replace(" halving balanced", "").strip(),
                with_interval(cosine, 3),
                with_interval(recall, 2),
                f"{float(overlap['value']):.2f}",
            ]
        )
    return markdown(["attention", "cosine to exact (95%)", "recall@1 (95%)", "overlap of the first ten"], body)


def breakdown_table() -> str:
    rows = newest(read("breakdown.csv"), "gpu", "part", "n", "params")
    thin = {(r["n"], r["params"]): r for r in rows if r["part"] == "thin"}
    body = []
    for row in (r for r in rows if r["part"] == "attend"):
        t = thin[row["n"], row["params"]]
        body.append(
            [
                f"{int(row['n']):,}", row["params"].replace("=", " ").replace(" protected 0", ""),
                f"{float(t['ms']):.2f} ms", f"{float(t['share']):.0%}", f"{float(row['ms']):.2f} ms",
                f"{float(row['tflops']):.0f}", f"{float(row['floor_ms']):.2f} ms",
            ]
        )  # fmt: skip
    header = ["n", "setting", "thinning", "share", "attention", "TFLOP/s", "floor"]
    chains = [r for r in rows if r["part"] == "chain"]
    chain = markdown(
        ["rows of one bucket per head", *(f"{int(r['n']):,}" for r in chains)],
        [["µs", *(f"{float(r['ms']) * 1e3:.0f}" for r in chains)],
         ["ns per pair", *(f"{float(r['ns_per_pair']):.0f}" for r in chains)]],
    )  # fmt: skip
    return markdown(header, body) + "\n\n" + chain


def limits_table() -> str:
    """What limits the kernels that take a tenth of their call or more; nothing where nobody has run limits.py yet."""
    if not (RESULTS / "limits.csv").exists():
        return ""
    rows = newest(read("limits.csv"), "gpu", "call", "kernel")
    calls, body = {row["call"]: 0.0 for row in rows}, []
    for row in rows:
        calls[row["call"]] += float(row["us"])
    for row in rows:
        if float(row["us"]) >= calls[row["call"]] / 10:
            units = sorted((unit for unit in limits.UNITS if row[unit]), key=lambda unit: -int(row[unit]))[:3]
            busy = ", ".join(f"{unit} {row[unit]}%" for unit in units)
            kernel = f"`{row['kernel']}`"
            body.append(
                [row["call"], kernel, f"{float(row['us']):,.0f}", busy, row["occupancy"], row["waits"], row["limit"]]
            )
    header = ["call", "kernel", "µs", "busiest, % of its peak", "occupancy, %", "warps wait for", "limited by"]
    first = rows[-1]
    said = (
        f"`python examples/bench/limits.py`: counters of ncu, one sequence, {limits.H}/{limits.H_KV} heads of size "
        f"{limits.D}, bfloat16, {limits.N:,} tokens unless a line says otherwise, cold caches, clocks as they come. "
        f"A kernel is limited by a unit that is busy for {limits.BUSY}% of its peak or more, by too few programs, or "
        "else by what its warps wait for most. Kernels of less than a tenth of their call are left out. "
        f"{first['gpu']}, triton {first['triton']}, {first['date']}."
    )
    return f"{said}\n\n{markdown(header, body)}"


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    try:
        speedup = float(row["speedup"])
    except ValueError:
        return row["speedup"]
    text = f"{float(row['ms_p50']):.2f} ms, {speedup:.2f}×"
    return f"**{text}**" if speedup > 1 else text


def with_interval(row: dict[str, str], digits: int) -> str:
    value, low, high = (f"{float(row[name]):.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def quality_rows() -> list[dict[str, str]]:
    return newest(read("quality.csv"), "gpu", "task", "n", "method", "params", "metric")


def quality_table() -> str:
    tasks = ("natural texts", "repetitive texts")
    rows = [row for row in quality_rows() if row["metric"] == "kl" and row["task"] in tasks]
    # repetitions with another seed and variants of one rule's constant stay in the file
    rows = [row for row in rows if "seed=" not in row["params"] and "flatten=" not in row["params"]]
    top1 = {(r["task"], r["method"], r["params"]): r for r in quality_rows() if r["metric"] == "top1"}
    body = []
    for key in dict.fromkeys((row["method"], row["params"]) for row in rows):
        natural, repetitive = (
            next(r for r in rows if (r["method"], r["params"]) == key and r["task"] == task)
            for task in ("natural texts", "repetitive texts")
        )
        agreement = float(top1[("natural texts", *key)]["value"])
        body.append(
            [
                policy(natural),
                f"{float(natural['rows']):.0f}",
                with_interval(natural, 3),
                f"{agreement:.3f}",
                f"{float(repetitive['value']):.3f}",
            ]
        )
    header = ["policy", "rows seen", "KL, natural texts (95%)", "top-1", "KL, repetitive texts"]
    first = rows[0]
    note = (
        f"{first['model']} in bfloat16, {int(first['n']):,} tokens per text, positions from 2,048 on, all 30 layers "
        f"rewritten; {first['gpu']}, {first['date']}. KL(exact ‖ policy) in nats per token; the interval resamples "
        "chunks of 512 tokens."
    )
    return markdown(header, body) + f"\n\n{note}"


def policy(row: dict[str, str]) -> str:
    name = {"express": "Express", "streaming_llm": "StreamingLLM", "exact": "exact"}[row["method"]]
    values = params_of(row)
    values = {k: v for k, v in values.items() if not (k == "protected" and v == "0")}
    if values.get("halving") == "balanced":
        del values["halving"]
    return " ".join([name, ", ".join(f"{k} {v}" for k, v in values.items())]).strip()


def needle_table() -> str:
    rows = [row for row in quality_rows() if row["metric"] == "recalled"]
    columns = list(dict.fromkeys((row["task"], row["n"]) for row in rows))
    body = []
    for key in dict.fromkeys((row["method"], row["params"]) for row in rows):
        cells = {(r["task"], r["n"]): r for r in rows if (r["method"], r["params"]) == key}
        rows_seen = "n" if key[0] == "exact" else f"{float(cells[columns[-1]]['rows']):.0f}"
        counts = [f"{cells[c]['value']}/{cells[c]['high']}" if c in cells else "–" for c in columns]
        body.append([policy(next(iter(cells.values()))), rows_seen, *counts])
    return markdown(["policy", "rows seen", *(f"{task}, {int(n):,}" for task, n in columns)], body)


def coverage_table() -> str:
    """A line per architecture: its sites in all masks and phases, written by hand and as SDPA."""
    key = ("architecture", "implementation", "mask", "phase")
    found = newest(read("coverage.csv"), *key, "torch")
    rows = [row for row in found if "+cpu" in row["torch"]]
    other = [row for row in found if "+cpu" not in row["torch"]]
    fused = newest([row for row in read("coverage.csv") if row["torch_fused"]], *key)
    fused = {tuple(row[k] for k in key): row["torch_fused"] for row in fused}
    rows = [{**row, "torch_fused": fused.get(tuple(row[k] for k in key), "")} for row in rows]
    # what transformers itself does not run
    rows, other = ([row for row in x if not row["reasons"].startswith("the model itself")] for x in (rows, other))

    def total(chosen: list[dict[str, str]], column: str) -> int:
        return sum(int(row[column].split()[0]) for row in chosen if row[column])

    body = []
    for name in dict.fromkeys(row["architecture"] for row in rows):
        own = [row for row in rows if row["architecture"] == name]
        eager = [row for row in own if row["implementation"] == "eager"]
        sdpa = [row for row in own if row["implementation"] != "eager"]
        cells = [f"{total(own, 'found')} of {total(own, 'expected')}"]
        for part, counts in ((eager, ("proven", "rewritten", "torch_fused")), (sdpa, ("proven",))):
            cells += [f"{total(part, column)} of {total(part, 'expected')}" if part else "–" for column in counts]
        errors = [float(row[column]) for row in own for column in ("error", "gradient_error") if row[column]]
        body.append([name, *cells, f"{max(errors):.0e}" if errors else "–"])
    header = ["architecture", "sites found", "by hand: proven", "rewritten", "fused by torch", "SDPA: proven"]

    def worst(chosen: list[dict[str, str]]) -> float:
        return max(float(row[column]) for row in chosen for column in ("error", "gradient_error") if row[column])

    notes = []
    for part in (rows, other):
        eager = [row for row in part if row["implementation"] == "eager"]
        notes.append(
            f"torch {part[-1]['torch']}, transformers {part[-1]['transformers']}, {part[-1]['date']}: "
            f"{total(part, 'found')} of {total(part, 'expected')} sites found, {total(eager, 'rewritten')} of "
            f"{total(eager, 'expected')} written by hand rewritten, largest relative error {worst(part):.0e}."
        )
    text = f"{notes[0]} The same on the other stack, without a table of its own: {notes[1]}"
    return markdown([*header, "largest relative error"], body) + f"\n\n{text}"


def foreign_table() -> str:
    """A line per package and route, of the newest row of every case."""
    rows = newest(read("foreign.csv"), "architecture", "phase", "route")
    body, ran = [], [row for row in rows if not row["outcome"].startswith("untouched")]

    def total(chosen: list[dict[str, str]], column: str) -> int:
        return sum(int(row[column]) for row in chosen if row[column])

    for package, route in dict.fromkeys((row["package"], row["route"]) for row in ran):
        own = [row for row in ran if (row["package"], row["route"]) == (package, route)]
        right, wrong = (sum(row["outcome"] == word for row in own) for word in ("right", "wrong"))
        counts = [f"{total(own, column)} of {total(own, 'expected')}" for column in ("found", "proven", "rewritten")]
        errors = [float(row["error"]) for row in own if row["outcome"] == "right"]
        body.append([
            f"{package} {own[0]['version']}", route, str(len({row["architecture"] for row in own})),
            f"{right} of {len(own)}", str(wrong), *(counts if route != "inductor" else ["–"] * 3), f"{max(errors):.0e}",
        ])  # fmt: skip
    header = ["package", "route", "architectures", "cases right", "wrong", "sites found", "proven", "rewritten"]
    names = len({row["architecture"] for row in ran})
    date = max(row["date"] for row in ran)
    note = f"{names} architectures, torch {ran[-1]['torch']}, {date}; every case: foreign.csv."
    return markdown([*header, "largest error"], body) + f"\n\n{note}"


@functools.cache
def judged() -> list[Judged]:
    return judge(read("speed.csv"))


def planned_table() -> str:
    """Plans per KV head and Express beside a window: measured and predicted milliseconds."""
    body = []
    for name, row, ms in newest_prefills(read("speed.csv")):
        measured = float(row["ms_p50"])
        off = f"{ms / measured - 1:+.0%}"
        body.append([name, f"{int(row['Lk']):,}", f"{measured:.2f} ms", f"{ms:.2f} ms", off, row["date"]])
    return markdown(["rows", "n", "measured", "predicted", "off by", "measured on"], body)


def planner_table() -> str:
    """How good the planner's choices were at the shapes of the grid."""
    body = []
    for kind, what in (("prefill", "prefill, Express"), ("encode", "no mask, Thinformer"), ("decode", "decode, SANTA")):
        part = [x for x in judged() if x.kind == kind]
        ratios = [x.ratio for x in part]
        exact = [x.ratio * min(x.method, x.exact) / x.exact for x in part]
        errors = [abs(x.predicted / x.method - 1) for x in part]
        taken = sum(x.chosen != "exact" for x in part)
        body.append(
            [what, str(len(part)), str(taken), f"{median(ratios):.2f}×", f"{max(ratios):.2f}×", f"{max(exact):.2f}×",
             f"{100 * median(errors):.0f}%, {100 * max(errors):.0f}%"]
        )  # fmt: skip
    header = ["sites", "shapes", "approximation chosen", "time / best, median", "worst", "time / exact, worst"]
    return markdown([*header, "prediction off by, median and worst"], body)


def crossings_table() -> str:
    """Measured and predicted crossovers."""
    rows = [
        [x.kind, str(x.B), f"{x.method}, s={x.policy.budget}", f"{x.measured:,.0f}", f"{x.predicted:,}",
         f"{100 * (x.predicted / x.measured - 1):+.0f}%"]
        for x in crossings(judged())
    ]  # fmt: skip
    return markdown(["sites", "B", "method", "faster from, measured", "predicted", "off by"], rows)


def tolerance_table() -> str:
    """Budgets per layer beside uniform ones, on texts that were not used to choose them."""
    rows = [row for row in quality_rows() if row["task"].startswith("unseen")]
    body = []
    for params in dict.fromkeys(row["params"] for row in rows):
        own = {(row["task"].split()[1], row["metric"]): row for row in rows if row["params"] == params}
        natural, repetitive = own["natural", "kl"], own["repetitive", "kl"]
        values = dict(part.split("=") for part in params.split())
        layers = re.sub(r"([0-9]+)x", r"\1 × ", values.get("layers", "")).replace("/", ", ")
        per_layer = f"per layer, tolerance {values.get('tolerance')} ({layers})"
        name = f"uniform, s={values['s']}" if "s" in values else per_layer
        body.append(
            [name, f"{float(natural['rows']):.0f}",
             with_interval(natural, 3),
             f"{float(own['natural', 'top1']['value']):.3f}", f"{float(repetitive['value']):.3f}"]
        )  # fmt: skip
    return markdown(["budgets", "rows seen", "KL, natural texts (95%)", "top-1", "KL, repetitive texts"], body)


UNIFORM = {
    "streaming": "StreamingLLM",
    "express": "uniform Express",
    "protected": "uniform, protected keys (KeyDiff)",
    "selected": "uniform, selected blocks",
}
CHOSEN = {
    "per head": "plan per {}",
    "window or everything": "window or everything, per {}",
    **{f"without {x}": f"plan per {{}} without {x}" for x in ("thinned", "protected", "selected", "everything")},
    "without records": "plan per {}, profiled without the ledger",
    "without last": "plan per {}, last queries like the others",
    "last 16": "plan per {}, last 16 queries exact",
    "layers alike": "plan per {}, errors of all layers weighed alike",
}
WEIGHED = {f", questions {factor}": f", questions {factor} times" for factor in (3, 9, 27)}
"""Of plans that were chosen with ``--questions`` above 1: how much more than texts haystacks with questions count."""


def weighed(names: Mapping[str, str], behind: str = "") -> dict[str, str]:
    """What methods are called that a profile chooses, with all weights; their names end with ``behind``."""
    return {
        name + more + behind: words + said
        for name, words in names.items()
        for more, said in {"": "", **WEIGHED}.items()
    }


QUERY_HEADS = weighed({name: words.format("query head") for name, words in CHOSEN.items()}, ", query heads")
KV_HEADS = weighed({name: words.format("KV head") for name, words in CHOSEN.items()})
REPEATED = "{}, keys and values repeated for every query head"
PLANS = {
    **QUERY_HEADS,
    **KV_HEADS,
    **{f"{name}, heads repeated": REPEATED.format(CHOSEN[name].format("head")) for name in [*CHOSEN][:2]},
    "per layer": "plan per layer",
    **UNIFORM,
    **{f"{name}, last exact": f"{words}, last queries exact" for name, words in UNIFORM.items()},
}
SUMMARY = ("per head", "streaming", "streaming, last exact")
BEST = "per head, query heads"
RECALLED = (
    *(BEST, "per head, questions 3, query heads", "per head", "without last"),
    *("streaming", "streaming, last exact", "express", "express, last exact"),
)
"""What the methods of plans.csv are called, in the order of the tables."""

Run = tuple[str, int, str]
UNMEASURED = "Not measured yet: no row of `plans.csv` has it."
PLAN = ("gpu", "model", "n", "method", "budget")  # columns


def plan_rows(file: str = "plans.csv") -> dict[Run, list[dict[str, str]]]:
    """The newest rows of a file of plans by model, length and machine, the longest first, with their budgets."""
    found: dict[Run, list[dict[str, str]]] = {}
    rows = read(file) if (RESULTS / file).exists() else []
    rows = [{**row, "budget": params_budget(row["params"])} for row in rows]
    for row in newest(of_last_run(rows, *PLAN), *PLAN, "task", "metric"):
        found.setdefault((row["model"], int(row["n"]), row["gpu"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "SmolLM2-135M-Instruct", -item[0][1])))


def params_budget(params: str) -> str:
    """The budget of a row of plans.csv; "" where it has none."""
    return params.split(";")[0].removeprefix("budget=") if params.startswith("budget=") else ""


def of_plans(rows: list[dict[str, str]], names: Mapping[str, str] = PLANS) -> list[list[dict[str, str]]]:
    """The rows of every plan, by budget and in the order of ``names``."""
    by_plan: dict[tuple[float, int], list[dict[str, str]]] = {}
    for row in rows:
        if row["method"] in names:
            by_plan.setdefault((float(row["budget"]), [*names].index(row["method"])), []).append(row)
    return [own for _, own in sorted(by_plan.items())]


def recall_of(rows: list[dict[str, str]], task: str = "") -> str:
    """Needles that were found of those that exact attention finds, over all tasks that begin so."""
    own = [row for row in rows if row["metric"] == "recalled" and row["task"].startswith(task)]
    hits, solved = (sum(int(row[k]) for row in own) for k in ("value", "high"))
    return f"{hits} of {solved}" if solved else "–"


def plan_line(own: list[dict[str, str]], stream: float, names: Mapping[str, str] = PLANS) -> list[str]:
    """Name, rows, KL, its part of StreamingLLM's, 99th percentile, top-1, needles."""
    measured = {row["metric"]: row for row in own if row["task"].startswith("texts")}
    kl = measured["kl"]
    return [
        names[kl["method"]], f"{float(kl['rows']):,.0f}", with_interval(kl, 4), f"{float(kl['value']) / stream:.2f}",
        f"{float(measured['kl_median']['value']):.4f}", f"{float(measured['kl_p99']['value']):.2f}",
        f"{float(measured['top1']['value']):.3f}", recall_of(own),
    ]  # fmt: skip


def stream_of(plans: list[list[dict[str, str]]], budget: str, name: str = "streaming") -> float:
    """The KL of StreamingLLM at a budget."""
    rows = (row for own in plans for row in own if (row["method"], row["budget"]) == (name, budget))
    return next(float(row["value"]) for row in rows if row["metric"] == "kl" and row["task"].startswith("texts"))


PLAN_HEADER = ["policy", "rows", "KL (95%)", "× StreamingLLM", "median", "99th percentile", "top-1", "needles"]


def plans_table() -> str:
    """A table for every run: all policies at equal rows."""
    found = []
    for (model, n, gpu), rows in plan_rows().items():
        plans = of_plans(rows)
        body = [plan_line(own, stream_of(plans, own[0]["budget"])) for own in plans]
        texts = next(row["task"].partition(": ")[2] for row in plans[0] if row["task"].startswith("texts"))
        date = plans[0][0]["date"]
        profiled = [row for row in rows if row["metric"] == "seconds"]
        said = f"**{model}, {n:,} tokens** ({gpu}, {date}); judged: {texts}"
        if profiled:
            said += f"; profiled in {float(profiled[0]['value']):.0f} s: {profiled[0]['task'].partition(': ')[2]}"
        found.append(f"{said}.\n\n{markdown(PLAN_HEADER, body)}")
    return "\n\n".join(found) or UNMEASURED


def plans_summary_table() -> str:
    """Plans and StreamingLLM at equal rows, at the longest length of every model; of smaller budgets
    the plan per query head alone."""
    body, machines, seen = [], set(), set()
    for (model, n, gpu), rows in plan_rows().items():
        if model in seen:
            continue
        seen.add(model)
        machines.add(gpu)
        plans = of_plans(rows)
        largest = plans[-1][0]["budget"]
        for own in plans:
            method, budget = own[0]["method"], own[0]["budget"]
            if method == BEST or (budget == largest and method in SUMMARY):
                name, count, kl, ratio, _, p99, top1, needles = plan_line(own, stream_of(plans, budget))
                where = f"{model.split('-')[0]}, {n:,}"
                body.append([where, name, count, kl, ratio, p99, top1, needles])
    header = ["model, tokens", *(x for x in PLAN_HEADER if x != "median")]
    note = (
        f"{' and '.join(sorted(machines))}; rows: mean over heads and queries; KL(exact ‖ rewritten) in nats per "
        "token on texts that were not profiled; needles: found of those that exact attention finds."
    )
    return markdown(header, body) + f"\n\n{note}" if body else UNMEASURED


def recall_table() -> str:
    """Recall by task and haystack, of every run that asked for needles, at its largest budget."""
    found = []
    for (model, n, gpu), rows in plan_rows().items():
        asked = [row for row in rows if row["method"] == "exact"]
        if not asked:
            continue
        largest = max((row["budget"] for row in rows if row["budget"]), key=float)
        own = {m: [r for r in rows if (r["method"], r["budget"]) == (m, largest)] for m in RECALLED}
        methods = [m for m, its in own.items() if its]
        body = [
            [row["task"], f"{row['value']} of {row['high']}", *(recall_of(own[m], row["task"]) for m in methods)]
            for row in asked
        ]
        said = f"**{model}, {n:,} tokens**, at most {float(largest):,.0f} rows ({gpu})."
        found.append(f"{said}\n\n{markdown(['task, haystack', 'exact', *(PLANS[m] for m in methods)], body)}")
    return "\n\n".join(found) or UNMEASURED


CACHES = {
    **weighed(
        {
            "per head": "plan per head",
            "without everything": "plan per head, of constant size",
            "window or everything": "windows or everything, per head",
            "one window or everything": "one window or everything, per head (DuoAttention-like)",
        }
    ),
    "streaming": "StreamingLLM",
    "protected": "uniform, protected keys (KeyDiff)",
    "express": "uniform Express",
    "thinned": "uniform, thinned by coins",
    "random": "uniform, evicted by chance",
    "selected": "uniform, pages",
    "snapkv": "SnapKV (query-aware)",
    **weighed({"per head": "plan per head, the prompt too"}, ", prompt"),
    "streaming, prompt": "StreamingLLM, the prompt too",
    "everything": "all tokens, through the same cache",
}
"""What the methods of caching.csv are called, in the order of the tables."""


def caches_of(part: str) -> dict[str, str]:
    """The methods of a part of caching.py, as its rows name them."""
    return {name + (f", {part}" if part != "cache" else ""): words for name, words in CACHES.items()}


def caching_table(part: str) -> str:
    """A table for every run of a part: the policies at equal rows."""
    names, found = caches_of(part), []
    stream = next(name for name in names if name.startswith("streaming"))
    for (model, n, gpu), rows in plan_rows("caching.csv").items():
        plans = of_plans([row for row in rows if row["budget"]], names)
        if not plans:
            continue
        body = [plan_line(own, stream_of(plans, own[0]["budget"], stream), names) for own in plans]
        task = next(row["task"].partition(": ")[2] for row in plans[0] if row["task"].startswith("texts"))
        said = f"**{model}, {n:,} tokens before** ({gpu}, {plans[0][0]['date']}); texts: {task}."
        found.append(f"{said}\n\n{markdown(PLAN_HEADER, body)}")
    return "\n\n".join(found) or UNMEASURED.replace("plans.csv", "caching.csv")


def drift_table() -> str:
    """KL by position in a long continuation, of every policy."""
    names, found = caches_of("long"), []
    for (model, n, gpu), rows in plan_rows("caching.csv").items():
        plans = of_plans([row for row in rows if row["budget"]], names)
        body, bands = [], []
        for own in plans:
            bands = [row for row in own if row["metric"].startswith("kl ")]
            values = [f"{float(row['value']):.3f} ({float(row['low']):.3f}–{float(row['high']):.3f})" for row in bands]
            body.append([names[own[0]["method"]], f"{float(own[0]['rows']):,.0f}", *values])
        if body:
            header = ["policy", "rows", *(row["metric"].removeprefix("kl ") for row in bands)]
            found.append(f"**{model}, behind {n:,} tokens** ({gpu}).\n\n{markdown(header, body)}")
    return "\n\n".join(found) or UNMEASURED.replace("plans.csv", "caching.csv")


HAYSTACKS = ("noise", "prose", "code")


def protected_rows(is_mass: bool) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The newest rows of protected.csv by model, length and machine: of the mass, or of the judged scores."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    rows = [row for row in read("protected.csv") if row["method"] != "exact"]
    rows = [row for row in rows if row["task"].startswith("mass") == is_mass]
    for row in newest(rows, "gpu", "model", "n", "task", "method", "rows", "metric"):
        found.setdefault((row["model"], f"{int(row['n']):,} tokens", row["gpu"]), []).append(row)
    return found


def protected_table() -> str:
    """What the places of every score hold of the mass, by haystack and on average."""
    found = []
    for run, rows in protected_rows(is_mass=True).items():
        shares = {(x["method"], x["rows"], x["metric"], x["task"].partition(": ")[2]): float(x["value"]) for x in rows}
        counts, cases = sorted({row["rows"] for row in rows}, key=int), {}
        header, body = ["score"], {}
        for count in counts:
            header += [f"{count} places: {HAYSTACKS[0]}", *HAYSTACKS[1:], "mean", "other queries"]
            for name in dict.fromkeys(row["method"] for row in rows):
                needle, late = ([shares[name, count, of, hay] for hay in HAYSTACKS] for of in ("needle", "queries"))
                line = [*(f"{x:.2f}" for x in needle), f"**{fmean(needle):.2f}**", f"{fmean(late):.2f}"]
                body.setdefault(name, [name]).extend(line)
        for row in rows:
            cases[row["task"].partition(": ")[2]] = params_of(row)["cases"]
        counted = ", ".join(f"{cases[hay]} in {hay}" for hay in HAYSTACKS)
        said = f"**{', '.join(run)}**, {rows[0]['date']}; needles that exact attention finds: {counted}."
        found.append(f"{said}\n\n{markdown(header, [*body.values()])}")
    return "\n\n".join(found)


def protected_judged_table() -> str:
    """Policies whose places are given by a score: KL on texts and recall."""
    found = []
    for run, rows in protected_rows(is_mass=False).items():
        names = {row["method"]: row["method"] for row in rows}
        own = [[{**row, "budget": ""} for row in rows if row["method"] == name] for name in names]
        body = [plan_line(x, stream_of(own, "", "key"), names) for x in own]
        header = ["score", *(x.replace("StreamingLLM", "`key`") for x in PLAN_HEADER[1:])]
        said = next(row for row in rows if row["task"].startswith("texts"))
        found.append(
            f"**{', '.join(run)}**, {said['date']}: {said['params']}; {said['task']}.\n\n{markdown(header, body)}"
        )
    return "\n\n".join(found)


def triton_table() -> str:
    """What every kernel that spills with some Triton compiles to with each of them, if it is in all of their tables."""
    found: dict[str, dict[str, dict[tuple[str, ...], dict[str, str]]]] = {}
    for path in RESULTS.glob("device-code*.csv"):
        for row in read(path.name):
            variants = found.setdefault(row["kernel"], {}).setdefault(row["triton"], {})
            variants[row["dtype"], row["D"], row["ptx"]] = row
    tritons = sorted({triton for of in found.values() for triton in of})

    def cell(variants: dict[tuple[str, ...], dict[str, str]]) -> str:
        most = max(int(row["registers"]) for row in variants.values())
        spilled = [int(row["spilled"]) for row in variants.values() if row["spilled"] != "0"]
        return f"{most}; {sum(spilled):,} in {len(spilled)} of {len(variants)}" if spilled else f"{most}; 0"

    known = {kernel: of for kernel, of in sorted(found.items()) if len(of) == len(tritons)}
    lines = {kernel: [cell(of[triton]) for triton in tritons] for kernel, of in known.items()}
    spilling = [[f"`{kernel}`", *line] for kernel, line in lines.items() if not all(x.endswith("; 0") for x in line)]
    return f"{markdown(['kernel', *tritons], spilling)}\n\n{len(lines) - len(spilling)} kernels more spill with none."


def triton_times_table() -> str:
    """Calls of every kind with one Triton and with another, by ``benchmark.py --versions``."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in read("triton.csv"):
        plan = params_of(row).get("plan", "")
        words = [row["job"].replace("_", " "), row["method"], plan, f"s={row['s']}" if row["s"] and not plan else ""]
        kernel = "the plain kernel" if params_of(row).get("kernel") else ""
        key = (", ".join(filter(None, [*words, kernel])), row["dtype"])
        found.setdefault(key, {})[row["triton"]] = row
    tritons = sorted({triton for of in found.values() for triton in of})
    body = []
    for (call, dtype), of in found.items():
        times = [float(of[triton]["ms_p50"]) for triton in tritons]
        body.append([call, dtype, *(f"{x:.3g} ms" for x in times), f"{times[-1] / times[0]:.2f}×"])
    return markdown(["call, 32,768 tokens", "dtype", *tritons, "ratio"], body)


PARTS = {
    "custom-method": functools.partial(quoted, "examples/custom_method.py"),
    "speed-summary": functools.partial(speed_summary_table, "express", "thinformer", "santa"),
    **{f"figures-{x}": functools.partial(speed_summary_table, x) for x in ("express", "thinformer", "santa")},
    "methods": methods_table,
    **{f"options-{name}": METHODS[name].options.markdown for name in SHIPPED if name != "exact"},
    "speed": speed_table,
    "window": window_table,
    "mixed": mixed_table,
    "first-token": first_token_table,
    "others": others_table,
    "sparse": sparse_table,
    "train-sparse": train_sparse_table,
    "encode": encode_table,
    "encoders": encoders_table,
    "decode": decode_table,
    "decode-heads": decode_heads_table,
    "rounding": rounding_table,
    "rounding-speed": rounding_speed_table,
    "decode-models": decode_models_table,
    "whole-steps": whole_steps_table,
    "decode-exact": decode_exact_table,
    "decode-bytes": decode_bytes_table,
    "compiling": compiling_table,
    "coverage": coverage_table,
    "foreign": foreign_table,
    "planner": planner_table,
    "planned": planned_table,
    "crossings": crossings_table,
    "plans-summary": plans_summary_table,
    "plans": plans_table,
    "recall": recall_table,
    "protected": protected_table,
    "protected-judged": protected_judged_table,
    "caching": functools.partial(caching_table, "cache"),
    "pages": functools.partial(caching_table, "selected"),
    "drift": drift_table,
    "tolerance": tolerance_table,
    "steps": steps_table,
    "two-gpus": two_gpus_table,
    "embeddings": embeddings_table,
    "breakdown": breakdown_table,
    "limits": limits_table,
    "quality": quality_table,
    "needles": needle_table,
    "triton": triton_table,
    "triton-times": triton_times_table,
}


_MARKED = re.compile(r"<!-- ([a-z-]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)


def documents() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parts_of(text: str) -> list[str]:
    """The names of the generated parts of a page; raises ``ValueError`` for one that is unknown or not closed."""
    names = _MARKED.findall(text)
    opened = re.findall(r"<!-- /?([a-z-]+) -->", text)
    if unknown := sorted({*opened} - {*PARTS}) or len(opened) != 2 * len(names):
        raise ValueError(f"markers {unknown or opened}: must be pairs <!-- name --> and <!-- /name --> of {[*PARTS]}")
    return [name for name, _ in names]


def filled(text: str) -> str:
    """``text`` with every part between ``<!-- name -->`` and ``<!-- /name -->`` written anew."""
    parts_of(text)
    return _MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{PARTS[found[1]]()}\n<!-- /{found[1]} -->", text)


def plot(path: Path) -> None:
    """Speed-up over the best exact backend against n, with the FLOP floor of each setting dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = prefill_rows()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(map(setting, rows)):
        points = sorted((int(row["Lq"]), float(row["speedup"])) for row in rows if setting(row) == name)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"Express {name}")
        row = next(row for row in rows if setting(row) == name)
        values = params_of(row)
        seen = 3.5 * int(row["s"]) + sum(int(values[k]) for k in ("sinks", "window", "protected"))
        axes.plot([n for n, _ in points], [max(1, n / 2 / seen) for n, _ in points], "--", color=line.get_color(), lw=1)
    axes.axhline(1, color="black", lw=1)
    first = rows[0]
    axes.set(
        xscale="log", yscale="log", xlabel="tokens n", ylabel="speed-up over the best exact backend",
        title=f"Causal prefill, {first['gpu']}; dashed: ratio of FLOPs",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_predictions(path: Path) -> None:
    """Predicted against measured milliseconds at the shapes of the grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    found = judged()
    exact = {(x.kind, x.spec.B, x.spec.Lk): (x.exact, x.predicted_exact) for x in found}
    series = {"exact": list(exact.values())}
    for x in found:
        series.setdefault(x.row["method"], []).append((x.method, x.predicted))
    for name, points in series.items():
        axes.scatter(*zip(*points, strict=True), s=14, label=f"{name} ({len(points)} shapes)")
    ends = [min(min(p) for points in series.values() for p in points), max(max(p) for x in series.values() for p in x)]
    axes.plot(ends, ends, color="black", lw=1)
    axes.set(
        xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms",
        title=f"Predicted and measured, {found[0].row['gpu']}",
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_sparse(path: Path) -> None:
    """Milliseconds of Sparse Transformer attention and of the best exact one over n, with the line of n sqrt(n)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, train in zip(axes, ("", "_train"), strict=True):
        for kind in ("fixed", "strided"):
            rows = newest(speed_rows(job=f"sparse_{kind}{train}"), "Lq")
            rows.sort(key=lambda row: int(row["Lq"]))
            n, ms = [int(row["Lq"]) for row in rows], [float(row["ms_p50"]) for row in rows]
            (line,) = axis.plot(n, ms, marker="o", label=f"{kind}, default stride")
            axis.plot(n, [ms[-1] * (x / n[-1]) ** 1.5 for x in n], "--", color=line.get_color(), lw=1)
        axis.plot(n, [float(row["opponent_ms_p50"]) for row in rows], marker=".", color="black", label="exact (cuDNN)")
        axis.set(xscale="log", yscale="log", xlabel="tokens n", title="forward and backward" if train else "forward")
    axes[0].set(ylabel=f"ms, {rows[0]['gpu']}; dashed: n sqrt(n)")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    args = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in documents()}
    if missing := sorted({*PARTS} - {name for text in texts.values() for name in parts_of(text)}):
        sys.exit(f"no page shows {', '.join(missing)}")
    new = {path: filled(text) for path, text in texts.items()}
    changed = [path for path, text in texts.items() if new[path] != text]
    if args.check:
        for path in changed:
            print(f"{path.relative_to(ROOT)} is not what the results and sources say: run examples/bench/tables.py")
        return int(bool(changed))
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    plot(RESULTS / "speedup.png")
    plot_predictions(RESULTS / "predictions.png")
    plot_sparse(RESULTS / "sparse-scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
