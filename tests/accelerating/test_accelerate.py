"""accelerate: what it keeps, by a clock of the tests' own, how it measures, its report and its errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from accelerate_cases import Clock, Net, X, install, is_patched, net, state_of
from torch import nn
from training_cases import Block

import pooling_ext
from pooling_ext import AccelerateReport, ArgumentError, Frozen, accelerate, memory
from pooling_ext.accelerating import measure, trial
from pooling_ext.memory import MemoryReuse

pytestmark = [pytest.mark.filterwarnings("ignore:.*lazy modules"), pytest.mark.usefixtures("one_thread")]
CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(monkeypatch)


# --- what is kept ----------------------------------------------------------------------------------------

#: Seconds of a call by (patched, channels_last); the model is contiguous; and what is to be chosen.
FORMATS = [
    pytest.param((10.0, 8.0, 9.0), "patched", id="own format"),
    pytest.param((10.0, 9.0, 8.0), "patched, channels_last", id="channels_last"),
    pytest.param((10.0, 8.0, 7.9), "patched", id="channels_last saves too little"),
    pytest.param((10.0, 9.9, 9.7), "patched, channels_last", id="both together save enough"),
    pytest.param((10.0, 12.0, 9.7), "patched, channels_last", id="only there"),
    pytest.param((10.0, 9.81, 9.85), "as it was", id="under 2%"),
    pytest.param((10.0, 11.0, 12.0), "as it was", id="slower"),
]


@pytest.mark.parametrize(("seconds", "chosen"), FORMATS)
@pytest.mark.parametrize("reused", [False, True], ids=["", "memory reused before"])
def test_training_keeps_the_fastest_way(clock, seconds, chosen, reused):
    model = net(clock)
    before, clock.reused = state_of(model), reused
    clock.cost = lambda patched, channels_last, **_: seconds[patched + channels_last]
    assert accelerate(model, X) is model
    report = model.accelerate_report
    assert report.chosen == chosen
    assert is_patched(model) == chosen.startswith("patched")
    assert model.conv.weight.is_contiguous(**CHANNELS_LAST) == chosen.endswith("channels_last")
    assert clock.reused == (reused or chosen != "as it was")
    expected = dict(zip(("as it was", "patched", "patched, channels_last"), seconds, strict=True))
    assert {name: taken / 1e3 for name, taken in report.milliseconds.items()} == pytest.approx(expected)
    assert report.before == pytest.approx(1e4) and report.speedup == pytest.approx(1e4 / report.after)
    if chosen == "as it was":
        assert state_of(model) == before
    assert ("replaced, 0 skipped, undone" in str(report)) == (chosen == "as it was")
    assert f"* {chosen}" in str(report)


def test_a_model_in_channels_last_may_become_contiguous(clock):
    model = net(clock, CHANNELS_LAST)
    clock.cost = lambda channels_last, **_: 10.0 if channels_last else 5.0
    assert accelerate(model, X).accelerate_report.chosen == "patched, contiguous"
    assert model.conv.weight.is_contiguous() and is_patched(model)


def test_a_model_in_channels_last_stays_so(clock):
    model = net(clock, CHANNELS_LAST)
    before = state_of(model)
    assert accelerate(model, X).accelerate_report.chosen == "as it was"
    assert state_of(model) == before and model.conv.weight.is_contiguous(**CHANNELS_LAST)


def test_memory_reuse_alone_is_kept(clock):
    model = net(clock)
    before = state_of(model)
    clock.cost = lambda reused, **_: 5.0 if reused else 10.0
    assert accelerate(model, X).accelerate_report.chosen == "memory reused"
    assert state_of(model) == before and clock.reused


def test_what_reuse_saves_adds_up(clock):
    clock.cost = lambda reused, patched, **_: 10.0 - 4 * reused - 1 * patched
    model = net(clock)
    report = accelerate(model, X).accelerate_report
    assert report.chosen == "patched" and clock.reused and is_patched(model)
    assert report.milliseconds == pytest.approx(
        {"as it was": 1e4, "memory reused": 6e3, "patched": 5e3, "patched, channels_last": 5e3}
    )


def test_a_machine_that_becomes_slower(clock):
    """What was measured before that says nothing."""
    clock.cost = lambda reused, patched, **_: 20.0 - 5 * patched if reused else 10.0
    report = accelerate(net(clock), X).accelerate_report
    assert report.chosen == "patched" and clock.reused
    assert report.before == pytest.approx(20e3) and report.after == pytest.approx(15e3)


def test_memory_that_cannot_be_reused_is_no_way(clock, monkeypatch):
    monkeypatch.setattr(memory, "reuse_cpu_memory", lambda: MemoryReuse(False, "needs glibc's mallopt"))
    report = accelerate(net(clock), X).accelerate_report
    assert list(report.milliseconds) == ["as it was", "patched", "patched, channels_last"]
    assert report.memory == "needs glibc's mallopt"


@pytest.mark.parametrize(("frozen", "pays"), [(9.7, True), (9.81, False), (11.0, False)])
def test_inference_returns_what_is_faster(clock, frozen, pays):
    model = net(clock)
    before, expected = state_of(model), copy.deepcopy(model).eval()(X)
    clock.cost = lambda **way: frozen if way["frozen"] else 10.0
    fast = accelerate(model, X, training=False)
    assert state_of(model) == before
    assert isinstance(fast, Frozen) == pays == clock.reused and (fast is model) != pays
    report = fast.accelerate_report
    assert report.chosen == ("frozen" if pays else "as it was")
    assert report.milliseconds == pytest.approx({"as it was": 1e4, "frozen": 1e3 * frozen})
    assert report.fusion is not None and report.fusion.replaced
    torch.testing.assert_close(fast.eval()(X), expected)


def test_inference_in_a_dtype(clock):
    clock.cost = lambda frozen, **_: 5.0 if frozen else 10.0
    fast: Any = accelerate(net(clock), X, training=False, dtype=torch.bfloat16)
    assert fast.dtype == torch.bfloat16 and fast(X).dtype == torch.float32


def test_a_model_that_cannot_be_frozen(clock):
    model = clock.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert accelerate(model, X, training=False) is model
    (note,) = model.accelerate_report.notes
    assert note.startswith("not frozen: ") and "1 (BatchNorm2d)" in note
    assert model.accelerate_report.chosen == "as it was" and not clock.reused


@pytest.mark.parametrize(
    ("function", "training", "note"), [("patch", True, "not patched"), ("freeze", False, "not frozen")]
)
def test_where_ours_raises(clock, monkeypatch, function, training, note):
    """A model that works goes on working."""

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trial, function, fail)
    model = net(clock)
    before = state_of(model)
    assert accelerate(model, X, training=training) is model
    report = model.accelerate_report
    assert report.notes == [f"{note}: a bug"] and report.fusion is None and report.chosen == "as it was"
    assert state_of(model) == before


def test_a_way_that_raises_is_left_out(clock):
    def cost(patched, channels_last, **_):
        if patched and not channels_last:
            raise RuntimeError("no such kernel")
        return 5.0 if patched else 10.0

    clock.cost = cost
    report = accelerate(net(clock), X).accelerate_report
    assert report.chosen == "patched, channels_last" and "patched" not in report.milliseconds
    assert report.notes == ["patched: raises RuntimeError: no such kernel"]


def test_patched_before(clock):
    """It counts as the model as it was, and is what an undoing goes back to."""
    model = net(clock)
    pooling_ext.patch(model)
    before = state_of(model)
    assert accelerate(model, X).accelerate_report.chosen == "as it was"
    assert state_of(model) == before
    pooling_ext.unpatch(model)
    assert type(model) is Net and type(model.block) is Block


# --- how it measures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "rounds"), [(60.0, 3), (2.0, 3), (0.5, 9), (1e-4, 20)])
def test_rounds(clock, seconds, rounds):
    """Three of slow calls, and of others as many as there is time for."""
    clock.cost = lambda **_: seconds
    report = accelerate(net(clock), X).accelerate_report
    assert abs(report.rounds - rounds) <= 1


def test_rounds_go_on_where_times_vary(clock):
    times = itertools.cycle([0.25, 0.5, 0.75])
    net(clock)
    clock.cost = lambda **_: next(times)
    found, rounds = measure.in_turn([measure.Way("only", lambda: clock.tick)], torch.device("cpu"))
    assert rounds == 17 and found == {"only": 500.0}  # twice the time there is, where 8 rounds would fill it


def test_ways_take_turns_and_nobody_goes_first(clock):
    ran: list[str] = []

    def way(name: str) -> measure.Way:
        def call() -> None:
            ran.append(name)
            clock.now += 3

        return measure.Way(name, lambda: call)

    found, rounds = measure.in_turn([way("a"), way("b")], torch.device("cpu"))
    assert "".join(ran) == "abbaab" and rounds == 3 and found == {"a": 3e3, "b": 3e3}


def test_what_gets_ready_does_not_count(clock):
    def prepare():
        clock.now += 100
        return lambda: setattr(clock, "now", clock.now + 1)

    assert measure.in_turn([measure.Way("a", prepare)], torch.device("cpu")) == ({"a": 1e3}, 3)


# --- without an example ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_without_an_example(clock, training):
    model = net(clock)
    before = state_of(model)
    assert accelerate(model, training=training) is model
    report = model.accelerate_report
    assert is_patched(model) and clock.calls == 0 and clock.reused
    assert report.chosen == "patched" and report.before is report.after is report.speedup is None
    assert report.notes == ["not measured without an example"] and "patched, not measured" in str(report)
    pooling_ext.unpatch(model)
    assert state_of(model) == before


def test_several_processes_do_not_measure(clock, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    report = accelerate(net(clock), X).accelerate_report
    assert is_patched(clock.model) and clock.calls == 0
    assert report.notes == ["not measured, as several processes train together"]
    clock.cost = lambda frozen, **_: 5.0 if frozen else 10.0
    assert isinstance(accelerate(net(clock), X, training=False), Frozen)


# --- the report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_report_stays_with_the_model(clock, training):
    model = net(clock)
    keys = list(model.state_dict())
    clock.cost = lambda patched, frozen, **_: 5.0 if patched or frozen else 10.0
    fast = accelerate(model, X, training=training)
    report = fast.accelerate_report
    assert isinstance(report, AccelerateReport) and report.speedup == pytest.approx(2.0)
    if training:
        assert list(fast.state_dict()) == keys
    assert not any("report" in key for key in fast.state_dict())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other.accelerate_report == report and str(other.accelerate_report) == str(report)


def test_the_table():
    report = AccelerateReport(
        "patched", {"as it was": 10.0, "patched": 4.0}, 7, "inference, float32 (1, 3)", "because", None, ["a"]
    )
    assert str(report).splitlines() == [
        "inference, float32 (1, 3): medians of 7 rounds, * is kept",
        "  as it was         10 ms   1.00x",
        "* patched            4 ms   2.50x",
        "memory: because",
        "note: a",
    ]


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, but got int"),
        ({"training": 1}, TypeError, "training must be a bool, but got 1"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype or None, but got str"),
        (
            {"dtype": torch.float64},
            ArgumentError,
            "dtype must be one of .* for training, but got torch.float64",
        ),
        ({"dtype": torch.int8, "training": False}, ArgumentError, "for inference, but got torch.int8"),
        (
            {"dtype": torch.bfloat16, "training": False, "example": None},
            ArgumentError,
            r"example must be given where dtype is \(torch.bfloat16\)",
        ),
        (
            {"example": X[:, :2]},
            ArgumentError,
            r"example must be what model \(Net\) takes, but .*RuntimeError",
        ),
        (
            {"example": X[:, :2], "training": False},
            ArgumentError,
            r"example must be what model \(Net\) takes",
        ),
        ({"example": (X, X)}, ArgumentError, "example .* TypeError"),
        ({"example": {"y": X}}, ArgumentError, "example .* TypeError"),
    ],
)
def test_errors(clock, arguments, kind, match):
    model = net(clock)
    before = state_of(model)
    with pytest.raises(kind, match=match):
        accelerate(**{"model": model, "example": X, **arguments})
    assert state_of(model) == before and not clock.reused and not hasattr(model, "accelerate_report")


def test_models_without_data(clock):
    with pytest.raises(ArgumentError, match=r"model must have run once .*0.weight is not initialized"):
        accelerate(nn.Sequential(nn.LazyConv2d(3, 3)), X)
    with pytest.raises(ArgumentError, match=r"model must have data .*conv.weight is on the meta device"):
        accelerate(net(clock).to("meta"), X)


def test_a_frozen_model(clock):
    with pytest.raises(ArgumentError, match="model is frozen already"):
        accelerate(pooling_ext.freeze(net(clock), X), X)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu(clock, training):
    model = net(clock).cuda()
    state, x = torch.cuda.get_rng_state(), X.cuda()
    report = accelerate(model, x, training=training).accelerate_report
    assert report.chosen == "as it was" and not report.memory and not clock.reused
    assert torch.equal(torch.cuda.get_rng_state(), state)
