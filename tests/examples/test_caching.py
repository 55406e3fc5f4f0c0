"""examples/bench/caching.py on a small model: KL is 0 while nothing is lost, and its rows are means of the steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from express_compile import Rows

EXAMPLES = Path(__file__).parents[2] / "examples" / "bench"


@pytest.fixture
def caching(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import caching

    return caching


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_kl_is_zero_where_rows_suffice_and_what_is_read_is_counted(caching) -> None:
    model = llama()
    ids = caching.continued(model, torch.randint(3, 50, (2, 300)), 20)
    assert ids.shape == (2, 320)
    with torch.no_grad():
        exact = model.model(ids).last_hidden_state[:, 299:-1]
    enough, read, _ = caching.kl_of_steps(model, ids, exact, 300, 3, Rows(4, 400))
    assert enough.shape == (2, 20) and float(enough.abs().max()) < 1e-5
    assert read == pytest.approx(sum(min(i, 319) for i in range(303, 322, 3)) / 7)
    few, read, _ = caching.kl_of_steps(model, ids, exact, 300, 1, Rows(4, 28))
    assert float(few.mean()) > 1e-3 and read == 33  # and the token of the step
    _, read, _ = caching.kl_of_steps(model, ids, exact, 300, 1, Rows(4, 28, selected=1))
    assert read == 64 * 4


def test_bands_are_eighths_of_the_steps(caching) -> None:
    kl = torch.arange(64.0).expand(2, 64)
    whole, *bands = caching.kl_rows(kl)
    assert whole == {"metric": "kl", "value": 31.5, "low": 7.5, "high": 55.5}
    assert [x["metric"] for x in bands] == [f"kl {i + 1}-{i + 8}" for i in range(0, 64, 8)]
    assert [x["value"] for x in bands] == [i + 3.5 for i in range(0, 64, 8)]
    parts = caching.kl_rows(torch.arange(256.0)[None])[1]
    assert (parts["low"], parts["high"]) == (7.5, 23.5)
