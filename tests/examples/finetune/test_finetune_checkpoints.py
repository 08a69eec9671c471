"""The fine-tuning's checkpoints: an interrupted run resumes as if it had not been."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_cases import QUICK, assert_same, fails, script, train

import finetune
import finetune_model
import finetune_training


@pytest.mark.parametrize("stop_in", finetune_model.STAGES)
def test_resumed_run_is_the_uninterrupted_one(
    tiny: str, digits: Path, tmp_path: Path, stop_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny, digits, tmp_path / "whole", 2)
    first = train(tiny, digits, tmp_path / "halves", 1 if stop_in == "all" else 0)
    assert len(first["history"]) == (2 if stop_in == "all" else 1)
    resumed = train(tiny, digits, tmp_path / "halves", 2, "--resume")
    assert_same(resumed, whole)
    assert resumed["scheduler"] == whole["scheduler"]
    # Nothing is left to do, and nothing changes.
    assert_same(train(tiny, digits, tmp_path / "halves", 2, "--resume"), whole)
    best = [finetune_training.load(tmp_path / run / "best.pt") for run in ("halves", "whole")]
    assert_same(*best)


def test_resume_restores_the_best(tiny: str, digits: Path, output: Path) -> None:
    train(tiny, digits, output, 1)
    last = finetune_training.load(output / "last.pt")
    last["history"][0]["valid_accuracy"] = 1.0
    finetune_training.save(output / "last.pt", last)
    before = (output / "best.pt").read_bytes()
    train(tiny, digits, output, 2, "--resume")
    assert (output / "best.pt").read_bytes() == before


def test_interrupted_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    old = {"model": {}, "settings": {}, "history": []}
    finetune_training.save(path, old)

    def half(contents: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        finetune_training.save(path, old | {"history": [1]})
    assert finetune_training.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_terminated_run_resumes(digits: Path, output: Path) -> None:
    options = (*QUICK, "--data", str(digits), "--limit", "4", "--image-size", "32", "--output", str(output))
    options += ("--model", "squeezenet", "--epochs-head", "1")
    process = script(*options, "--epochs-all", "1000")
    deadline = time.monotonic() + 120
    while not (output / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert f"goes on after the last finished epoch, from {output / 'last.pt'}" in error
    assert "Traceback" not in error
    last = finetune_training.load(output / "last.pt")
    assert not last["finished"]
    done = len(last["history"])
    assert finetune.main([*options, "--epochs-all", str(done), "--resume"]) == 0
    assert len(finetune_training.load(output / "last.pt")["history"]) == done + 1


def test_unfinished_run_is_not_written_over(
    tiny: str, digits: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, digits, output, 1)
    last = finetune_training.load(output / "last.pt")
    finetune_training.save(output / "last.pt", last | {"finished": False})
    again = ("--data", digits, "--model", tiny, "--output", output)
    assert "unfinished" in fails(capsys, *again)
    assert finetune_training.load(output / "last.pt")["history"] == last["history"]
    train(tiny, digits, output, 1, "--overwrite")


def test_checkpoints_that_cannot_be_resumed(
    tiny: str, digits: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("--data", digits, "--output", output, "--resume", "--model")
    assert f"there is no {output / 'last.pt'}" in fails(capsys, *again, tiny)
    train(tiny, digits, output, 0)
    assert "its model is tiny, not squeezenet" in fails(capsys, *again, "squeezenet")
    (output / "last.pt").write_bytes((output / "last.pt").read_bytes()[:1000])
    assert f"{output / 'last.pt'} cannot be read" in fails(capsys, *again, tiny)
    torch.save({"weight": torch.zeros(1)}, output / "last.pt")
    assert f"{output / 'last.pt'} is not a checkpoint" in fails(capsys, *again, tiny)
