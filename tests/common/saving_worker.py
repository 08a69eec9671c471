"""Writes frozen models to a folder, or reads them there: in one process or one environment, and in another.

    python tests/common/saving_worker.py write FOLDER
    python tests/common/saving_worker.py read FOLDER [--exact]

Needs neither pytest nor an installed package. ``read`` compares each model's outputs with those where it was
written, to the bit with ``--exact``, and prints how its convolutions run.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a script: import the checkout that it lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pooling_ext
from pooling_ext.freezing.conv_allotment import convolutions

#: Of the largest output, where a model was written elsewhere.
NEAR = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 6e-3}


class Network(nn.Module):
    """Has each kind of layer that freeze makes, and some that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.same = nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(32), nn.MaxPool2d(2)
        self.mirror = nn.Conv2d(32, 8, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
        self.scale = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.PReLU(), nn.Linear(12, 5))
        self.register_buffer("shift", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.wide(self.stem(x))
        y = self.same(TF.hardswish(self.depthwise(x))) + x
        y = self.pool(TF.relu(self.norm(y + 1)))
        y = self.scale(self.up(self.mirror(y))) * self.shift[:, :, :1]
        return {"maps": y.permute(0, 2, 3, 1), "classes": self.head(y.mean((2, 3)))}


def network(seed: int = 0) -> Network:
    """With statistics and weights that matter, and sizes at which each kernel is chosen."""
    torch.manual_seed(seed)
    model = Network().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model


def example() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def write(folder: Path) -> None:
    model, x = network(), example()
    for dtype in NEAR:
        frozen = pooling_ext.freeze(model, x, dtype=dtype)
        frozen.save(folder / f"{str(dtype)[6:]}.pt")
        torch.save({"input": x, "outputs": frozen(x)}, folder / f"{str(dtype)[6:]}.values")


def read(folder: Path, exact: bool) -> None:
    for file in sorted(folder.glob("*.pt")):
        frozen, values = pooling_ext.load(file), torch.load(file.with_suffix(".values"))
        outputs = frozen(values["input"])
        assert outputs.keys() == values["outputs"].keys(), file
        for name, expected in values["outputs"].items():
            if exact:
                assert torch.equal(outputs[name], expected), (file, name)
                continue
            bar = NEAR[getattr(torch, file.stem)] * float(expected.abs().max())
            torch.testing.assert_close(outputs[name], expected, rtol=0, atol=bar)
        ways = [layer.way for layer in convolutions(frozen)]
        print(file.stem, *ways, f"({len(frozen.report.warnings)} warnings)")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task, where = sys.argv[1], Path(sys.argv[2])
        where.mkdir(parents=True, exist_ok=True)
        write(where) if task == "write" else read(where, "--exact" in sys.argv)
