"""examples/accelerate_resnet.py: end to end on a small model, and bad images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import accelerate_resnet  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (80, 70), (90 * index, 120, 30)).save(folder / f"{index}.png")
    return folder


def test_demo(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerate_resnet, "load_pretrained", lambda *_: "not asked")
    options = [
        "--model",
        "resnet18",
        "--batch",
        "3",
        "--size",
        "64",
        "--seconds",
        "0",
        "--images",
        str(images),
    ]
    options += ["--dtype", "float32", "bfloat16", "--out", str(tmp_path / "demo.png")]
    assert accelerate_resnet.main(options) == 0
    printed = capsys.readouterr().out
    for text in (
        "initialized at random (not asked)",
        "these mean nothing",
        "conv1-bn1-relu-maxpool",
        "0 skipped",
        "freeze(resnet18, bfloat16): 23 layers frozen, 20 BatchNorms folded, 0 layers kept",
        "frozen",
        "stem, fused",
    ):
        assert text in printed
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize("spoil", ["missing", "empty", "truncated"])
def test_bad_images(images: Path, capsys: pytest.CaptureFixture[str], spoil: str) -> None:
    expected = f"{images / '1.png'} cannot be read"
    if spoil == "truncated":
        path = images / "1.png"
        path.write_bytes(path.read_bytes()[:60])
    else:
        images = images / spoil
        expected = f"{images} is not a directory"
        if spoil == "empty":
            images.mkdir()
            expected = f"there is no image in {images}"
    assert accelerate_resnet.main(["--images", str(images)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
