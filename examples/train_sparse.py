"""Train a byte-level language model at 16,384 bytes of context, once with exact attention and once with sparse.

    python examples/train_sparse.py --batch 4 --steps 200 --out examples/bench/results/train_sparse.csv
    python examples/train_sparse.py --context 256 --dim 32 --layers 2 --heads 2 --batch 1 --steps 4     # a taste
    python examples/train_sparse.py --plot examples/bench/results/train_sparse.csv    # the picture of such a file

The same model, the same initial weights, the same text in the same order; the runs differ in one line:

    exact       the model as it is: F.scaled_dot_product_attention(.., is_causal=True)
    sparse      rewrite_attention(model, methods=["sparse"]): local blocks and summary columns (arXiv 1904.10509)
    compiled    torch.compile(model, backend="express", options={"methods": ["sparse"]})
    speed       the exact model compiled by inductor, a tenth of the steps: only how fast that is

The text is what every machine with Python has: the sources of its standard library, one file behind the other, the
last twentieth of the files held out. Bits per byte are those of held-out windows, each read as a whole.

What the paper needs to train deep and long, and what this library leaves to the model: the branches of the residual
stream start smaller the deeper the model is, blocks are computed again in the backward pass (torch.utils.checkpoint),
and matrices run in bfloat16 (torch.autocast). Positions are rotary: with learned embeddings of the block and of the
place in it, as the paper has them, the exact model had learned little more than pairs of bytes after 23 million.

There is no example of images, the paper's other data: we know of no package that ships enough of them to train on
(scikit-learn has digits of 64 pixels and two photographs).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "bench"))  # where what it shares with the measurements lives

import torch
import torch.nn.functional as F
from records import add_arguments, append, run_of, show
from rich.progress import track
from torch import nn
from torch.utils.checkpoint import checkpoint

from express_compile import record_sites, rewrite_attention
from express_compile.planning.devices import versions
from express_compile.routes.compile import express

RUNS = ("exact", "sparse", "compiled", "speed")
SKIP = ("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__")
COLUMNS = (
    "date,gpu,torch,triton,commit,run,params,context,batch,parameters,tokens,seconds,tokens_per_s,train_bpb,"
    "held_out_bpb,peak_mb"
).split(",")


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, n, D]`` turned by the cosines and sines ``turn`` ``[2, n, D / 2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]], -1)


class Attention(nn.Module):
    """Causal self-attention, ``[B, n, dim]`` to the same; ``turn`` as in :func:`rotated`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        q, k = (rotated(x, turn).to(v.dtype) for x in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A residual block: attention, then two layers with a gelu."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x), turn)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Model(nn.Module):
    """Bytes ``[B, n]`` to logits ``[B, n, 256]``; n up to ``context``."""

    def __init__(self, dim: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, dim)
        speed = 10_000.0 ** -torch.linspace(0, 1, dim // heads // 2)
        angle = torch.arange(context)[:, None] * speed
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_branch = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, turn = self.byte(x), self.turn[:, : x.shape[1]]
        for block in self.layers:
            again = torch.is_grad_enabled()
            x = checkpoint(block, x, turn, use_reentrant=False) if again else block(x, turn)
        return self.head(self.norm(x))


def text(limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of Python's standard library to train on, and those held out: uint8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not set(SKIP) & set(file.relative_to(root).parts)]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) - len(order) // 20

    def joined(indices: list[int]) -> torch.Tensor:
        text = bytearray()
        for i in indices:
            if limit is None or len(text) < limit:
                text += files[i].read_bytes()
        return torch.frombuffer(text[:limit], dtype=torch.uint8)

    return joined(order[:cut]), joined(order[cut:])


def windows(data: torch.Tensor, context: int, batch: int, device: str) -> Iterator[torch.Tensor]:
    """Batches of ``context + 1`` bytes from anywhere in ``data``, the same ones every time: int64."""
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(data) - context, (batch,), generator=generator)
        yield torch.stack([data[i : i + context + 1] for i in starts.tolist()]).long().to(device)


def bits_per_byte(model: Callable, x: torch.Tensor) -> torch.Tensor:
    """Mean over the bytes of ``x`` behind the first of each row."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        logits = model(x[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten()) / math.log(2)


def train(
    run: str, args: argparse.Namespace, data: torch.Tensor, held_out: torch.Tensor, device: str
) -> Iterator[dict]:
    """Rows of the result file: at every tenth of the way."""
    torch.manual_seed(0)
    model = Model(args.dim, args.layers, args.heads, args.context).to(device)
    own = {"pattern": args.pattern, "stride": args.stride, "summary": args.summary, "combine": args.combine}
    options = {"methods": ["sparse"], "method_options": {"sparse": own}}
    call: Callable = model
    if run == "sparse":
        rewrite_attention(model, **options)
    elif run == "compiled":
        call = torch.compile(model, backend=express, options=options)
    elif run == "speed":
        call = torch.compile(model)
    steps = max(1, args.steps // 10) if run == "speed" else args.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, args.steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, i / args.steps)))
    )
    batches = windows(data, args.context, args.batch, device)
    judged = [
        held_out[i : i + args.context + 1].long()[None].to(device)
        for i in range(0, len(held_out) - args.context, args.context)[: args.windows]
    ]
    parameters = sum(x.numel() for x in model.parameters())
    params = "" if run in ("exact", "speed") else " ".join(f"{k}={v}" for k, v in own.items() if v is not None)
    seconds, timed, started = 0.0, 0, time.perf_counter()
    losses: list[torch.Tensor] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in track(range(steps), description=run):
        with record_sites() as sites:
            loss = bits_per_byte(call, next(batches))
        if run == "sparse" and not (sites and all(site.method == "sparse" for site in sites)):
            raise RuntimeError(f"not every site was rewritten: {sites}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        losses.append(loss.detach())
        last = step == steps - 1
        if step < 3 or last or (step + 1) % max(1, args.steps // 10) == 0:  # the first steps compile and settle
            if device == "cuda":
                torch.cuda.synchronize()
            if step >= 3:
                seconds, timed = seconds + time.perf_counter() - started, timed + len(losses)
                peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
                with torch.no_grad():
                    bpb = torch.stack([bits_per_byte(call, x) for x in judged]).mean().item()
                tokens = args.batch * args.context
                yield dict(
                    run=run, params=params, context=args.context, batch=args.batch, parameters=parameters,
                    tokens=(step + 1) * tokens, seconds=seconds, tokens_per_s=timed * tokens / seconds,
                    train_bpb=torch.stack(losses).mean().item(), held_out_bpb=bpb, peak_mb=peak,
                )  # fmt: skip
            losses, started = [], time.perf_counter()


def plot(path: Path) -> Path:
    """Held-out bits per byte over bytes and over seconds, of the last commit in the file, as a PNG beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["run"] != "speed" and row["commit"] == rows[-1]["commit"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        label = "sparse, compiled" if run == "compiled" else run
        label = f"{label}: {float(own[-1]['tokens_per_s']) / 1e3:,.0f}k bytes/s"
        bpb = [float(row["held_out_bpb"]) for row in own]
        for ax, x in zip(axes, ("tokens", "seconds"), strict=True):
            ax.plot([float(row[x]) / (1e6 if x == "tokens" else 1) for row in own], bpb, marker=".", label=label)
    axes[0].set(xlabel="million bytes read", ylabel="bits per byte, held out")
    axes[1].set(xlabel="seconds of training")
    axes[0].legend()
    axes[0].set_title(f"{int(rows[0]['parameters']) / 1e6:.0f}M parameters, context {int(rows[0]['context']):,}")
    axes[1].set_title(rows[0]["gpu"])
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=120)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="*", default=RUNS, choices=RUNS)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows that are judged")
    parser.add_argument("--limit", type=int, default=None, help="bytes of either part of the text")
    parser.add_argument("--pattern", default="fixed")
    parser.add_argument("--stride", type=int, default=None)
    parser.add_argument("--summary", type=int, default=32)
    parser.add_argument("--combine", default="merged")
    parser.add_argument("--plot", type=Path, help="draw the picture of a result file, and nothing else")
    add_arguments(parser)
    args = parser.parse_args()
    if args.plot:
        print(plot(args.plot))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.config.recompile_limit = 8 * args.layers  # a graph per layer, and again where gradients are off
    data, held_out = text(args.limit)
    print(f"{len(data):,} bytes to train on, {len(held_out):,} held out")
    common = {**run_of(args.commit), **versions()}
    last = []
    for run in args.runs:
        for row in train(run, args, data, held_out, device):
            if args.out:
                append(args.out, COLUMNS, [{**common, **row}])
        last.append(row)
        torch.compiler.reset()
    show(last, "run params tokens seconds tokens_per_s train_bpb held_out_bpb peak_mb".split())


if __name__ == "__main__":
    main()
