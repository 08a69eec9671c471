"""examples/finetune.py: end to end on few images, its checkpoints, several processes, and bad data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import NATIVE, run_python
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import finetune_data  # noqa: E402
import finetune_model  # noqa: E402
import finetune_report  # noqa: E402
import finetune_training  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--no-pretrained", "--timing", "0", "--workers", "0", "--batch-size", "8")


class Tiny(nn.Module):
    """Has what resuming has to get right: BatchNorm's buffers, dropout, and pooling to patch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8 * 7 * 7, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.features(x).flatten(1)))


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
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test looks at the pictures, which take longer than training on a few images."""
    if request.function is not test_learns_digits:
        for name in ("draw_curves", "draw_predictions"):
            monkeypatch.setattr(finetune, name, lambda *_: None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four small images in both splits."""
    for split in ("train", "valid"):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for place in range(4):
                Image.new("RGB", (40, 36), (200 * index, 30 * place, 90)).save(folder / f"{place}.jpg")
    return tmp_path / "images"


def train(model: str, digits: Path, output: Path, epochs: int, *more: str) -> dict[str, Any]:
    options = (*QUICK, "--model", model, "--limit", "4", "--epochs-head", "1", "--epochs-all", str(epochs))
    status = finetune.main(
        ["--data", str(digits), "--no-flip", "--image-size", "32", *options, "--output", str(output), *more]
    )
    assert status == 0
    return finetune_training.load(output / "last.pt")


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(actual["model"][name], value), name
    for ours, theirs in zip(actual["history"], expected["history"], strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def script(*options: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*launcher, str(EXAMPLES / "finetune.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fails(capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """The one line that ``options`` end with."""
    assert finetune.main([*QUICK, "--image-size", "32", *map(str, options)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# --- end to end ----------------------------------------------------------------------------------


def test_learns_digits(tiny: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", tiny, "--limit", "40", "--epochs-all", "3", "--output", str(output))
    assert finetune.main([*QUICK, *options, "--timing", "0.01"]) == 0
    printed = capsys.readouterr().out
    for text in ("tiny, initialised at random", "best validation accuracy", "training", "inference"):
        assert text in printed
    for name in ("curves.png", "predictions.png"):
        with Image.open(output / name) as image:
            assert image.width > 1000
    last, best = (finetune_training.load(output / name) for name in ("last.pt", "best.pt"))
    assert [epoch["stage"] for epoch in last["history"]] == ["head", "all", "all", "all"]
    assert last["finished"]
    assert last["names"][3] == "three"
    accuracies = [epoch["valid_accuracy"] for epoch in last["history"]]
    assert best["history"][-1]["valid_accuracy"] == max(accuracies) > 0.7


@pytest.mark.parametrize(
    "options", [("--no-patch",), ("--bf16",), ("--no-channels-last",), ("--workers", "1")]
)
def test_options(tiny: str, digits: Path, output: Path, options: tuple[str, ...]) -> None:
    assert len(train(tiny, digits, output, 1, *options)["history"]) == 2


def test_other_proportions_and_flips(tiny: str, images: Path, output: Path) -> None:
    options = ("--model", tiny, "--data", str(images), "--output", str(output), "--image-size", "32")
    assert finetune.main([*QUICK, *options, "--epochs-head", "0", "--epochs-all", "1"]) == 0
    splits = finetune_data.open_splits(images, 32)
    image, target = splits.valid[7]
    assert image.shape == (3, 32, 32)
    assert target == 1
    torch.testing.assert_close(
        finetune_data.displayed(image)[16, 16], torch.tensor([200.0, 90.0, 90.0]) / 255, atol=0.02, rtol=0
    )


def test_titles_are_green_or_red(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))

    class Dogs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    options = finetune_training.Options({}, {}, 1, 2, 0, False, False, 0, False)
    splits = finetune_data.open_splits(images, 32)
    finetune_report.draw_predictions(tmp_path / "x.png", Dogs(), splits, options, torch.device("cpu"), "")
    titles = [axis.title for axis in drawn[0].axes if axis.images]
    assert len(titles) == 8
    green, red = (colors.to_hex(colour) for colour in ("#2b8a3e", "#c92a2a"))
    shown = sorted((title.get_text(), colors.to_hex(title.get_color())) for title in titles)
    assert shown == [("dog", green)] * 4 + [("dog\nnot cat", red)] * 4


# --- models and stages ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(finetune_model.ARCHITECTURES))
@pytest.mark.parametrize("stage", finetune_model.STAGES)
def test_heads(name: str, stage: str) -> None:
    with torch.device("meta"):
        model = finetune_model.make_model(name, 7)
        architecture = finetune_model.ARCHITECTURES[name]
        images = torch.empty(2, 3, architecture.least_size, architecture.least_size)
        trained = finetune_model.set_stage(model, name, stage)
        finetune_model.set_training(model, pretrained=False)
        loss, logits = finetune_model.loss_of(model(images), torch.empty(2, dtype=torch.int64))
    assert loss.shape == ()
    assert logits.shape == (2, 7)
    heads = [model.get_submodule(path) for path in architecture.heads]
    expected = (
        list(model.parameters()) if stage == "all" else [p for head in heads for p in head.parameters()]
    )
    assert {id(p) for p in trained} == {id(p) for p in expected}


def test_inception_trains_its_auxiliary_head() -> None:
    torch.manual_seed(0)
    model = finetune_model.make_model("inception_v3", 5)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    finetune_model.set_stage(model, "inception_v3", "head")
    finetune_model.set_training(model, pretrained=True)
    outputs = model(torch.randn(2, 3, 299, 299))
    targets = torch.tensor([0, 4])
    loss, _ = finetune_model.loss_of(outputs, targets)
    cross_entropy = nn.functional.cross_entropy
    expected = cross_entropy(outputs.logits, targets) + 0.4 * cross_entropy(outputs.aux_logits, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"fc.weight", "fc.bias", "AuxLogits.fc.weight", "AuxLogits.fc.bias"}
    # Frozen BatchNorm keeps its statistics.
    for name, value in model.named_buffers():
        assert torch.equal(value, statistics[name]), name
    model.eval()
    assert isinstance(model(torch.randn(1, 3, 299, 299)), torch.Tensor)


@pytest.mark.parametrize("pretrained", [False, True])
def test_only_the_second_stage_changes_pretrained_statistics(tiny: str, pretrained: bool) -> None:
    model = finetune_model.make_model(tiny, 3)
    for stage, training in (("head", not pretrained), ("all", True)):
        finetune_model.set_stage(model, tiny, stage)
        finetune_model.set_training(model, pretrained)
        assert model.training and model.get_submodule("fc").training
        assert model.get_submodule("features.1").training == training
        assert model.get_submodule("dropout").training == training


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Untraceable(Tiny):
    """Looks at its data, so that the patch cannot reach its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.bn(x) if x.sum() < torch.inf else x)


@pytest.mark.native
@pytest.mark.parametrize(("build", "patched"), [(Tiny, True), (Tiny, False), (Untraceable, True)])
def test_batch_norm_is_synchronised_where_it_can_be(group: None, build: Any, patched: bool) -> None:
    model, why = finetune_model.synchronised(build(), torch.randn(2, 3, 32, 32), patched)
    converted = type(model.get_submodule("features.1")) is nn.SyncBatchNorm
    assert converted == (build is Tiny and patched)
    assert (why is None) == converted


def test_nothing_to_synchronise() -> None:
    assert finetune_model.synchronised(nn.Linear(2, 2), torch.randn(2, 2), True)[1] is None


# --- checkpoints ---------------------------------------------------------------------------------


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


# --- several processes ---------------------------------------------------------------------------


def test_two_processes(digits: Path, output: Path) -> None:
    options = (*QUICK, "--data", str(digits), "--limit", "3", "--no-flip", "--image-size", "32")
    options += ("--epochs-head", "1", "--epochs-all", "1", "--output", str(output))
    process = script(*options, processes=2)
    printed, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "2 processes on cpu" in printed
    assert "SyncBatchNorm in 20 layers" in printed or not NATIVE
    assert printed.count("best validation accuracy") == 1
    last = finetune_training.load(output / "last.pt")
    assert [epoch["stage"] for epoch in last["history"]] == ["head", "all"]
    # What the processes measured together is what the saved model does on all images.
    model = finetune_model.make_model("resnet18", 10)
    model.load_state_dict(last["model"])
    splits = finetune_data.open_splits(digits, 32, digits=False, flip=False, limit=3)
    images, targets = zip(*(splits.valid[place] for place in range(len(splits.valid))), strict=True)
    with torch.no_grad():
        loss, logits = finetune_model.loss_of(model.eval()(torch.stack(images)), torch.tensor(targets))
    assert last["history"][-1]["valid_loss"] == pytest.approx(loss.item(), rel=1e-3)
    right = (logits.argmax(1) == torch.tensor(targets)).double().mean().item()
    assert last["history"][-1]["valid_accuracy"] == pytest.approx(right)


SYNCHRONISED = """
import copy, os, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {examples!r})
import pooling_ext
from finetune_model import synchronised
from finetune_training import as_batch_norm

rank = int(os.environ["RANK"])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method={store!r}, rank=rank, world_size=2)
torch.manual_seed(0)
layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(64, 2)
single = nn.Sequential(*layers).double()
# Each process's images have a mean of their own, so statistics of one of them alone would be wrong.
images = torch.randn(8, 3, 14, 14, dtype=torch.float64)
images[1::2] += 3

model, why = synchronised(copy.deepcopy(single), images[:2], patched=True)
assert why is None, why
pooling_ext.patch(model)
with as_batch_norm(model):
    parallel = DistributedDataParallel(model)
assert type(model[1]) is nn.SyncBatchNorm

def step(net, x):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()

step(parallel, images[rank::2])
step(single, images)
for name, value in single.state_dict().items():
    torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
torch.distributed.destroy_process_group()
"""


@pytest.mark.native
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """SyncBatchNorm and DistributedDataParallel: a step is that of one process with all images."""
    code = SYNCHRONISED.format(examples=str(EXAMPLES), store=f"file://{tmp_path / 'store'}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: run_python(code, RANK=str(rank)), range(2)))
    for result in results:
        assert result.returncode == 0, result.stderr


# --- bad data ------------------------------------------------------------------------------------


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
