"""watch on a GPU: the host never waits, errors come when the GPU gets there, and graph captures stay untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers

from express_compile import restore_attention, rewrite_attention, watch
from express_compile.quality.watch import Watch
from express_compile.routes.transformers import attention

N = 4096


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def site() -> tuple[torch.nn.Module, Callable[[], torch.Tensor], tuple[torch.Tensor, ...]]:
    """A model of one layer rewritten to Express, one call of its attention over 4,096 tokens, and its inputs."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=N,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    rewrite_attention(model, methods=["express"], budget=64, sinks=32, window=64, protected=0)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 8, N, 64), (2, 2, N, 64), (2, 2, N, 64))
    inputs = tuple(torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes)
    module = model.model.layers[0].self_attn
    with torch.no_grad():
        call = lambda: attention.attend(module, *inputs, None)[0]  # noqa: E731
        call(), torch.cuda.synchronize()  # kernels are compiled, and tables are on the device
        yield model, call, inputs


def errors(watched: Watch) -> list[float]:
    (found,) = watched.errors.values()
    return found


def test_the_host_never_waits_and_results_are_bitwise_those_without(site):
    model, call, _ = site
    with waiting_is_an_error():
        before = call()  # control: the op by itself does not wait
        watched = watch(model, fraction=1.0, threshold=math.inf)
        during = [call() for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(before, x) for x in during)
    call()
    assert len(errors(watched)) == 20
    with pytest.raises(RuntimeError), waiting_is_an_error():  # control: waiting is noticed
        before.sum().item()


def test_an_error_comes_when_the_gpu_gets_there(site):
    model, call, _ = site
    watched = watch(model, fraction=1.0, threshold=math.inf)
    call(), torch.cuda.synchronize(), call()
    assert len(errors(watched)) == 1
    torch.cuda.synchronize()
    with waiting_is_an_error():
        torch.cuda._sleep(4_000_000_000)  # two seconds and more
        call()  # reads the second error, and is sampled behind the sleep
        call()
        call()
        assert len(errors(watched)) == 2
    torch.cuda.synchronize()
    call()
    assert len(errors(watched)) == 5


def test_the_error_of_all_queries_is_that_in_float64(site):
    model, call, (query, key, value) = site
    watched = watch(model, fraction=1.0, queries=N, threshold=math.inf)
    out = call().transpose(1, 2).double()
    torch.cuda.synchronize()
    call()
    above = below = 0.0
    hidden = torch.ones(N, N, dtype=torch.bool, device="cuda").triu(1)
    for head in range(8):
        scores = (query[:, head].double() @ key[:, head // 4].double().mT) / 8
        exact = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[:, head // 4].double()
        above += (out[:, head] - exact).square().sum().item()
        below += exact.square().sum().item()
    truth = math.sqrt(above / below)
    assert truth > 0.05 and abs(errors(watched)[0] - truth) <= 1e-4 * truth


def test_nothing_is_sampled_or_read_in_a_graph_capture(site):
    model, call, _ = site
    watched = watch(model, fraction=1.0, threshold=math.inf)
    before = call()
    torch.cuda.synchronize()  # its error is there, and must not be asked for during the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    assert errors(watched) == []
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, before) and errors(watched) == []
    call()
    assert len(errors(watched)) == 1


def test_it_falls_back_to_the_model_s_own_attention(site):
    model, call, _ = site
    watched = watch(model, fraction=1.0, threshold=1e-3)
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="threshold=0.001"), waiting_is_an_error():
        fallen = call()
    assert len(watched.fallen) == 1
    module = model.model.layers[0].self_attn
    exact = transformers.AttentionInterface()["sdpa"]
    assert torch.equal(fallen, exact(module, *site[2], None)[0])
    restore_attention(model)
