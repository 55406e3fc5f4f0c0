"""From costs to times: rates, devices, crossovers, and the planner's choices at the shapes that were measured."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from express_compile.core.cost import Cost, Device, Rates
from express_compile.core.method import METHODS
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask
from express_compile.planning import devices, measure
from express_compile.planning.predict import LONGEST, at_length, crossover, predict, predicted, wins, without_padding

RESULTS = Path(__file__).parents[2] / "examples" / "bench" / "results"
H200 = devices.shipped()["NVIDIA H200"]


def prefill(n: int, B: int = 1, dtype: torch.dtype = torch.bfloat16) -> AttentionSpec:
    return AttentionSpec(B, 32, 8, n, n, 128, 128, dtype, "cuda", 128**-0.5, Mask(causal=True))


rates = st.builds(Rates, *[st.floats(0, 1e-3) for _ in range(8)], st.floats(0, 1e7))
true_rates = rates.filter(lambda of: any(getattr(of, name) > 0 for name in asdict(Cost(*[0] * 6))))
costs = st.builds(Cost, *[st.integers(0, 10**6) for _ in range(6)])


@given(rates, costs)
def test_a_time_is_the_sum_of_its_parts_and_no_less_than_its_launch(rates: Rates, cost: Cost) -> None:
    parts = [getattr(rates, name) * getattr(cost, name) for name in asdict(cost)]
    parts.append(rates.evictions * min(cost.bytes, rates.cache))
    assert rates.seconds(cost, graphs=True) == pytest.approx(sum(parts), abs=1e-12)
    assert rates.seconds(cost) == max(rates.seconds(cost, graphs=True), 1.5 * rates.call)


@given(st.dictionaries(st.sampled_from(["half", "float32"]), st.dictionaries(st.text(max_size=5), true_rates)))
def test_devices_are_plain_data(of: dict) -> None:
    device = Device("a", "b", of)
    assert Device.from_dict(json.loads(json.dumps(asdict(device)))) == device


def test_exact_attention_of_few_queries_has_rates_of_its_own() -> None:
    of = {"exact": Rates(flops=1.0), "exact, few queries": Rates(flops=2.0), "santa": Rates(flops=3.0)}
    device = Device("", "", {"half": of})
    found = [device.rates_of("exact", torch.bfloat16, Lq).flops for Lq in (1, 16, 17, sympy.Symbol("n"), None)]
    assert found == [2.0, 2.0, 1.0, 1.0, 1.0]
    assert device.rates_of("santa", torch.bfloat16, 1).flops == 3.0
    few = Device("", "", {"half": {"exact": Rates(flops=1.0)}}).rates_of("exact", torch.bfloat16, 1)
    assert few.flops == 1.0 and device.rates_of("exact", torch.float32, 1) is None


def test_a_scaled_device_is_slower_by_its_data_sheet() -> None:
    a100 = devices.shipped()["NVIDIA A100-SXM4-80GB"]
    assert "not measured" in a100.source and "measured 20" in H200.source
    before, after = (d.rates["half"]["exact"] for d in (H200, a100))
    assert after.flops / before.flops == pytest.approx(989 / 312)
    assert after.bytes / before.bytes == pytest.approx(4.8 / 2.039)
    assert after.launches == before.launches and after.call == before.call
    ratio = predict("exact", prefill(1 << 16), Policy(), a100) / predict("exact", prefill(1 << 16), Policy(), H200)
    assert 2 < ratio < 989 / 312


def test_what_is_not_known_has_no_time() -> None:
    spec = prefill(4096)
    assert predict("exact", spec, Policy(), Device("empty", "")) is None
    assert predicted(("exact", "express"), spec, Policy(), Device("", "", {"half": {"exact": Rates(1.0)}})) is None
    with pytest.raises(ValueError, match="=n: must be an integer"):
        predict("exact", replace(spec, Lk=sympy.Symbol("n")), Policy(), H200)


def test_a_sequence_that_is_left_to_exact_attention_takes_its_time() -> None:
    for s, same in ((2048, True), (512, False)):
        times = predicted(("express", "exact"), prefill(8192), Policy(budget=s), H200)
        assert (times["express"] == times["exact"]) == same
        assert not wins(times, "express"), "a gain below the margin is none"


# ------------------------------------------------------------------------------------------------------ crossovers


@pytest.mark.parametrize("graphs", [True, False])
def test_from_the_crossover_on_no_length_loses(graphs: bool) -> None:
    policy = Policy(budget=256)
    n = crossover("express", "exact", prefill(1), policy, H200, graphs, 1.05)
    assert 4096 < n < 16384
    for length, ahead in ((n, True), (2 * n, True), (8 * n, True), (int(0.97 * n), False), (n // 2, False)):
        assert wins(predicted(("express", "exact"), prefill(length), policy, H200, graphs), "express") == ahead


def test_larger_budgets_and_smaller_batches_cross_later() -> None:
    by_budget = [crossover("express", "exact", prefill(1), Policy(budget=s), H200) for s in (128, 512, 2048)]
    assert by_budget == sorted(by_budget) and by_budget[0] * 2 < by_budget[2]
    by_batch = [crossover("thinformer", "exact", replace(prefill(1, B), mask=Mask()), Policy(budget=256), H200)
                for B in (1, 8)]  # fmt: skip
    assert by_batch[0] > 1.5 * by_batch[1]


def test_where_there_is_no_crossover() -> None:
    slow = Device("slow", "", {"half": {"express": Rates(bytes=1.0), "exact": Rates(bytes=1e-12)}})
    assert crossover("express", "exact", prefill(1), Policy(), slow) is None
    assert crossover("santa", "exact", prefill(1), Policy(), slow) is None, "nothing is known of it"
    fast = Device("fast", "", {"half": {"express": Rates(launches=1e-9), "exact": Rates(launches=1.0)}})
    policy = Policy(budget=16, sinks=0, window=0, protected=0)
    assert crossover("express", "exact", prefill(1), policy, fast, margin=1.05) == 65, (
        "up to 4 s keys it is exact attention itself"
    )
    chunk = replace(prefill(1), Lq=1024, Lk=4096, mask=Mask(causal=True, offset=3072))
    assert crossover("express", "exact", chunk, policy, fast, margin=1.05) == 1024, (
        "there are no fewer keys than queries"
    )
    assert at_length(chunk, LONGEST).mask.offset == LONGEST - 1024


# ----------------------------------------------------------------------------------------------------------- fits


positive = st.builds(Rates, *[st.just(0.0) | st.floats(1e-9, 1e-3) for _ in range(5)], st.floats(1e-9, 1e-3))


@given(positive, st.integers(0, 2**32))
@settings(max_examples=30)
def test_rates_are_found_again(true: Rates, seed: int) -> None:
    """From exact times; what a rate contributes next to nothing cannot be found, so times are compared."""
    random = torch.Generator().manual_seed(seed)
    found = [Cost(*torch.randint(1, 10**6, (6,), generator=random).tolist()) for _ in range(12)]
    rows = [dict(cost=cost, seconds=true.seconds(cost, graphs=True)) for cost in found]
    fitted = measure.fit(rows)
    for row in rows:
        assert fitted.seconds(row["cost"], graphs=True) == pytest.approx(row["seconds"], rel=0.02)
    assert min(asdict(fitted).values()) >= 0


def test_what_the_cache_has_to_give_back_is_found() -> None:
    """The first 5 MB take twice as long as the others; without that term calls are off by up to 5% or more."""
    true = Rates(bytes=2e-13, launches=4e-6, evictions=2e-13, cache=5e6)
    found = [Cost(0, int(10 ** (k / 4)), 0, 1) for k in range(20, 36)]
    rows = [dict(cost=cost, seconds=true.seconds(cost, graphs=True)) for cost in found]
    fitted, plain = measure.fit(rows, cache=5e6), measure.fit(rows)
    assert fitted.evictions == pytest.approx(2e-13, rel=0.05) and plain.evictions == 0
    off = [abs(plain.seconds(row["cost"], graphs=True) / row["seconds"] - 1) for row in rows]
    assert max(off) > 0.05
    for row in rows:
        assert fitted.seconds(row["cost"], graphs=True) == pytest.approx(row["seconds"], rel=0.01)


def test_one_shape_off_the_line_does_not_tilt_it() -> None:
    true = Rates(flops=2e-12, launches=1e-5)
    found = [Cost(10**k, 0, 0, 1 + k % 2) for k in range(6, 12)]
    rows = [dict(cost=cost, seconds=true.seconds(cost, graphs=True)) for cost in found]
    rows[2]["seconds"] *= 3
    fitted = measure.fit(rows)
    assert fitted.flops == pytest.approx(true.flops, rel=0.05) and fitted.launches == pytest.approx(1e-5, rel=0.2)


def test_calibration_measures_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A short one of the CPU, kept in a file and found again."""
    few = [measure._prefill("exact", n, causal=True, H=2, H_kv=1, D=16, dtype=torch.float32) for n in (256, 1024)]
    few += [measure._decode("santa", 1, 300, 16, H=2, H_kv=1, D=16, dtype=torch.float32)]
    monkeypatch.setattr(measure, "shapes", lambda device, dtype: few)
    monkeypatch.setattr(measure, "_SECONDS", 0.03)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.known.cache_clear()
    seen: list = []
    device, found = measure.calibrate(lambda shapes: (seen.append(x) or x for x in shapes))
    assert seen == few and set(device.rates) == {"float32"} and set(device.rates["float32"]) == {"exact", "santa"}
    assert device.name == f"CPU, {torch.get_num_threads()} threads" and torch.__version__ in device.source
    for row in found:
        cost, spec = row["cost"], row["shape"].spec("cpu")
        times = device.rates_of(row["shape"].method, torch.float32, spec.Lq).seconds(cost)
        assert times == pytest.approx(row["seconds"], rel=0.5) and cost.scores >= spec.H * spec.Lk
    assert devices.device_of("cpu") != device
    path = devices.save(device)
    assert path.parent == tmp_path / "express_compile" and devices.device_of("cpu") == device
    devices.known.cache_clear()
    assert devices.device_of("cuda") is None and devices.device_of("mps") is None


@pytest.fixture(autouse=True)
def _forget():
    yield
    devices.known.cache_clear()


# --------------------------------------------------------------------------------------------- measured on a GPU


def test_the_planner_chooses_well_at_the_shapes_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of issue 7, on the committed rows of the grid."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    import planner

    with (RESULTS / "speed.csv").open(newline="") as file:
        judged = planner.judge(list(csv.DictReader(file)))
    assert len({(x.row["B"], x.row["Lk"], x.row["s"], x.row["method"]) for x in judged}) >= 60
    assert statistics.median(x.ratio for x in judged) <= 1.05
    assert max(x.ratio for x in judged) <= 1.25
    slower = [x for x in judged if x.chosen != "exact" and x.method > 1.03 * x.exact]
    assert not slower, [(x.row["method"], x.row["B"], x.row["Lk"], x.row["s"]) for x in slower]
    crossings = planner.crossings(judged)
    off = [x.predicted / x.measured - 1 for x in crossings]
    assert len(crossings) >= 15 and max(map(abs, off)) <= 0.25, crossings
    for method in ("express", "thinformer", "santa"):
        errors = [abs(x.predicted / x.method - 1) for x in judged if x.row["method"] == method]
        assert statistics.median(errors) < 0.1, method


def test_what_express_takes_for_a_padded_batch() -> None:
    """Zeros and launches, a few percent of a long prefill: nothing is copied, which took longer than attention."""
    spec = prefill(1 << 15, 3)
    padded = replace(spec, mask=replace(spec.mask, padding=True))
    for protected in (0, 256):
        policy = Policy(budget=512, window=256, protected=protected)
        bare, found = (predict("express", x, policy, H200) for x in (spec, padded))
        assert 1.01 < found / bare < 1.15, (bare, found)
        times = [predict("exact", x, policy, H200) for x in (spec, padded)]
        assert times[0] == times[1], "nothing was measured of exact attention with such a mask"


def test_whose_predictions_leave_padding_out() -> None:
    spec = prefill(1 << 15)
    padded = replace(spec, mask=replace(spec.mask, padding=True))
    assert without_padding(METHODS.shipped, spec) == ()
    assert without_padding(METHODS.shipped, padded) == ("thinformer", "santa", "sparse", "exact")
    for name in METHODS.shipped:
        same = predict(name, padded, Policy(), H200) == predict(name, spec, Policy(), H200)
        assert same == (name in without_padding([name], padded)), name
    bare = crossover("express", "exact", spec, Policy(), H200)
    assert bare < crossover("express", "exact", padded, Policy(), H200) < 1.3 * bare


def test_every_method_with_rates_has_a_cost() -> None:
    for of in H200.rates.values():
        chosen = {name for name in METHODS.shipped if not METHODS[name].changes}  # what is chosen by its speed
        chosen -= {name for name in chosen if METHODS[name].shares}  # by the rates of others
        assert set(of) == {*chosen, "exact, few queries"}
        assert all(METHODS[name].cost or METHODS[name].shares for name in METHODS.shipped)
        assert all(of[name].call > 0 for name in of)
