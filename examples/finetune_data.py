"""The images that finetune.py trains on: an image folder checked before use, its transforms, the digits."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

#: Of ImageNet's training images, which the pretrained weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = ("train", "valid")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DataError(Exception):
    """Something about the images that the user can put right; names the file or the folder."""


def load_image(path: str) -> Image.Image:
    """The image at ``path`` in RGB, decoded whole.

    Each image is checked when it is needed: to decode all of a large set beforehand would cost an epoch.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def message(error: Exception) -> str:
    """What ``error`` says; a worker of a DataLoader puts its whole traceback before it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


class Images(ImageFolder):
    """The images of one split, sorted into a folder for each class.

    Args:
        root: has the class folders; hidden ones are ignored.
        transform: from a PIL image to what the model takes.
        limit: use only the first ``limit`` images of each class.

    Raises:
        DataError: there is no class folder, or one without images.
    """

    def __init__(self, root: Path, transform: Any = None, limit: int | None = None) -> None:
        super().__init__(str(root), transform, loader=load_image, allow_empty=True)
        counts = Counter(self.targets)
        for name, index in self.class_to_idx.items():
            if not counts[index]:
                kinds = " ".join(extension.lstrip(".") for extension in IMG_EXTENSIONS)
                raise DataError(f"{root / name}: this class folder has no images ({kinds})")
        if limit is not None:
            seen: Counter[int] = Counter()
            kept = []
            for path, target in self.samples:
                seen[target] += 1
                if seen[target] <= limit:
                    kept.append((path, target))
            self.samples = self.imgs = kept
            self.targets = [target for _, target in kept]

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        entries = os.scandir(directory)
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise DataError(f"{directory}: there are no class folders")
        return names, {name: index for index, name in enumerate(names)}


@dataclass(frozen=True)
class Splits:
    """Both splits, and what the classes are called, in the order of the model's outputs."""

    train: Images
    valid: Images
    classes: list[str]
    names: list[str]


def open_splits(
    folder: Path,
    image_size: int,
    *,
    cat_to_name: Path | None = None,
    digits: bool = False,
    flip: bool = True,
    limit: int | None = None,
) -> Splits:
    """Open ``folder``/train and ``folder``/valid.

    Raises:
        DataError: a folder is missing or empty, the classes of the two differ, or the names cannot be read.
    """
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise DataError(
                f"{folder / split} is not a directory: the images go into train/CLASS/ and valid/CLASS/"
            )
    transforms = make_transforms(image_size, digits=digits, flip=flip)
    train, valid = (
        Images(folder / split, transform, limit) for split, transform in zip(SPLITS, transforms, strict=True)
    )
    if train.classes != valid.classes:
        for one, other in ((train, valid), (valid, train)):
            odd = sorted(set(one.classes) - set(other.classes))
            if odd:
                raise DataError(f"{other.root} has no folder for what {one.root} has: {', '.join(odd)}")
    return Splits(train, valid, train.classes, read_names(folder, cat_to_name, train.classes))


def read_names(folder: Path, path: Path | None, classes: Sequence[str]) -> list[str]:
    """What ``path``, or ``folder``/cat_to_name.json, calls ``classes``; one not in it keeps its own name."""
    if path is None:
        path = folder / "cat_to_name.json"
        if not path.exists():
            return list(classes)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f'{path} must be a JSON object that names class folders: {{"21": "fire lily"}}')
    return [names.get(name, name) for name in classes]


def make_transforms(image_size: int, *, digits: bool, flip: bool) -> tuple[v2.Transform, v2.Transform]:
    """From a PIL image to ``(3, image_size, image_size)`` float32, for training and for validation."""
    if digits:
        # Little of a digit can be cut off before it is another one.
        crop = [v2.RandomResizedCrop(image_size, scale=(0.7, 1.0), ratio=(0.85, 1.18), antialias=True)]
        center = [v2.Resize((image_size, image_size), antialias=True)]
    else:
        crop = [v2.RandomResizedCrop(image_size, antialias=True)]
        center = [v2.Resize(round(image_size * 256 / 224), antialias=True), v2.CenterCrop(image_size)]
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([v2.ToImage(), *crop, *flips, *finish]), v2.Compose([v2.ToImage(), *center, *finish])


def displayed(image: Tensor) -> Tensor:
    """A normalized ``(3, H, W)`` image as ``(H, W, 3)`` in 0 to 1, for drawing."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's 1797 handwritten digits, 8x8 pixels, as an image folder, unless it is there."""
    if folder.is_dir():
        return folder
    digits: Any = load_digits()
    # Written aside and renamed, so that a folder that exists is whole.
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    split = partial(train_test_split, test_size=0.2, random_state=0, stratify=digits.target)
    for name, places in zip(SPLITS, split(range(len(digits.target))), strict=True):
        for place in places:
            path = partial_folder / name / str(digits.target[place]) / f"{place:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Values are 0 to 16.
            Image.fromarray((digits.images[place] * (255 / 16)).astype("uint8")).save(path)
    names = dict(zip(map(str, range(10)), DIGIT_NAMES, strict=True))
    (partial_folder / "cat_to_name.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    partial_folder.rename(folder)
    return folder
