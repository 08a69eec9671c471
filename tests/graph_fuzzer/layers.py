"""Constructors of layers, as source, with the shapes that they take and make."""

from __future__ import annotations

import random

from .grammar import Impossible, Layer, Program, Scope, Shape

_NORM_CLASS = '''\
class Norm(nn.BatchNorm2d):
    """Changes nothing."""
'''
_NORM_ACT_CLASS = """\
class NormAct(nn.BatchNorm2d):
    def forward(self, input):
        return F.relu(super().forward(input))
"""
_WRITTEN_OUT_CLASS = """\
class NormAct2d(nn.BatchNorm2d):
    def __init__(self, channels, act=None, drop=0.0):
        super().__init__(channels)
        self.drop = nn.Dropout2d(drop) if drop else nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        x = F.batch_norm(x, *statistics, self.training, self.momentum, self.eps)
        x = self.drop(x)
        return self.act(x)
"""
_CONV_CLASS = '''\
class Conv(nn.Conv2d):
    """Changes nothing."""
'''
_SCALED_CONV_CLASS = """\
class ScaledConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 0.5
"""
_FROZEN_CLASS = """\
class FrozenNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]
"""
_FROZEN_CLASS_RESHAPED = """\
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels, eps=1e-4):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        v = self.running_var.reshape(1, -1, 1, 1)
        m = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale)
"""
_FROZEN_CLASSES = {"FrozenNorm": _FROZEN_CLASS, "FrozenBatchNorm2d": _FROZEN_CLASS_RESHAPED}


def size(length: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    return (length + 2 * padding - kernel) // stride + 1


def convolution(program: Program, shape: Shape, channels: int | None = None, keep: bool = False) -> tuple:
    """The constructor of a convolution and the shape it makes; ``keep`` height and width."""
    rng = program.rng
    c, h, w = shape
    out = channels or rng.choice((4, 4, 6, 8))
    kinds = ["point", "plain", "plain", "depthwise", "grouped", "same", "dilated", "reflect"]
    if not keep and min(h, w) >= 4:
        kinds += ["strided", "strided", "valid"]
    if not keep and max(h, w) <= 8:
        kinds.append("transposed")
    if keep:
        kinds.append("transposed 3x3")
    kind = rng.choice(kinds)
    end = rng.choice(("", ", bias=False")) + ")"
    name = "nn.Conv2d"
    if rng.random() < 0.08 and "transposed" not in kind:
        name = rng.choice(
            (program.helper("Conv", _CONV_CLASS), program.helper("ScaledConv", _SCALED_CONV_CLASS))
        )
    if kind == "depthwise" and channels in (None, c):
        return f"{name}({c}, {c}, 3, padding=1, groups={c}{end}", shape
    if kind == "grouped" and c % 2 == out % 2 == 0:
        return f"{name}({c}, {out}, 3, padding=1, groups=2{end}", (out, h, w)
    if kind == "same":
        return f"{name}({c}, {out}, 3, padding='same'{end}", (out, h, w)
    if kind == "dilated":
        return f"{name}({c}, {out}, 3, padding=2, dilation=2{end}", (out, h, w)
    if kind == "reflect" and min(h, w) >= 2:
        return f"{name}({c}, {out}, 3, padding=1, padding_mode='reflect'{end}", (out, h, w)
    if kind == "strided":
        return f"{name}({c}, {out}, 3, stride=2, padding=1{end}", (out, size(h, 3, 2, 1), size(w, 3, 2, 1))
    if kind == "valid":
        return f"{name}({c}, {out}, 3{end}", (out, h - 2, w - 2)
    if kind == "transposed":
        return f"nn.ConvTranspose2d({c}, {out}, 2, stride=2{end}", (out, 2 * h, 2 * w)
    if kind == "transposed 3x3":
        return f"nn.ConvTranspose2d({c}, {out}, 3, padding=1{end}", (out, h, w)
    if kind == "point":
        return f"{name}({c}, {out}, 1{end}", (out, h, w)
    return f"{name}({c}, {out}, 3, padding=1{end}", (out, h, w)


def norm(program: Program, channels: int) -> str:
    rng = program.rng
    draw = rng.random()
    if draw < 0.68:
        return f"nn.BatchNorm2d({channels})"
    if draw < 0.84:
        options = ("affine=False", "momentum=None", "eps=0.01", "momentum=0.5")
        return f"nn.BatchNorm2d({channels}, {rng.choice(options)})"
    if draw < 0.89:
        return f"{program.helper('Norm', _NORM_CLASS)}({channels})"
    if draw < 0.91:
        return f"{program.helper('NormAct', _NORM_ACT_CLASS)}({channels})"
    if draw < 0.95:
        name = program.helper("NormAct2d", _WRITTEN_OUT_CLASS)
        act = rng.choice(
            ("", "", f", {activation(rng, rng.random() < 0.5)}", ", nn.Identity()", ", drop=0.25")
        )
        return f"{name}({channels}{act})"
    if draw < 0.98:
        name = rng.choice(tuple(_FROZEN_CLASSES))
        return f"{program.helper(name, _FROZEN_CLASSES[name])}({channels})"
    if draw < 0.99:
        program.tags.add("batch statistics")
        return f"nn.BatchNorm2d({channels}, track_running_stats=False)"
    return f"nn.GroupNorm(1, {channels})"


_ACTIVATIONS = {
    "nn.ReLU": "",
    "nn.ReLU6": "",
    "nn.SiLU": "",
    "nn.Hardswish": "",
    "nn.Hardsigmoid": "",
    "nn.LeakyReLU": "0.1",
    "nn.Hardtanh": "-0.5, 0.5",
    "nn.ELU": "",
    "nn.Mish": "",
}
_OUT_OF_PLACE = ("nn.GELU()", "nn.Sigmoid()", "nn.Tanh()", "nn.Softplus()", "nn.PReLU()")


def activation(rng: random.Random, in_place: bool) -> str:
    """The constructor of an activation."""
    if not in_place and rng.random() < 0.12:
        return rng.choice(_OUT_OF_PLACE)
    name = "nn.ReLU" if rng.random() < 0.65 else rng.choice(tuple(_ACTIVATIONS))
    arguments = ", ".join(filter(None, (_ACTIVATIONS[name], "inplace=True" if in_place else "")))
    return f"{name}({arguments})"


def nothing(rng: random.Random) -> str:
    """The constructor of what does nothing in eval mode."""
    always = ("nn.Identity()", "nn.Identity()", "nn.Identity()", "nn.Dropout(0.0)", "nn.Sequential()")
    return rng.choice((*always, "nn.Dropout(0.25)", "nn.Dropout2d(0.25)"))


def pool(rng: random.Random, shape: Shape) -> tuple[str, str, Shape]:
    """A pooling module, the function with the same arguments, and the shape it makes."""
    c, h, w = shape
    if rng.random() < 0.3:
        kind = rng.choice(("avg", "max"))
        out = rng.choice((1, 2, 3))
        return (
            f"nn.Adaptive{kind.title()}Pool2d({out})",
            f"F.adaptive_{kind}_pool2d({{}}, {out})",
            (c, out, out),
        )
    if min(h, w) < 3:
        raise Impossible
    kind = rng.choice(("Max", "Max", "Avg"))
    arguments, kernel, stride, padding = rng.choice(
        (("2", 2, 2, 0), ("3, 2, 1", 3, 2, 1), ("3, 1, 1", 3, 1, 1), ("3, stride=1, padding=1", 3, 1, 1))
    )
    made = (c, size(h, kernel, stride, padding), size(w, kernel, stride, padding))
    return f"nn.{kind}Pool2d({arguments})", f"F.{kind.lower()}_pool2d({{}}, {arguments})", made


def chain(
    program: Program, shape: Shape, in_place: bool, keep: bool = False
) -> tuple[list[str], Shape, bool]:
    """Constructors of layers that follow each other in a Sequential.

    Returns:
        the constructors, the shape that they make, and whether the first overwrites its input.
    """
    rng = program.rng
    layers: list[str] = []
    writes = False
    first_is_activation = rng.random() < 0.15
    if first_is_activation:
        writes = in_place and rng.random() < 0.5
        layers.append(activation(rng, writes))
    for _ in range(rng.choice((1, 1, 2))):
        conv, shape = convolution(program, shape, shape[0] if keep else None, keep)
        layers.append(conv)
        if rng.random() < 0.1:
            layers.append("nn.Identity()")
        if rng.random() < 0.85:
            layers.append(norm(program, shape[0]))
        if rng.random() < 0.15:
            layers.append(nothing(rng))
        if rng.random() < 0.7:
            layers.append(activation(rng, rng.random() < 0.4))
    return layers, shape, writes


def sequential(scope: Scope, shape: Shape, keep: bool = False) -> Layer:
    layers, made, writes = chain(scope.program, shape, True, keep)
    if scope.rng.random() < 0.2:
        layers = [f"nn.Sequential({', '.join(layers[:2])})", *layers[2:]]
    name = scope.member("seq", f"nn.Sequential({', '.join(layers)})")
    return Layer(f"self.{name}", shape, made, writes=writes, saves_output=True)
