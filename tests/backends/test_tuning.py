"""Choosing the fastest way and remembering it, with a clock that needs no GPU."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings

import pytest
import torch

from pooling_ext.backends import autotune

DEVICE = torch.device("cuda", 0)
CARD = "a card, torch 1, triton 2"


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """A file of the test's own, and a clock on which a way takes as long as it returns."""
    file = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("POOLING_EXT_TUNING_FILE", str(file))
    monkeypatch.delenv("POOLING_EXT_TUNE", raising=False)
    monkeypatch.setattr(autotune, "card_name", lambda device: CARD)
    monkeypatch.setattr(autotune, "milliseconds", lambda way, device: way())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune.forget()
    yield file
    autotune.forget()


def ways(calls: list[str], **times: float):
    """Ways that note that they ran; a negative time stands for one that does not work."""

    def way(name: str, time: float):
        def run() -> float:
            calls.append(name)
            if time < 0:
                raise RuntimeError(f"no {name} here")
            return time

        return run

    return {name: way(name, time) for name, time in times.items()}


def test_the_fastest_is_measured_once(file):
    calls: list[str] = []
    offered = ways(calls, cudnn=2.0, triton=1.0, cuda=3.0)
    assert autotune.fastest("conv", offered, DEVICE) == "triton"
    assert calls == ["cudnn", "triton", "cuda", "cudnn", "triton"]  # timed, and two of them compared
    assert autotune.fastest("conv", offered, DEVICE) == "triton"
    assert len(calls) == 5
    assert autotune.fastest("another", ways(calls, cudnn=1.0, triton=2.0), DEVICE) == "cudnn"


def test_the_file_is_readable_and_serves_the_next_process(file):
    calls: list[str] = []
    autotune.fastest("conv 64", ways(calls, cudnn=2.0, triton=1.23456), DEVICE)
    assert json.loads(file.read_text()) == {
        CARD: {"conv 64": {"fastest": "triton", "milliseconds": {"cudnn": 2.0, "triton": 1.235}}}
    }
    autotune.forget()
    calls.clear()
    assert autotune.fastest("conv 64", ways(calls, cudnn=2.0, triton=1.0), DEVICE) == "triton"
    assert not calls
    file.unlink()
    autotune.forget()
    assert autotune.fastest("conv 64", ways(calls, cudnn=1.0, triton=2.0), DEVICE) == "cudnn"


def test_a_way_that_is_gone_is_not_chosen(file):
    autotune.fastest("conv", ways([], cudnn=2.0, triton=1.0), DEVICE)
    assert autotune.fastest("conv", ways([], cudnn=2.0, cuda=3.0), DEVICE) == "cudnn"


def test_other_cards_are_left_alone(file, monkeypatch):
    autotune.fastest("conv", ways([], cudnn=2.0, triton=1.0), DEVICE)
    monkeypatch.setattr(autotune, "card_name", lambda device: "another card")
    assert autotune.fastest("conv", ways([], cudnn=1.0, triton=2.0), DEVICE) == "cudnn"
    assert {card: section["conv"]["fastest"] for card, section in json.loads(file.read_text()).items()} == {
        CARD: "triton",
        "another card": "cudnn",
    }


def test_a_way_that_does_not_work_is_passed_over():
    assert autotune.fastest("conv", ways([], cudnn=2.0, triton=-1.0), DEVICE) == "cudnn"
    with pytest.raises(RuntimeError, match="no cudnn here"):
        autotune.fastest("hopeless", ways([], cudnn=-1.0, triton=-1.0), DEVICE)


def test_a_faster_way_with_a_wrong_result_is_not_taken(file, monkeypatch):
    """Nor a slower one that is wrong; the fastest of those that agree with the first is."""
    right = torch.randn(2, 8, 5, 5).bfloat16()
    tile = right.clone()
    tile[1, :, 4] = 0  # a row that nobody wrote
    times = {"cudnn": 4.0, "wrong": 1.0, "nan": 2.0, "right": 3.0, "slow": 5.0}
    results = {"cudnn": right, "wrong": tile, "nan": right / 0, "right": right * (1 + 2**-7), "slow": -right}
    offered = {name: lambda name=name: (results[name], torch.ones(3)) for name in times}
    clock = dict(zip(map(id, offered.values()), times.values(), strict=True))
    monkeypatch.setattr(autotune, "milliseconds", lambda way, device: clock[id(way)])
    with pytest.warns(UserWarning, match="does not take") as warned:
        assert autotune.fastest("conv", offered, DEVICE) == "right"
    assert len(warned) == 2
    entry = json.loads(file.read_text())[CARD]["conv"]
    assert set(entry["wrong"]) == {"wrong", "nan"} and entry["fastest"] == "right"
    assert "40 of 400 elements of output 0" in entry["wrong"]["wrong"]
    with pytest.warns(UserWarning, match="'wrong'"):
        few = {name: offered[name] for name in ("cudnn", "wrong")}
        assert autotune.fastest("another", few, DEVICE) == "cudnn"


@pytest.mark.parametrize("dtype", autotune.ROUNDING, ids=str)
def test_rounding_is_no_difference(dtype, monkeypatch):
    monkeypatch.setattr(autotune, "_AT_ONCE", 100)  # in several parts
    exact = torch.randn(6, 4, 9, 9, dtype=torch.float64) * 100
    rounded = exact.to(dtype)
    again = (exact * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert autotune.difference([again, None], [rounded, None]) is None
    other = rounded.clone()
    other[5, 0, 0] = 1000  # 9 elements
    assert "9 of 1944 elements of output 0" in (autotune.difference(other, rounded) or "")
    assert "not" in (autotune.difference(other[:1], rounded) or "")
    infinite = rounded.clone()
    infinite[0] = float("inf")
    assert autotune.difference(rounded, infinite) is None
    assert autotune.difference(infinite, rounded) is not None
    assert autotune.difference(rounded[:0], rounded[:0]) is None
    assert autotune.difference(torch.tensor(1.0), torch.tensor(2.0)) is not None


def test_without_measuring_the_first_is_taken(file, monkeypatch):
    calls: list[str] = []
    monkeypatch.setenv("POOLING_EXT_TUNE", "0")
    assert autotune.fastest("conv", ways(calls, cudnn=2.0, triton=1.0), DEVICE) == "cudnn"
    monkeypatch.delenv("POOLING_EXT_TUNE")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.fastest("conv", ways(calls, cudnn=2.0, triton=1.0), DEVICE) == "cudnn"
    assert not calls and not file.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a card, torch 1, triton 2": 3}', '{"x": {"conv": 1}}']
)
def test_a_spoilt_file_is_replaced(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert autotune.fastest("conv", ways([], cudnn=2.0, triton=1.0), DEVICE) == "triton"
    assert json.loads(file.read_text())[CARD]["conv"]["fastest"] == "triton"


def test_where_nothing_can_be_written_it_warns_and_goes_on(monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("POOLING_EXT_TUNING_FILE", str(blocked / "tuning.json"))
    with pytest.warns(UserWarning, match="cannot remember"):
        assert autotune.fastest("conv", ways([], cudnn=2.0, triton=1.0), DEVICE) == "triton"
    assert autotune.fastest("conv", ways([], cudnn=2.0, triton=3.0), DEVICE) == "triton"


def test_threads_measure_one_at_a_time():
    calls: list[str] = []
    offered = ways(calls, cudnn=2.0, triton=1.0)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(autotune.fastest("conv", offered, DEVICE)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 8 and len(calls) == 4


def _write_many(process: int) -> None:
    for call in range(20):
        autotune.remember(CARD, f"process {process} call {call}", "triton", {"triton": 1.0})


def test_processes_do_not_lose_each_others_choices(file):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(index,)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(json.loads(file.read_text())[CARD]) == 80
    assert not [
        path for path in file.parent.iterdir() if path.name not in ("tuning.json", "tuning.json.lock")
    ]
