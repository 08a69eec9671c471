"""What the tests of the fine-tuning share: a small model, a few images, one thread, no pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torchvision
from finetune_cases import Tiny
from PIL import Image

import finetune
import finetune_data
import finetune_model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: Tiny())
    monkeypatch.setitem(finetune_model.ARCHITECTURES, "tiny", finetune_model.Architecture("tiny", ("fc",)))
    return "tiny"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune_data.write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def output(tmp_path: Path):
    """Emptied at the end: a checkpoint of a real model takes more than 100 MB."""
    yield tmp_path / "output"
    shutil.rmtree(tmp_path / "output", ignore_errors=True)


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """One test looks at the pictures, which take longer than training on a few images."""
    if request.function.__name__ != "test_learns_digits":
        for name in ("draw_curves", "draw_predictions"):
            monkeypatch.setattr(finetune, name, lambda *_: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four small images in both splits."""
    for split in ("train", "valid"):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for position in range(4):
                Image.new("RGB", (40, 36), (200 * index, 30 * position, 90)).save(folder / f"{position}.jpg")
    return tmp_path / "images"
