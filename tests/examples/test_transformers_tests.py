"""The command that runs transformers' own tests with every model rewritten."""

from __future__ import annotations

import pytest
import torch
import transformers

from examples.bench.transformers_tests import compared, main, rewrite_every_model
from express_compile import is_rewritten

CONFIG = transformers.LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
)


def test_what_passes_untouched_and_not_rewritten_is_listed_with_its_cause():
    untouched = {"outcomes": {"a": ["passed", ""], "b": ["passed", ""], "c": ["failed", "x"], "d": ["passed", ""]}}
    rewritten = {"outcomes": {"a": ["passed", ""], "b": ["failed", "why"], "c": ["failed", "x"]}}
    assert compared(untouched, rewritten) == {"b": "failed why", "d": "not run"}


@pytest.mark.parametrize("call", [lambda m: m.eval(), lambda m: m.train(), lambda m: m.to("cpu")])
def test_every_model_is_rewritten_as_a_whole_before_a_test_calls_it(monkeypatch, call):
    for name in ("to", "eval", "train"):  # put back afterwards
        monkeypatch.setattr(transformers.PreTrainedModel, name, getattr(transformers.PreTrainedModel, name))
    rewrite_every_model(["exact"])
    model = transformers.LlamaForCausalLM(CONFIG)
    assert not is_rewritten(model)
    call(model)
    assert is_rewritten(model) and model.config is model.model.config
    assert model(torch.arange(4)[None]).logits.shape == (1, 4, 50)


def test_a_folder_without_the_tests_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "has no tests/test_modeling_common.py" in capsys.readouterr().err
