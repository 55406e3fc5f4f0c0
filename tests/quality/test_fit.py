"""Plans per KV head: what is measured, what is chosen, and that the plan does what was promised."""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import express_compile
from express_compile.core.plan import SavedPlan
from express_compile.core.policy import Policy
from express_compile.core.rows import Rows
from express_compile.core.sites import record_sites
from express_compile.core.spec import layer_key
from express_compile.kernels.heads import PerHead, heads_reference
from express_compile.quality.fit import fit, rewrite_attention
from express_compile.quality.profile import Profile, SiteProfile, choose, filled, joined, prices, profile
from express_compile.routes.eager import is_rewritten, restore_attention

EVERYTHING = Rows(everything=True)
OPTIONS = (Rows(2, 8), Rows(2, 32), Rows(2, 8, thinned=4), Rows(2, 8, selected=1), EVERYTHING)
PATHS = [f"model.layers.{i}.self_attn" for i in range(3)]
SEED = torch.zeros((), dtype=torch.int64)


@pytest.fixture(scope="module")
def model(listening_model):
    return listening_model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(97, (2, 240), generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """A decoder in plain PyTorch whose two heads look at one token each: the first one at the beginning of the text,
    the second one at the marker, wherever it is."""

    BEGIN, MARKER, SIZE = 0, 1, 16

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(self.SIZE, self.SIZE), nn.Linear(2 * self.SIZE, self.SIZE)
        self.keys = nn.Linear(self.SIZE, 2 * self.SIZE, bias=False)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(self.SIZE))
            self.out.weight.mul_(4)
            self.keys.weight.copy_(torch.eye(self.SIZE).repeat(2, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.keys(self.embed(ids)).unflatten(-1, (2, -1)).transpose(1, 2)
        looked_for = F.one_hot(torch.tensor([self.BEGIN, self.MARKER], device=ids.device), self.SIZE).to(x.dtype)
        query = 60.0 * looked_for[None, :, None].expand_as(x)
        x = F.scaled_dot_product_attention(query, x, x, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


def texts(*markers: int, tokens: int = 256) -> torch.Tensor:
    """Sequences that begin with the token for that and have one marker."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2, Decoder.SIZE, (len(markers), tokens), generator=random)
    ids[:, 0] = Decoder.BEGIN
    ids[torch.arange(len(markers)), list(markers)] = Decoder.MARKER
    return ids


@torch.no_grad()
def kl_of(model, ids, first: int, stop: int | None = None, **options) -> float:
    """Mean KL(exact || rewritten) from a position on, computed apart from the code under test."""

    def scores() -> torch.Tensor:
        output = model(ids)
        return getattr(output, "logits", output)[:, first:stop].double().log_softmax(-1)

    exact = scores()
    rewrite_attention(model, **options)
    try:
        found = scores()
    finally:
        restore_attention(model)
    return (exact.exp() * (exact - found)).sum(-1).mean().item()


# ---------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
@pytest.mark.parametrize("query_heads, only_last, first", [(False, False, 60), (True, False, 60), (True, True, 210)])
def test_errors_are_those_of_a_loop_over_heads_queries_and_options(model, ids, query_heads, only_last, first) -> None:
    found = profile(model, ids, OPTIONS, block=16, query_heads=query_heads, only_last=only_last)
    heads, few = (4, 1) if query_heads else (2, 2)
    assert [site.module for site in found.sites] == PATHS and not is_rewritten(model)
    assert [site.through for site in found.sites] == [f"{path}.o_proj" for path in PATHS]
    assert (found.tokens, found.samples, found.options) == (240, 1, OPTIONS)

    calls: list[tuple[torch.Tensor, ...]] = []
    sdpa = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda q, k, v, *a, **o: calls.append((q, k, v)) or sdpa(q, k, v, *a, **o),
        )
        model(ids)
    assert len(calls) == 3
    for site, layer, (q, k, v) in zip(found.sites, model.model.layers, calls, strict=True):
        k, v = (x[:, :: x.shape[1] // 2] for x in (k, v))  # transformers repeats the two KV heads

        def through(out: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
            return layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))[:, first:].double()

        scale = q.shape[-1] ** -0.5
        exact = heads_reference(q, k, v, [EVERYTHING], scale, SEED)[0]
        whole = through(exact).square().sum()
        assert len(site.errors) == heads
        for head, (o, option) in itertools.product(range(heads), enumerate(OPTIONS)):
            out = heads_reference(q, k, v, [option], scale, SEED, layer_key(site.module), block=16)[0]
            mixed = exact.clone()
            mixed[:, few * head : few * head + few] = out[:, few * head : few * head + few]
            expected = ((through(mixed) - through(exact)).square().sum() / whole).item() if whole else 0.0
            assert site.errors[head][o] == pytest.approx(expected, rel=1e-3, abs=1e-9), (site.module, head, option)
    assert all(errors[-1] == 0 for site in found.sites for errors in site.errors), "everything is exact"
    assert max(found.sites[2].errors[0]) == 0, "nobody listens to the last layer"
    assert found.sites[1].errors[0][0] > 0.1


@torch.no_grad()
def test_nats_are_what_an_error_at_one_site_does_to_the_output(model, ids) -> None:
    """By the option with the fewest rows; several samples count alike."""
    parts = ids[:1], ids[1:]
    found, *each = (profile(model, x, OPTIONS, block=16) for x in (parts, *parts))
    fewest = min((x for x in OPTIONS if not x.everything), key=lambda x: found.rows[OPTIONS.index(x)])
    for i, site in enumerate(found.sites):
        for part, alone in zip(parts, each, strict=True):
            kl = kl_of(model, part, 60, methods=[PerHead({site.module: [fewest]}, block=16)])
            error = sum(errors[OPTIONS.index(fewest)] for errors in alone.sites[i].errors)
            assert alone.sites[i].nats == pytest.approx(kl / error if error else 0.0, rel=2e-2, abs=1e-9), site.module
    lost = [float(sum(site.weighted.sum(0).mean() for site in alone.sites)) for alone in each]
    assert max(lost) > 1.05 * min(lost), "samples differ"
    assert found.samples == 2
    for i, site in enumerate(found.sites):
        alike = [alone.sites[i].weighted / its for alone, its in zip(each, lost, strict=True)]
        expected = sum(alike) / 2 * (sum(lost) / 2)
        torch.testing.assert_close(site.weighted, expected, rtol=1e-6, atol=1e-12)
    assert found.sites[2].nats == 0 and found.sites[0].nats != pytest.approx(found.sites[1].nats, rel=0.1)
    assert all(site.nats == 0 for site in profile(model, ids, [EVERYTHING]).sites)


@torch.no_grad()
def test_questions_count_as_much_as_the_text_and_by_their_last_queries_alone(model, ids) -> None:
    text, asked, late = ids[:1, :160], ids[1:], ids[:1, 80:]
    how = dict(rows=34, options=OPTIONS, block=16, last=16)
    fitted = fit(model, text, questions=asked, **how)
    parts = (
        profile(model, text[:, :80], OPTIONS, block=16),
        profile(model, asked, OPTIONS, block=16, last=256, only_last=True),
    )
    assert fitted.profile == replace(joined(parts), samples=2) == joined(parts, (1.0, 1.0))
    assert fitted.profile.tokens == 240 and fitted.profile.rows == parts[1].rows, "those of the longer one"
    assert (fitted.plan.fitted["tokens"], fitted.plan.fitted["questions"]) == ((80,), (240,))
    thrice = fit(model, text, questions=asked, questions_weight=3.0, **how)
    assert thrice.profile != fitted.profile
    for site, expected in zip(thrice.profile.sites, joined([parts[0], *[parts[1]] * 3]).sites, strict=True):
        torch.testing.assert_close(site.weighted, expected.weighted)
    assert [x.plan.fitted["questions_weight"] for x in (fitted, thrice)] == [1.0, 3.0]
    assert "questions" not in fit(model, text, **how).plan.fitted
    assert fitted.kl == pytest.approx(kl_of(model, late[:, :80], 20, plan=fitted.plan), rel=1e-3) and fitted.kl > 1e-6
    with pytest.raises(TypeError, match="questions and profile were both given: questions are profiled"):
        fit(model, text, questions=asked, profile=fitted.profile, **how)
    for weight in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"questions_weight={weight}: must be above 0 and finite"):
            fit(model, text, questions=asked, questions_weight=weight, **how)
    with pytest.raises(TypeError, match="questions_weight=2.0: needs questions"):
        fit(model, text, questions_weight=2.0, **how)
    with pytest.raises(ValueError, match=r"questions\[0\]: 1 token; must be 2 or more"):
        fit(model, text, questions=asked[:, :1], **how)


@torch.no_grad()
def test_what_last_queries_lose_by_keys_and_values_counts_as_much_as_what_others_do(ids) -> None:
    """Queries at the end, here an eighth of the sample, see everything: what the last layer does is nothing to them."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    sample, fewest, parts = ids[:1], OPTIONS[0], ((60, 210), (210, None))
    found, plain = (profile(model, sample, OPTIONS, block=16, last=n) for n in (256, 0))
    alone = profile(model, sample, OPTIONS, block=16, last=256, only_last=True)
    units = []
    for part in parts:
        policies = [[PerHead({site.module: [fewest]}, block=16, last=30)] for site in plain.sites]
        kls = torch.tensor([kl_of(model, sample, *part, methods=own) for own in policies]).double()
        errors = [torch.tensor(site.errors, dtype=torch.float64) for site in plain.sites]
        lost = [kl / x[:, 0].sum() * x for kl, x in zip(kls, errors, strict=True)]
        whole = sum(x.sum(0).mean() for x in lost)
        units.append(([x / whole for x in lost], whole))
    assert max(kls) > 1e-4 and kls[1] < 1e-9, "those at the end lose by the first layer alone"
    (late, its), (last, whole) = units
    for site, x, y in zip(found.sites, late, last, strict=True):
        torch.testing.assert_close(site.weighted, (x + y) / 2 * (its + whole) / 2, rtol=2e-2, atol=1e-9)
    for site, y in zip(alone.sites, last, strict=True):
        torch.testing.assert_close(site.weighted, y * whole, rtol=2e-2, atol=1e-9)
    first = [x.sites[0].nats / x.sites[1].nats for x in (found, plain)]
    assert first[0] > 1.5 * first[1], "and so it counts for more"
    few = profile(model, sample[:, :6], (Rows(0, 1), EVERYTHING), block=16, last=256, only_last=True)
    assert few.sites[1].nats < 1e-9, "of six tokens the last one counts alone, and it sees everything"
    with pytest.raises(ValueError, match="last=257: must be 0 to 256"):
        profile(model, sample, OPTIONS, block=16, last=257)


@torch.no_grad()
def test_questions_to_a_cache_see_what_others_see_and_count_alone(model, ids) -> None:
    found = profile(model, ids[1:], OPTIONS, block=16, only_last=True)
    for site in found.sites:
        kl = kl_of(model, ids[1:], 210, methods=[PerHead({site.module: [OPTIONS[0]]}, block=16, last=0)])
        assert site.nats * sum(own[0] for own in site.errors) == pytest.approx(kl, rel=2e-2, abs=1e-9)
    asked = fit(model, ids[:1], rows=34, questions=ids[1:], options=OPTIONS, block=16, last=0)
    assert asked.profile == joined([profile(model, ids[:1, :120], OPTIONS, block=16), found])
    mask = torch.ones_like(ids).index_fill_(1, torch.arange(237, 240), 0)
    with pytest.raises(ValueError, match=r"sample\[0\]: the last tokens are padding, and only they count"):
        profile(model, [{"input_ids": ids, "attention_mask": mask}], OPTIONS, block=16, only_last=True)


def test_samples_count_alike_however_certain_the_model_is() -> None:
    """A sample of three times the nats says as much as the other; what one says of a site that the other is silent
    about counts half; where nothing is lost errors are plain means."""
    rows, errors = tuple(map(float, range(2))), (((0.2, 0.0),), ((0.1, 0.3), (0.4, 0.0)))

    def of(*nats: float) -> Profile:
        sites = (SiteProfile(str(i), 0, None, own, x) for i, (own, x) in enumerate(zip(errors, nats, strict=True)))
        return Profile(OPTIONS[:2], 100, 1, rows, tuple(sites), 16)

    def shares(found: Profile) -> list[float]:
        return [float(x.weighted.sum() / sum(y.weighted.sum() for y in found.sites)) for x in found.sites]

    assert shares(of(2.0, 1.0)) == pytest.approx([1 / 3, 2 / 3])
    assert shares(joined([of(2.0, 1.0), of(6.0, 3.0)])) == pytest.approx([1 / 3, 2 / 3])
    both = joined([of(2.0, 1.0), of(0.0, 10.0), replace(of(2.0, 1.0), tokens=200)])
    assert shares(both) == pytest.approx([2 / 9, 7 / 9]) and (both.samples, both.tokens) == (3, 200)
    assert joined([of(2.0, 1.0)] * 2) == replace(of(2.0, 1.0), samples=2)
    first, second = of(0.0, 0.0).sites
    silent = replace(of(0.0, 0.0), sites=(first, replace(second, errors=((0.3, 0.1),) * 2)))
    found = joined([of(0.0, 0.0), silent]).sites[1]
    torch.testing.assert_close(torch.tensor(found.errors), torch.tensor(((0.2, 0.2), (0.35, 0.05))))


class Branches(nn.Module):
    """A decoder of which the first token of a text says which layers run, and in which order."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(3 * q, k, v, is_causal=True)
            return x + self.o(y.transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for i in ((0, 1, 2), (2, 1, 0), (1, 2), ())[int(ids[0, 0])]:
            x = self.layers[i](x)
        return self.out(x)


@pytest.mark.parametrize("branches", [(0, 1), (0, 2), (2, 0), (3, 0), (2, 1, 3)])
def test_samples_that_run_other_layers_or_in_another_order_count_where_they_run(branches: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    samples = [torch.randint(50, (1, 200)).index_fill(1, torch.tensor(0), branch) for branch in branches]
    found = profile(model, samples, OPTIONS, block=16)
    alone = {x: profile(model, sample, OPTIONS, block=16) for x, sample in zip(branches, samples, strict=True) if x < 3}
    lost = {x: sum(float(site.weighted.sum()) for site in own.sites) for x, own in alone.items()}
    expected: dict[str, torch.Tensor] = {}
    for x, own in alone.items():
        for site in own.sites:
            share = site.weighted / lost[x] * (sum(lost.values()) / len(lost)) / len(lost)
            expected[site.module] = expected.get(site.module, 0) + share
    assert [site.module for site in found.sites] == list(expected) and found.samples == len(samples)
    for site in found.sites:
        torch.testing.assert_close(site.weighted, expected[site.module], rtol=1e-6, atol=1e-12)
        assert site.through == f"{site.module}.o"
    fitted = fit(model, samples, rows=60, options=OPTIONS, block=16, held_out=samples[::-1], last=0)
    again = fit(model, samples[::-1], rows=60, block=16, last=0, profile=fitted.profile)
    assert again.plan.sites == fitted.plan.sites and {x.module for x in fitted.plan.sites} == set(expected)
    kls = [kl_of(model, sample, 50, plan=fitted.plan) for sample in samples]
    assert fitted.kl == again.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sample_that_is_shorter_than_the_options_says_nothing(model, ids, dtype: torch.dtype, padded: bool) -> None:
    """What rounding leaves there is not made as large as what the other sample loses."""
    model, ids = deepcopy(model).to(dtype), ids[:1]
    options = (Rows(2, 40), Rows(2, 80), Rows(2, 40, thinned=4), Rows(2, 40, selected=1), EVERYTHING)
    short: torch.Tensor | dict[str, torch.Tensor] = ids[:, :30]
    if padded:
        real = torch.arange(240).expand_as(ids) >= 210
        short = {"input_ids": torch.where(real, ids, 0), "attention_mask": real.long()}
    long = profile(model, ids, options, block=16)
    silent = profile(model, [short], options, block=16)
    assert all(not site.weighted.any() for site in silent.sites)
    both = profile(model, [short, ids], options, block=16)
    for site, own in zip(both.sites, long.sites, strict=True):
        torch.testing.assert_close(site.weighted, own.weighted / 2)
        torch.testing.assert_close(torch.tensor(site.errors), torch.tensor(own.errors) / (1 if own.nats else 2))


@torch.no_grad()
def test_errors_go_through_the_linear_layer_that_computes_not_through_one_that_has_another_forward(model, ids) -> None:
    class Adapted(nn.Linear):
        """Holds a weight that it does not use, as quantized ones do."""

        def __init__(self, base: nn.Linear, keep: bool) -> None:
            super().__init__(base.in_features, base.out_features, bias=False)
            self.base = base if keep else (lambda x: base(x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

    expected = profile(model, ids, OPTIONS, block=16)
    adapted, opaque = deepcopy(model), deepcopy(model)
    for changed, keep in ((adapted, True), (opaque, False)):
        for layer in changed.model.layers:
            layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj, keep)
    found, through = profile(adapted, ids, OPTIONS, block=16), [f"{path}.o_proj.base" for path in PATHS]
    assert [site.through for site in found.sites] == through
    assert [site.errors for site in found.sites] == [site.errors for site in expected.sites]
    assert [site.through for site in profile(opaque, ids, OPTIONS, block=16).sites] == [None] * 3


def test_a_profile_survives_json(model, ids) -> None:
    found = profile(model, ids, OPTIONS, block=16)
    assert Profile.from_json(found.to_json()) == found
    with pytest.raises(TypeError, match="profile: {}; must be an object of block, options, rows"):
        Profile.from_json("{}")


def test_nothing_in_the_json_of_a_profile_is_trusted() -> None:
    site = SiteProfile("a", 0, None, ((0.5, 0.0), (1.0, 0.0)), 2.0)
    whole = Profile((Rows(2, 8), EVERYTHING), 240, 1, (20.0, 150.0), (site,), 16)
    data = json.loads(whole.to_json())
    assert Profile.from_json(json.dumps(data)) == whole
    for words, at, value in (
        ("profile: sites=None: must be a list", ("sites",), None),
        ("profile: sites: 0; must be one or more", ("sites",), []),
        ("profile: sites: 2; must be one or more, and each once", ("sites",), 2 * data["sites"]),
        (r"profile: sites\[0\]: 'a'; must be an object of errors, index, module, nats, through", ("sites", 0), "a"),
        (r"profile: sites\[0\]: errors=None: must be a list", ("sites", 0, "errors"), None),
        (r"profile: sites\[0\]: errors=nan: must be 0 or more, and finite", ("sites", 0, "errors", 1, 0), math.nan),
        (r"profile: sites\[0\]: errors=-1: must be 0 or more", ("sites", 0, "errors", 1, 0), -1),
        (
            r"profile: sites\[0\]: errors=.*: must list an error of every option for every",
            ("sites", 0, "errors", 0),
            [1],
        ),
        (r"profile: sites\[0\]: errors=.*: must be of 2 options", ("sites", 0, "errors"), [[1]]),
        (r"profile: sites\[0\]: nats='1': must be of type int or float", ("sites", 0, "nats"), "1"),
        (r"profile: sites\[0\]: module=3: must be the path of a module", ("sites", 0, "module"), 3),
        (r"profile: sites\[0\]: index=-1: must be 0 or more", ("sites", 0, "index"), -1),
        ("profile: tokens=1: must be 2 or more", ("tokens",), 1),
        ("profile: samples='1': must be of type int", ("samples",), "1"),
        (r"profile: rows=\(20.0,\): must be a number for each of the 2 options", ("rows",), [20.0]),
        ("profile: options=.*: must hold at least one Rows, and each once", ("options",), 2 * data["options"][:1]),
        ("profile: .*, other; must be an object of block, options, rows, samples, sites, tokens", ("other",), 1),
        ("profile: block=17: must be 16, 32, 64 or 128 queries", ("block",), 17),
    ):
        changed = json.loads(json.dumps(data))
        place = functools.reduce(lambda x, key: x[key], at[:-1], changed)
        place[at[-1]] = value
        with pytest.raises((TypeError, ValueError), match=words):
            Profile.from_json(json.dumps(changed))
    del data["block"]  # files of the time before it was written
    with pytest.raises(ValueError, match='profile: block: missing, .*: "block": 128 if none was'):
        Profile.from_json(json.dumps(data))


def test_a_head_that_needs_a_far_token_gets_it_and_the_other_one_does_not() -> None:
    torch.manual_seed(0)
    model, ids = Decoder().eval(), texts(40, 45)
    options = (Rows(4, 16), Rows(4, 48), Rows(4, 16, selected=1), EVERYTHING)
    found = fit(model, ids, tolerance=1e-4, options=options, block=16)
    ((first, second),) = found.chosen
    assert first == Rows(4, 16) and second == Rows(4, 16, selected=1)
    assert kl_of(model, ids[1:], 64, methods=[PerHead([Rows(4, 16)], block=16)]) > 0.01
    assert found.profile.sites[0].through == "out"
    assert found.kl <= 1e-4 and found.kl == pytest.approx(kl_of(model, ids[1:], 64, plan=found.plan), abs=1e-7)
    assert not is_rewritten(model)


# --------------------------------------------------------------------------------------------------------- choice


@st.composite
def tables(draw, most: int = 3) -> Profile:
    """Profiles of a few heads, with made-up errors and rows."""
    number, error = draw(st.integers(1, 4)), st.integers(0, 20).map(lambda x: x / 16)
    nats = st.sampled_from([0.25, 1.0, 2.0])
    rows = tuple(float(x) for x in draw(st.lists(st.integers(1, 50), min_size=number, max_size=number)))
    options = tuple(Rows(recent=i + 1) for i in range(number))
    shape = draw(st.lists(st.integers(1, 2), min_size=1, max_size=most))
    sites = tuple(
        SiteProfile(str(i), 0, None, tuple(tuple(draw(error) for _ in options) for _ in range(heads)), draw(nats))
        for i, heads in enumerate(shape)
    )
    return Profile(options, 64, 1, rows, sites, 16)


def totals(table: Profile, choice) -> tuple[float, float]:
    """(error in nats, rows) summed over heads."""
    picked = [
        (e[o] * site.nats, table.rows[o])
        for site, own in zip(table.sites, choice, strict=True)
        for e, o in zip(site.errors, own, strict=True)
    ]
    return sum(x for x, _ in picked), sum(x for _, x in picked)


@given(tables(most=2), st.integers(0, 64).map(lambda x: x / 64))
def test_no_other_choice_has_less_error_and_price(table: Profile, price: float) -> None:
    error, rows = totals(table, choose(table, price))
    heads = [len(site.errors) for site in table.sites]
    for flat in itertools.product(range(len(table.options)), repeat=sum(heads)):
        rest = iter(flat)
        other = tuple(tuple(next(rest) for _ in range(n)) for n in heads)
        e, r = totals(table, other)
        assert error + price * rows <= e + price * r + 1e-12


@given(tables())
def test_rows_fall_and_errors_rise_with_the_price_and_every_choice_is_met(table: Profile) -> None:
    ladder = prices(table)
    found = [totals(table, choose(table, price)) for price in ladder]
    assert ladder == sorted(set(ladder)) and ladder[0] == 0
    assert all(a[0] <= b[0] and a[1] > b[1] for a, b in itertools.pairwise(found)), "each price is a step"
    assert found[-1][1] == sum(min(table.rows) * len(site.errors) for site in table.sites)
    for low, high in itertools.pairwise(ladder):
        assert totals(table, choose(table, (low + high) / 2)) == totals(table, choose(table, low))


@given(tables(), st.integers(0, 8), st.floats(0, 100))
def test_what_a_price_leaves_of_a_budget_is_spent_until_nothing_fits(table: Profile, step: int, more: float) -> None:
    ladder = prices(table)
    choice = choose(table, ladder[min(step, len(ladder) - 1)])
    error, rows = totals(table, choice)
    found = filled(table, choice, rows + more)
    filled_error, filled_rows = totals(table, found)
    assert filled_rows <= rows + more and filled_error <= error + 1e-12
    for i, site in enumerate(table.sites):
        for head in range(len(site.errors)):
            for o in range(len(table.options)):
                other = [list(x) for x in found]
                other[i][head] = o
                e, r = totals(table, tuple(map(tuple, other)))
                assert e >= filled_error - 1e-12 or r > rows + more, "one more step would have fitted"


def test_a_price_is_a_number_from_0_on() -> None:
    table = Profile((EVERYTHING,), 4, 1, (3.0,), (SiteProfile("", 0, None, ((0.0,),)),), 16)
    for price in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="price=.*: must be 0 or more and finite"):
            choose(table, price)


# ------------------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("tolerance", [0.3, 0.03])
def test_the_kl_that_is_promised_is_the_kl_of_the_plan(model, ids, tolerance: float, tmp_path) -> None:
    started = time.perf_counter()
    found = fit(model, ids, tolerance=tolerance, options=OPTIONS, block=16)
    assert time.perf_counter() - started < 10
    assert found.kl <= tolerance and not is_rewritten(model)
    found.save(tmp_path / "plan.json")
    assert kl_of(model, ids[1:], 60, plan=tmp_path / "plan.json") == pytest.approx(found.kl, rel=1e-3, abs=1e-6)
    assert found.chosen[2] == (Rows(2, 8), Rows(2, 8)), "nobody listens to the last layer"
    rewrite_attention(model, found.policy(strict=True))
    with torch.no_grad(), record_sites() as sites:
        model(ids)
    restore_attention(model)
    assert [x.saved.rows for x in sites] == list(found.chosen) and {x.verdict for x in sites} == {"rewritten"}
    fitted = json.loads((tmp_path / "plan.json").read_text())["fitted"]
    assert fitted["kl"] == found.kl and fitted["asked"] == {"tolerance": tolerance} and fitted["price"] == found.price
    assert fitted["tokens"] == fitted["held_out"] == [240] and fitted["options"] == [x.to_data() for x in OPTIONS]
    assert SavedPlan.load(tmp_path / "plan.json") == found.plan


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(model, ids, side: str) -> None:
    def padded(x: torch.Tensor) -> dict[str, torch.Tensor]:
        real = torch.arange(240).expand(2, -1) >= torch.tensor([[0], [220]])
        real = real if side == "left" else real.flip(1)
        return {"input_ids": torch.where(real, x, 0), "attention_mask": real.long()}

    samples = [padded(x) for x in ids[:, None].expand(-1, 2, -1)]
    found = fit(model, samples, rows=60, options=OPTIONS, block=16, last=0)
    batch, real = samples[1], samples[1]["attention_mask"].bool()
    real[:, :60] = False
    with torch.no_grad():
        exact = model(**batch).logits.double().log_softmax(-1)
        rewrite_attention(model, plan=found.plan)
        tried = model(**batch).logits.double().log_softmax(-1)
    restore_attention(model)
    kl = (exact.exp() * (exact - tried)).sum(-1)[real].mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-3) and found.kl > 0.01


def test_scores_that_cannot_be_judged(model, ids) -> None:
    class Scores(Decoder):
        """Classes from 12 on are ruled out, and scores changed."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.change(super().forward(ids).index_fill(-1, torch.arange(12, self.SIZE), -math.inf))

        change = staticmethod(lambda scores: scores)

    torch.manual_seed(0)
    decoder, sample = Scores().eval(), texts(40, 45)
    how = dict(options=(Rows(4, 16), EVERYTHING), block=16, last=0)
    found = fit(decoder, sample, tolerance=1e-4, **how)
    assert found.chosen == ((Rows(4, 16), EVERYTHING),) and 0 <= found.kl <= 1e-4
    for words, change in (
        ("scores of 1 positions for 256 tokens; must be those of all", lambda x: x[:, -1:]),
        ("scores that are NaN, or infinite", lambda x: x * math.nan),
        ("its output is .256, 16.; must be", lambda x: x[0]),
    ):
        decoder.change = change
        with pytest.raises(ValueError, match=words):
            fit(decoder, sample, tolerance=1e-4, **how)
    decoder.change = lambda x: x * math.nan if x.shape[1] == 200 else x
    short = sample[:, :200]
    words = "model: it gives scores that are NaN"
    for name, samples in (
        (r"sample, sequences \[::2\]", {"sample": short}),
        (r"sample\[2\]", {"sample": [sample, sample, short]}),
        (r"held_out\[1\]", {"sample": sample, "held_out": [sample, short]}),
        (r"sample\[1\]", {"sample": [sample, short], "profile": found.profile}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {words}"):
            fit(decoder, tolerance=1.0, **samples, **how)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(240) < 60).long().expand(2, -1)}
    for name, samples in (
        ("sample", {"sample": [ids, batch]}),
        ("held_out", {"sample": ids, "held_out": [ids, batch]}),
    ):
        with (
            pytest.raises(
                ValueError, match=rf"{name}\[1\]: has padding only from position 60 on, where its scores count"
            ),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(model, "forward", lambda *_, **__: pytest.fail("told before anything is measured"))
            fit(model, rows=100, options=OPTIONS, block=16, **samples)


def test_a_smaller_tolerance_takes_more_rows(model, ids) -> None:
    found = [fit(model, ids, tolerance=x, options=OPTIONS, block=16) for x in (1.0, 0.3, 0.01)]
    assert found[0].rows <= found[1].rows <= found[2].rows < found[2].exact_rows and found[0].rows < found[2].rows


def test_rows_are_kept_with_less_error_than_equal_rows_for_all(model, ids) -> None:
    wide = profile(model, ids[:1], [Rows(2, 32)], block=16)
    found = fit(model, ids, rows=wide.rows[0], options=OPTIONS, block=16, last=0)
    assert found.rows <= wide.rows[0]
    at = {x: i for i, x in enumerate(OPTIONS)}
    mixed = sum(
        s.nats * e[at[x]]
        for s, own in zip(found.profile.sites, found.chosen, strict=True)
        for e, x in zip(s.errors, own, strict=True)
    )
    assert mixed < sum(s.nats * e[at[Rows(2, 32)]] for s in found.profile.sites for e in s.errors)
    assert found.kl == pytest.approx(kl_of(model, ids[1:], 60, plan=found.plan), rel=1e-3)
    twice = fit(model, ids, rows=wide.rows[0], options=OPTIONS, block=16, last=0, length=120)
    assert twice.rows <= wide.rows[0] and twice.exact_rows < found.exact_rows


@torch.no_grad()
def test_a_fit_by_query_head_keeps_what_is_asked_for_and_is_followed_from_a_file(model, ids, tmp_path) -> None:
    found = fit(model, ids, rows=45, options=OPTIONS, block=16, last=0, query_heads=True)
    assert found.rows <= 45 and [len(x) for x in found.chosen] == [4] * 3
    pairs = [own[i : i + 2] for own in found.chosen for i in (0, 2)]
    assert any(a != b for a, b in pairs), "query heads of one KV head differ, or the test shows nothing"
    found.save(tmp_path / "plan.json")
    plan = SavedPlan.load(tmp_path / "plan.json")
    assert plan == found.plan and [(x.rows, x.per) for x in plan.sites] == [(x, "query head") for x in found.chosen]
    assert found.kl == pytest.approx(kl_of(model, ids[1:], 60, plan=plan), rel=1e-3) and found.kl > 0
    assert "tokens; query heads:\n" in str(found)
    again = fit(model, ids[1:], rows=45, block=16, last=0, profile=Profile.from_json(found.profile.to_json()))
    assert again.chosen == found.chosen


@torch.no_grad()
def test_the_last_queries_of_a_fitted_plan_are_exact_and_counted(model, ids) -> None:
    options = (Rows(2, 8),)
    found, plain = (fit(model, ids, rows=200, options=options, block=16, last=last) for last in (16, 0))
    more = sum(i + 1 for i in range(224, 240)) - 16 * plain.rows
    assert found.rows - plain.rows == pytest.approx(more / 180, abs=16 * 8 / 180)
    with record_sites() as sites:
        rewrite_attention(model, plan=found.plan)
        model(ids)
    restore_attention(model)
    assert all(x.saved.options["method_options"]["heads"]["last"] == 16 for x in sites)


@pytest.mark.parametrize("query_heads", [False, True])
def test_a_speedup_is_that_of_the_predicted_times(shipped_rates: None, model, ids, query_heads: bool) -> None:
    options, how = (Rows(2, 32), Rows(2, 32, selected=1), EVERYTHING), dict(length=65536, query_heads=query_heads)
    slow, fast = (fit(model, ids, speedup=x, options=options, **how) for x in (1.5, 4.0))
    assert fast.rows < slow.rows < slow.exact_rows / 1.2
    with pytest.raises(
        ValueError, match=r"speedup=1000000.0: the cheapest options are predicted to be .* times as fast"
    ):
        fit(model, ids, speedup=1e6, options=options, length=65536)


@pytest.mark.parametrize(("how", "heads"), [({}, 2), ({"query_heads": True}, 4)])
def test_one_line_rewrites_a_model_by_a_sample(model, ids, how, heads: int) -> None:
    how = {**how, "questions": [ids[1:, :99]]} if how else how
    with torch.no_grad():
        exact = model(ids).logits
        assert express_compile.rewrite_attention(model, sample=ids, tolerance=0.05, strict=True, **how) is model
        with record_sites() as sites:
            found = model(ids).logits
    restore_attention(model)
    assert [x.method for x in sites] == ["heads"] * 3 and torch.isfinite(found).all() and found.shape == exact.shape
    assert {len(x.rows) for x in sites} == {heads}
    assert tuple(x.rows for x in sites) == fit(model, ids, tolerance=0.05, **how).chosen


def test_the_tokens_of_an_encoder_and_a_decoder_are_those_of_the_decoder() -> None:
    class Both(Decoder):
        def forward(
            self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor, attention_mask=None
        ) -> torch.Tensor:
            return super().forward(decoder_input_ids) + self.embed(input_ids).mean(1, keepdim=True)

    torch.manual_seed(0)
    samples = [{"input_ids": x[:, :40], "decoder_input_ids": x} for x in texts(40, 45).split(1)]
    model = Both().eval()
    found = fit(model, samples, rows=150, options=(Rows(4, 16), EVERYTHING), block=16)
    assert found.plan.fitted["tokens"] == found.plan.fitted["held_out"] == (256,)
    assert found.plan.fitted["length"] == 256 and found.chosen == ((Rows(4, 16), EVERYTHING),)

    def kl(**mask: torch.Tensor) -> float:
        samples = [{"input_ids": x, "decoder_input_ids": x, **mask} for x in texts(40, 45).split(1)]
        return fit(model, samples, rows=150, options=(Rows(4, 16),), block=16).kl

    # the mask of an encoder hides none of the decoder, also where it has as many positions
    assert kl() == kl(attention_mask=(torch.arange(256) < 200)[None].long()) > 0


def test_what_is_held_out(model, ids) -> None:
    one = fit(model, ids[:1], rows=100, options=OPTIONS, block=16).plan.fitted
    assert (one["tokens"], one["held_out"]) == ((120,), (120,)), "two halves of one sequence"
    some = fit(model, [{"input_ids": ids[:1]}, ids[1:, :200], ids[1:]], rows=100, options=OPTIONS, block=16).plan.fitted
    assert (some["tokens"], some["held_out"]) == ((240, 240), (200,)), "every other sample"
    own = fit(model, ids, rows=100, options=OPTIONS, block=16, held_out=ids[:, :99]).plan.fitted
    assert (own["tokens"], own["held_out"]) == ((240,), (99,))


@torch.no_grad()
def test_a_saved_plan_is_followed_at_another_length_than_it_was_fitted_at(model, ids, tmp_path) -> None:
    found = fit(model, ids[:, :160], rows=60, options=OPTIONS, block=16, last=16)
    found.save(tmp_path / "plan.json")
    rows = {site.module: list(own) for site, own in zip(found.profile.sites, found.chosen, strict=True)}
    for n in (100, 240):
        outputs = []
        for options in (
            {"plan": str(tmp_path / "plan.json"), "strict": True},
            {"methods": [PerHead(rows, block=16, last=16)]},
        ):
            rewrite_attention(model, **options)
            outputs.append(model(ids[:, :n]).logits)
            restore_attention(model)
        assert torch.equal(*outputs) and not torch.equal(outputs[0], model(ids[:, :n]).logits), n


@torch.no_grad()
def test_a_fit_from_a_profile_is_the_fit_that_would_have_measured_it(model, ids) -> None:
    first = fit(model, ids[:1], rows=100, options=OPTIONS, block=16, last=16, held_out=ids[1:])
    again = fit(model, ids[1:], rows=100, block=16, last=16, profile=Profile.from_json(first.profile.to_json()))
    assert again == first and again.plan.fitted == first.plan.fitted and not is_rewritten(model)
    fewer = fit(model, ids[1:, :200], rows=60, block=16, last=16, profile=first.profile)
    assert fewer.rows <= 60 and fewer.kl > first.kl
    assert fewer.plan.fitted["tokens"] == (240,) and fewer.plan.fitted["held_out"] == (200,)
    assert (
        fit(model, ids[1:], rows=100, block=16, last=16, profile=first.profile, length=400).plan.fitted["length"] == 400
    )
    assert first.profile.block == 16 and fit(model, ids[1:], rows=100, last=16, profile=first.profile) == first
    with pytest.raises(ValueError, match="block=32: the profile was measured with 16; must be that, or left out"):
        fit(model, ids, rows=100, block=32, profile=first.profile)
    with pytest.raises(TypeError, match="profile and held_out were both given"):
        fit(model, ids, rows=100, profile=first.profile, held_out=ids)
    with pytest.raises(ValueError, match=r"options=\(Rows.*: beside profile, which has those that it measured"):
        fit(model, ids, rows=100, block=16, profile=first.profile, options=OPTIONS[1:])
    with pytest.raises(ValueError, match=r"query_heads=True: the profile is by KV head, 2 of them at model.layers.0"):
        fit(model, ids, rows=100, block=16, profile=first.profile, query_heads=True)
    own = profile(model, ids[:1], OPTIONS, block=16, query_heads=True)
    for asked in ({}, {"options": iter(OPTIONS)}, {"query_heads": True}):
        plan = fit(model, ids[1:], rows=100, block=16, profile=own, **asked).plan
        assert all(site.per == "query head" for site in plan.sites)
    for changes, what in (
        ({"module": "other"}, "at other, and the model has no such site"),
        ({"errors": ((0.0,) * 5,)}, "1 heads at .* has 2 KV heads and 4 query heads there"),
    ):
        site = replace(first.profile.sites[0], **changes)
        with pytest.raises(ValueError, match=f"profile: it has .*{what}.*must be a profile of this model"):
            fit(model, ids, rows=100, block=16, profile=replace(first.profile, sites=(site,)))
    assert not is_rewritten(model)


def test_wrong_arguments(model, ids) -> None:
    for words, changes in (
        ("nothing asked for: exactly one of tolerance, rows, speedup must be given", {"tolerance": None}),
        (r"tolerance=0\.1, rows=5: exactly one of tolerance, rows, speedup", {"rows": 5}),
        ("tolerance=0: must be above 0 and finite", {"tolerance": 0}),
        ("tolerance='x': must be of type int or float", {"tolerance": "x"}),
        (r"rows=1: the cheapest options take 3\d\.\d rows at 240 tokens", {"tolerance": None, "rows": 1}),
        ("tolerance=1e-09: the best options of every head have a KL of", {"tolerance": 1e-9, "options": OPTIONS[:1]}),
        (r"options=\(\): must hold at least one Rows", {"options": ()}),
        ("options: 5 must be a Rows", {"options": [5]}),
        ("options=Rows.*: must be a sequence of Rows", {"options": Rows(2, 8)}),
        (r"options: rows\[1\]: 8 recent \+ 4 thinned \+ 1 selected", {"options": [EVERYTHING, Rows(0, 8, 4, 0, 1)]}),
        ("length=1: must be 2 tokens or more", {"length": 1}),
        (r"options: \[5\] must be a Rows", {"options": [[5]]}),
        ("profile=5: must be None or a Profile", {"profile": 5}),
        ("query_heads='no': must be True or False", {"query_heads": "no"}),
        ("sample: a str; must be several", {"sample": "text"}),
        (r"sample\[0\]: 1 token; must be 2 or more", {"sample": ids[:, :1]}),
        ("sample: 3 tokens; must be 4 or more", {"sample": ids[:1, :3]}),
        ("held_out=None: of one mapping nothing can be held out", {"sample": [{"input_ids": ids}]}),
        ("block=24: must be 16, 32, 64 or 128", {"block": 24}),
        ("last=257: must be 0 to 256 queries", {"last": 257}),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            given = {"sample": ids, "tolerance": 0.1, "options": OPTIONS, "block": 16, "last": 16, **changes}
            fit(model, given.pop("sample"), **given)
        assert not is_rewritten(model)
    with pytest.raises(TypeError, match="tolerance=0.1: needs sample=input_ids"):
        rewrite_attention(model, tolerance=0.1)
    for name, value in (("query_heads", True), ("questions", ids)):
        with pytest.raises(TypeError, match=rf"(?s){name}=[Tt].*: needs sample="):
            rewrite_attention(model, **{name: value})
    with pytest.raises(TypeError, match="budget: not allowed beside sample"):
        rewrite_attention(model, sample=ids, tolerance=0.1, budget=64)
    with pytest.raises(TypeError, match="policy and sample were both given"):
        rewrite_attention(model, Policy(), sample=ids, tolerance=0.1)
    rewrite_attention(model)
    with pytest.raises(ValueError, match="is rewritten; call restore_attention"):
        fit(model, ids, tolerance=0.1)
    restore_attention(model)


def test_what_cannot_be_reached_is_told_before_anything_is_profiled(
    shipped_rates: None, model, ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(model, "forward", lambda x, own=model.forward: calls.append(tuple(x.shape)) or own(x))
    sample = ids.repeat(1, 4)
    with pytest.raises(ValueError, match=r"rows=1: the cheapest options take \d+\.\d rows at 960 tokens"):
        fit(model, sample, rows=1, options=OPTIONS)
    assert not calls
    with pytest.raises(
        ValueError, match=r"speedup=1000: the cheapest options are predicted to be \d+\.\d+ times as fast"
    ):
        fit(model, sample, speedup=1000, options=OPTIONS)
    assert calls == [(1, 512)], "to find the sites"


def test_a_model_without_causal_attention_is_told_why() -> None:
    class Encoder(Decoder):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)[:, None].expand(-1, 2, -1, -1)
            return self.out(F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2))

    with pytest.raises(ValueError, match="no site can have rows for each head: .*not causal"):
        fit(Encoder().eval(), texts(40, 45), tolerance=0.1)


def test_two_sites_of_one_module_have_plans_of_their_own() -> None:
    class Twice(Decoder):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)[:, None].expand(-1, 2, -1, -1)
            marker = torch.zeros_like(x)
            marker[..., self.MARKER] = 60.0
            begin = torch.zeros_like(x)
            begin[..., self.BEGIN] = 60.0
            x = sum(F.scaled_dot_product_attention(query, x, x, is_causal=True) for query in (marker, begin))
            return self.out(x.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, ids = Twice().eval(), texts(40, 45)
    found = fit(model, ids, tolerance=1e-4, options=(Rows(4, 16), EVERYTHING), block=16)
    assert found.chosen == ((EVERYTHING,), (Rows(4, 16),))
    assert found.profile.sites[1].through is None, "their sum is what goes through the linear layer"
    assert [(x.module, x.index) for x in found.plan.sites] == [("", 0), ("", 1)]
    assert found.kl == pytest.approx(kl_of(model, ids[1:], 64, plan=found.plan), abs=1e-7)
