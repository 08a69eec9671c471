"""What the fine-tuning says of bad data and bad options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import fails

import finetune
import finetune_data


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_truncated_image(
    tiny: str, images: Path, output: Path, capsys: pytest.CaptureFixture[str], split: str, workers: str
) -> None:
    path = images / split / "dog" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    options = ("--data", images, "--model", tiny, "--output", output, "--workers", workers)
    error = fails(capsys, *options)
    assert error.startswith(f"{path} cannot be read: image file is truncated")


def test_not_an_image(tiny: str, images: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = images / "train" / "cat" / "0.jpg"
    path.write_text("nothing to see")
    error = fails(capsys, "--data", images, "--model", tiny, "--output", output)
    assert error.startswith(f"{path} cannot be read: cannot identify image file")


def empty_class(images: Path) -> str:
    (images / "valid" / "eel").mkdir()
    (images / "valid" / "eel" / "notes.txt").touch()
    return f"{images / 'valid' / 'eel'}: this class folder has no images"


def no_split(images: Path) -> str:
    shutil.rmtree(images / "valid")
    return f"{images / 'valid'} is not a directory"


def no_class(images: Path) -> str:
    for name in ("cat", "dog"):
        shutil.rmtree(images / "train" / name)
    (images / "train" / ".hidden").mkdir()
    return f"{images / 'train'}: there are no class folders"


def other_classes(images: Path) -> str:
    (images / "valid" / "dog").rename(images / "valid" / "wolf")
    return f"{images / 'valid'} has no folder for what {images / 'train'} has: dog"


def no_json(images: Path) -> str:
    (images / "cat_to_name.json").write_text("{cat: 1}")
    return f"{images / 'cat_to_name.json'} cannot be read"


def wrong_json(images: Path) -> str:
    (images / "cat_to_name.json").write_text('{"cat": 1}')
    return f"{images / 'cat_to_name.json'} must be a JSON object"


def one_image(images: Path) -> str:
    for path in images.glob("train/*/[123].jpg"):
        path.unlink()
    shutil.rmtree(images / "train" / "dog")
    shutil.rmtree(images / "valid" / "dog")
    return f"{images / 'train'}: 1 process needs at least 2 images"


BAD = (empty_class, no_split, no_class, other_classes, no_json, wrong_json, one_image)


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__ for spoil in BAD])
def test_bad_data(images: Path, output: Path, capsys: pytest.CaptureFixture[str], spoil: Any) -> None:
    expected = spoil(images)
    assert fails(capsys, "--data", images, "--output", output).startswith(expected)
    # Found before anything is written.
    assert not output.exists()


def test_output_that_cannot_be_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    error = fails(capsys, "--data", images, "--output", tmp_path / "file" / "output")
    assert error.startswith(f"{tmp_path / 'file'}")


def test_names(images: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "cat_to_name.json").write_text(json.dumps({"dog": "Hund", "eel": "Aal"}))
    assert finetune_data.open_splits(images, 32).names == ["cat", "Hund"]
    given = tmp_path / "names.json"
    assert str(given) in fails(capsys, "--data", images, "--output", output, "--names", given)
    given.write_text(json.dumps({"cat": "Katze"}))
    assert finetune_data.open_splits(images, 32, cat_to_name=given).names == ["Katze", "dog"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--model", "inception_v3", "--image-size", "298"),
            "--image-size must be at least 299 for inception_v3",
        ),
        (("--batch-size", "1"), "--batch-size must be at least 2"),
        (("--epochs-head", "0", "--epochs-all", "0"), "nothing to train"),
        (("--lr", "nan"), "--lr must be a positive number"),
        (("--model", "vgg12"), "invalid choice"),
        (("--resume", "--overwrite"), "exclude each other"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], options: Sequence[str], text: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
