"""examples/finetune.py from end to end on few images, in one process and in two."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from finetune_cases import EXAMPLES, QUICK, script, train
from helpers import NATIVE, run_python
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import finetune
import finetune_data
import finetune_model
import finetune_report
import finetune_training


def test_learns_digits(tiny: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", tiny, "--limit", "40", "--epochs-all", "3", "--output", str(output))
    assert finetune.main([*QUICK, *options, "--timing", "0.01"]) == 0
    printed = capsys.readouterr().out
    for text in ("tiny, initialized at random", "best validation accuracy", "training", "inference"):
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
    green, red = (colors.to_hex(color) for color in ("#2b8a3e", "#c92a2a"))
    shown = sorted((title.get_text(), colors.to_hex(title.get_color())) for title in titles)
    assert shown == [("dog", green)] * 4 + [("dog\nnot cat", red)] * 4


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
    images, targets = zip(*(splits.valid[position] for position in range(len(splits.valid))), strict=True)
    with torch.no_grad():
        loss, logits = finetune_model.loss_of(model.eval()(torch.stack(images)), torch.tensor(targets))
    assert last["history"][-1]["valid_loss"] == pytest.approx(loss.item(), rel=1e-3)
    right = (logits.argmax(1) == torch.tensor(targets)).double().mean().item()
    assert last["history"][-1]["valid_accuracy"] == pytest.approx(right)


SYNCHRONIZED = """
import copy, os, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {examples!r})
import pooling_ext
from finetune_model import synchronized
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

model, why = synchronized(copy.deepcopy(single), images[:2], patched=True)
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
    code = SYNCHRONIZED.format(examples=str(EXAMPLES), store=f"file://{tmp_path / 'store'}")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: run_python(code, RANK=str(rank)), range(2)))
    for result in results:
        assert result.returncode == 0, result.stderr
