"""What all ops share: empty sizes, numbers that are none, derivatives that do not exist, modes of the caller."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from express_compile.core.method import METHODS
from express_compile.kernels.launch import constant
from express_compile.routes.eager import restore_attention, rewrite_attention
from express_compile.routes.transformers import attention

OPTIONS = {
    "express": dict(
        s=4, inflation=-1, sinks=2, recent=4, protected=4, halving="balanced", flatten=0.0, block=16,
        min_length=0,
    ),
    "thinformer": dict(s=4, fraction=0.0, g=-1, halving="balanced", flatten=0.0, min_length=0),
    "santa": dict(fraction=0.0, min_length=0, draws=[4], sampler="sys", shared=True),
}  # fmt: skip
LQ = {"express": 60, "thinformer": 60, "santa": 3}
EVERY = pytest.mark.parametrize("name", OPTIONS)
THINNING = pytest.mark.parametrize("name", ["express", "thinformer"])


def run(name: str, q, k, v, padding=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return METHODS[name].op(q, k, v, padding, torch.tensor(0), 0.35, 3, **{**OPTIONS[name], **options})


def inputs(name: str, *, B=2, H=4, H_kv=2, Lq=None, Lk=60, D=8, Dv=8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = (B, H, LQ[name] if Lq is None else Lq, D), (B, H_kv, Lk, D), (B, H_kv, Lk, Dv)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


# ------------------------------------------------------------------------------------------------ sizes of 0


@EVERY
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "sizes", [dict(B=0), dict(H=0, H_kv=0), dict(Lq=0), dict(Lq=0, Lk=0), dict(Dv=0), dict(B=0, Dv=0), dict(D=0, Dv=0)]
)
def test_a_result_without_elements_has_its_shape_and_gradients(name: str, padded: bool, sizes: dict[str, int]) -> None:
    tensors = inputs(name, **sizes)
    q, k, v = (x.requires_grad_(name != "santa") for x in tensors)
    padding = torch.arange(k.shape[2]).expand(q.shape[0], -1) >= 5 if padded else None
    out, lse = run(name, q, k, v, padding)
    assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [x.shape for x in run(name, q, k, v, padding)] == [out.shape, lse.shape]
    if name != "santa":
        for x, gradient in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
            assert gradient.shape == x.shape and (gradient == 0).all()


@EVERY
def test_heads_without_features_average_what_they_see(name: str) -> None:
    q, k, v = inputs(name, D=0, Dv=3)
    out, _ = run(name, q, k, v, min_length=100)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    mask = None if name == "thinformer" else torch.ones(q.shape[2], 60, dtype=torch.bool).tril(60 - q.shape[2])
    torch.testing.assert_close(out, sdpa(q, k, v, mask))
    assert run(name, q, k, v)[0].isfinite().all()


def test_queries_without_any_key_get_zeros_as_from_sdpa() -> None:
    q, k, v = (x.requires_grad_() for x in inputs("thinformer", Lq=5, Lk=0))
    out, lse = run("thinformer", q, k, v)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


class Attention(torch.nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)


@THINNING
def test_a_rewritten_model_takes_an_empty_batch_between_others(name: str) -> None:
    none = dict(sinks=0, window=0, protected=0) if name == "express" else {}
    model = rewrite_attention(Attention(name == "express"), methods=[name], budget=4, strict=True, **none)
    for B in (2, 0):
        q, k, v = inputs(name, B=B)
        assert model(q, k, v).shape == q.shape


# --------------------------------------------------------------------------------- what is not a number, and padding


@pytest.mark.parametrize("options", [{}, {"min_length": 100}, {"shared": False}, {"sampler": "iid", "shared": False}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_santa_gives_nan_where_exact_attention_does(options: dict, bad: float) -> None:
    q, k, v = inputs("santa")
    visible = torch.ones(3, 60, dtype=torch.bool).tril(57)
    clean, _ = run("santa", q, k, v, **options)
    for i, at in enumerate([(0, 1, 2), (1, 0, 5), (1, 1, 7)]):
        if i == 2 and bad == torch.inf:
            continue  # of an infinite value a sample may have nothing
        given = [x.clone() for x in (q, k, v)]
        given[i][at] = bad
        truth = torch.nn.functional.scaled_dot_product_attention(*given, visible, scale=0.35, enable_gqa=True)
        out, lse = run("santa", *given, **options)
        assert out.isnan().any() and torch.equal(out.isnan(), truth.isnan())
        assert torch.equal(lse.isfinite(), truth.isfinite().all(-1)) or i == 2
        assert torch.equal(out[int(i == 0)], clean[int(i == 0)]), "other sequences are as they were"


def test_a_head_that_is_no_number_leaves_those_that_share_its_rows_finite() -> None:
    q, k, v = inputs("santa")
    q[0, 0] = torch.nan
    out, _ = run("santa", q, k, v)
    assert out[0, 0].isnan().all() and out[0, 1:].isfinite().all() and out[1].isfinite().all()


def test_a_query_that_sees_no_key_still_gives_0() -> None:
    q, k, v = inputs("santa")
    padding = torch.ones(2, 60, dtype=torch.bool)
    padding[0] = False
    for options in ({}, {"min_length": 100}):
        out, lse = run("santa", q, k, v, padding, **options)
        assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and (out[1] != 0).any()


@EVERY
def test_what_padding_hides_may_be_anything(name: str) -> None:
    q, k, v = inputs(name)
    padding = torch.arange(60).expand(2, -1) >= torch.tensor([[7], [0]])
    clean, _ = run(name, q, k, v, padding)
    for bad in (torch.nan, torch.inf):
        dirty = [x.clone() for x in (q, k, v)]
        for x in dirty[0 if name == "express" else 1 :]:
            x[0, :, :7] = bad
        assert torch.equal(run(name, *dirty, padding)[0], clean)


@THINNING
def test_a_query_that_is_no_number_gives_none_and_no_other_does(name: str) -> None:
    q, k, v = inputs(name)
    q[0, 1, 50] = torch.nan
    bad = run(name, q, k, v)[0].isnan().all(-1).nonzero().tolist()
    assert bad == [[0, 1, 50]]


# ---------------------------------------------------------------------------------------------- derivatives


@EVERY
def test_forward_mode_derivatives_are_errors(name: str) -> None:
    words = f"{name} has no forward-mode derivative .*methods=\\['exact'\\]"
    tensors = inputs(name)
    for i in range(3):
        x = tensors[i]

        def function(y, i=i):
            return run(name, *tensors[:i], y, *tensors[i + 1 :])[0]

        with pytest.raises(RuntimeError, match=words):
            torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
            function(forward_ad.make_dual(x.clone().requires_grad_(i == 0 and name != "santa"), x))
    with pytest.raises(RuntimeError, match=words):
        torch.func.jacfwd(function)(x)
    with forward_ad.dual_level():  # of something else
        other = forward_ad.make_dual(x, x)
        assert function(x).isfinite().all() and forward_ad.unpack_dual(2 * other).tangent is not None


@THINNING
def test_the_gradient_has_none_either(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(name))
    out, _ = run(name, q, k, v)
    grad = out.clone().detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.autograd.grad(out, v, forward_ad.make_dual(grad, grad))


def test_a_rewritten_model_has_no_forward_mode_derivative(listening_model) -> None:
    model = rewrite_attention(listening_model, methods=["express"], budget=4, sinks=2, window=4, protected=0)
    x = torch.randn(1, 40, 32)
    try:
        with pytest.raises(RuntimeError, match="express has no forward-mode derivative"):
            torch.func.jvp(lambda x: model(inputs_embeds=x, use_cache=False).logits, (x,), (x,))
    finally:
        restore_attention(model)


@EVERY
def test_vmap_runs_the_op_for_each(name: str) -> None:
    q, k, v = inputs(name)
    several = torch.stack([v, 2 * v])
    together = torch.vmap(lambda v: run(name, q, k, v)[0])(several)
    assert torch.equal(together, torch.stack([run(name, q, k, x)[0] for x in several]))


# ---------------------------------------------------------------------------------------- modes of the caller


def in_fake_mode(make):
    with FakeTensorMode():
        return make()


def in_inference_mode(make):
    with torch.inference_mode():
        return make()


def under_grad(make):
    kept = []
    torch.func.grad(lambda x: (kept.append(make()), x)[1])(torch.tensor(1.0))
    return kept[0]


def with_default_device(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("mode", [in_fake_mode, in_inference_mode, under_grad, with_default_device])
def test_what_is_kept_for_later_calls_is_a_plain_tensor_in_any_mode(mode) -> None:
    import numpy as np

    made = mode(lambda: constant(np.arange(3), torch.device("cpu")))
    assert type(made) is torch.Tensor and made.device.type == "cpu" and not made.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(made) and made.tolist() == [0, 1, 2]
    attention._fixed_seed.cache_clear()
    seed = mode(lambda: attention._fixed_seed(5, torch.device("cpu")))
    assert seed is attention._fixed_seed(5, torch.device("cpu")) and type(seed) is torch.Tensor
    assert seed.item() == 5 and seed.dtype == torch.int64 and seed.shape == () and not seed.is_inference()


def test_a_call_with_fake_tensors_gives_them_a_seed_of_their_kind(listening_model) -> None:
    ids = torch.arange(40)[None]
    model = rewrite_attention(listening_model, methods=["express"], budget=4, sinks=2, window=4, protected=0)
    try:
        attention._fixed_seed.cache_clear()
        with torch.no_grad():
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = model(ids).logits
            real = model(ids).logits
            with FakeTensorMode(allow_non_fake_inputs=True):
                again = model(ids).logits
        assert type(real) is torch.Tensor and real.isfinite().all() and fake.shape == real.shape == again.shape
        strict = FakeTensorMode()
        q = strict.from_tensor(torch.randn(1, 4, 40, 8))
        with strict:
            assert attention._seed(7, q).shape == ()
            assert (
                METHODS["express"].op(q, q, q, None, attention._seed(7, q), 0.3, 1, **OPTIONS["express"])[0].shape
                == q.shape
            )
    finally:
        restore_attention(model)


@EVERY
def test_a_default_device_and_inference_change_nothing(name: str) -> None:
    q, k, v = inputs(name)
    padding = torch.arange(60).expand(2, -1) >= 3
    truth = run(name, q, k, v, padding)[0]
    seed = torch.tensor(0)
    with torch.device("meta"):
        out = METHODS[name].op(q, k, v, padding, seed, 0.35, 3, **OPTIONS[name])[0]
    assert torch.equal(out, truth)
    with torch.inference_mode():
        assert torch.equal(run(name, q, k, v, padding)[0], truth)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(run(name, q, k, v, padding)[0]))
    thread.start()
    thread.join()
    assert torch.equal(answers[0], truth)
