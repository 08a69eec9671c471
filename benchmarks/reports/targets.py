"""What the suites set out to reach on two AVX-512 cores, as data, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import model_results as parts
from .model_results import COMPILED, EAGER, FROZEN, PATCHED, Models
from .results import BACKWARD, FORWARD, STEP, TRAINING, Results

STEM, STEM_AVG = "resnet-stem", "resnet-stem-avg"
#: Phases of a convolution, beside FORWARD.
INPUT_GRAD, WEIGHT_GRAD = "input gradient", "weight gradient"


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        what: the measured quantity, in words.
        goal: its bound.
        value: reads it from a suite's results; None when its cases were not part of the run.
        at_least: whether ``goal`` is a lower bound or an upper one.
    """

    what: str
    goal: float
    value: Callable[[Any], float | None]
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.goal if self.at_least else value <= self.goal

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.goal:g}x"


def _speedup(*cases: str, **wanted: str) -> Callable[[Results], float | None]:
    """The smallest speed-up among the rows selected."""
    return lambda results: min((row.speedup for row in results.select(*cases, **wanted)), default=None)


def _over_once(results: Results) -> float | None:
    """The largest time over that of reading the input and writing the output once."""
    rows = results.select(STEM, STEM_AVG, layout="NCHW", phase=FORWARD)
    return max((row.ours_ms / row.once_ms for row in rows if row.once_ms), default=None)


def _over_reading(results: Results) -> float | None:
    """The largest time of the ResNet stem's maximum over that of reading the input once."""
    rows = results.select(STEM, phase=FORWARD, dtype="float32")
    return max((row.ours_ms / row.read_ms for row in rows if row.read_ms), default=None)


def _saved(results: Results) -> float | None:
    rows = results.select(STEM, phase=TRAINING)
    return min(
        (row.torch_saved / row.ours_saved for row in rows if row.torch_saved and row.ours_saved), default=None
    )


def _overhead(results: Results) -> float | None:
    return max((overhead.ratio for overhead in results.overheads if not overhead.grad), default=None)


_NCHW32 = {"layout": "NCHW", "dtype": "float32"}
_NCHW16 = {"layout": "NCHW", "dtype": "bfloat16"}
_NHWC16 = {"layout": "NHWC", "dtype": "bfloat16"}
_GAPS = ("resnet-gap", "large-gap")

POOL: tuple[Target, ...] = (
    Target("ResNet stem max forward, NCHW float32", 30, _speedup(STEM, phase=FORWARD, **_NCHW32)),
    Target("ResNet stem max forward, NCHW bfloat16", 30, _speedup(STEM, phase=FORWARD, **_NCHW16)),
    Target("ResNet stem average forward, NCHW float32", 8, _speedup(STEM_AVG, phase=FORWARD, **_NCHW32)),
    Target("ResNet stem average forward, NCHW bfloat16", 8, _speedup(STEM_AVG, phase=FORWARD, **_NCHW16)),
    Target("ResNet stem average backward, NCHW float32", 4, _speedup(STEM_AVG, phase=BACKWARD, **_NCHW32)),
    Target("ResNet stem average backward, NCHW bfloat16", 4, _speedup(STEM_AVG, phase=BACKWARD, **_NCHW16)),
    Target("ResNet stem forward, time over reading and writing once, NCHW", 1.5, _over_once, at_least=False),
    Target("ResNet stem max forward, time over reading once, float32", 1.5, _over_reading, at_least=False),
    Target("average forward, NHWC bfloat16, slowest", 1, _speedup(op="avg_pool2d", phase=FORWARD, **_NHWC16)),
    Target("ResNet stem max forward, NHWC", 2, _speedup(STEM, phase=FORWARD, layout="NHWC")),
    Target("global average forward, NCHW bfloat16", 3, _speedup(*_GAPS, phase=FORWARD, **_NCHW16)),
    Target("global average forward, NCHW float32", 1, _speedup(*_GAPS, phase=FORWARD, **_NCHW32)),
    Target("geometric mean of the sweep", 4, lambda results: results.geometric_mean()),
    Target("slowest of the sweep", 0.95, _speedup()),
    Target("ResNet stem max, PyTorch's saved bytes over ours", 8, _saved),
    Target("no-grad call on a tiny tensor, time over PyTorch's", 3, _overhead, at_least=False),
)


def _peak(op: str) -> Callable[[Results], float | None]:
    """The largest share of PyTorch's peak memory that ours takes."""

    def value(results: Results) -> float | None:
        rows = results.select(op=op)
        return max(
            (row.ours_peak / row.torch_peak for row in rows if row.ours_peak and row.torch_peak), default=None
        )

    return value


_NORM, _STEM = "batch_norm_act", "batch_norm_relu_max_pool"
_PAIRS = [(dtype, layout) for layout in ("NHWC", "NCHW") for dtype in ("float32", "bfloat16")]

BLOCK: tuple[Target, ...] = (
    *(
        Target(
            f"batch norm (+ add) + ReLU, {STEP}, slowest of ResNet-50's shapes, {layout} {dtype}",
            {"NHWC": 2.0, "NCHW": 1.5}[layout],
            _speedup(op=_NORM, phase=STEP, dtype=dtype, layout=layout),
        )
        for dtype, layout in _PAIRS
    ),
    *(
        Target(
            f"stem's batch norm + ReLU + max pool, {STEP}, {layout} {dtype}",
            3,
            _speedup(op=_STEM, phase=STEP, dtype=dtype, layout=layout),
        )
        for dtype, layout in _PAIRS
    ),
    Target("stem's peak memory over PyTorch's", 0.5, _peak(_STEM), at_least=False),
)

_SMALL_PLANES = "resnet-512-512-7-b16"


def _conv(phase: str) -> Callable[[Results], float | None]:
    """The smallest speed-up among the layers of batch 16 whose planes are larger than 7x7."""
    return lambda results: min(
        (
            row.speedup
            for row in results.select(phase=phase, dtype="float32")
            if row.case.endswith("-b16") and row.case != _SMALL_PLANES
        ),
        default=None,
    )


CONV: tuple[Target, ...] = (
    Target("3x3 forward, batch 16, float32, slowest layer", 2.3, _conv(FORWARD)),
    Target("3x3 input gradient, slowest layer", 2.3, _conv(INPUT_GRAD)),
    Target("3x3 weight gradient, slowest layer", 2.0, _conv(WEIGHT_GRAD)),
    Target("3x3 forward, 7x7 planes", 1.7, _speedup(_SMALL_PLANES, phase=FORWARD, dtype="float32")),
)


def _training(theirs: str, model: str, **wanted: Any) -> Callable[[Models], float | None]:
    """The patched model's least speed-up over ``theirs``."""
    return lambda models: models.least(PATCHED, theirs, part=parts.TRAINING, model=model, batch=16, **wanted)


def _inference(theirs: str | None, model: str, **wanted: Any) -> Callable[[Models], float | None]:
    """A frozen model's least speed-up over ``theirs``, or over the best of the other engines."""
    return lambda models: models.least(FROZEN, theirs, part=parts.INFERENCE, model=model, **wanted)


def _live(models: Models) -> float | None:
    return max((ours.live / theirs.live for theirs, ours in models.memory_pairs()), default=None)


def _rss(models: Models) -> float | None:
    pairs = models.memory_pairs()
    return max((ours.rss / theirs.rss for theirs, ours in pairs if ours.rss and theirs.rss), default=None)


#: Training steps of batch 16: dtype and layout, and the goal of each model over eager in the same layout.
_STEPS = {
    ("float32", "NHWC"): {
        "resnet18": 1.8,
        "resnet50": 1.3,
        "vgg11_bn": 2.5,
        "mobilenet_v2": 1.25,
        "mobilenet_v3_large": 1.3,
        "efficientnet_b0": 1.35,
        "mnasnet1_0": 1.3,
    },
    ("bfloat16", "NHWC"): {
        "resnet18": 1.25,
        "resnet50": 1.12,
        "vgg11_bn": 1.3,
        "mobilenet_v2": 1.8,
        "mobilenet_v3_large": 2.1,
        "efficientnet_b0": 2.1,
        "mnasnet1_0": 2.2,
        "convnext_tiny": 1.2,
    },
    ("float32", "NCHW"): {
        "mobilenet_v2": 1.4,
        "mobilenet_v3_large": 1.8,
        "efficientnet_b0": 1.8,
        "mnasnet1_0": 1.8,
        "convnext_tiny": 1.15,
    },
}
#: Frozen models in float32: batch, and the goals over eager channels_last and over the best other engine.
_FROZEN: dict[str, dict[int, tuple[float | None, float]]] = {
    "resnet18": {16: (2.2, 1.9), 1: (None, 1.4)},
    "resnet50": {16: (1.6, 1.3), 1: (None, 1.15)},
    "vgg16": {8: (2.7, 2.5), 1: (None, 2.2)},
}


def _frozen_targets() -> Iterator[Target]:
    for model, batches in _FROZEN.items():
        for batch, (over_eager, over_best) in batches.items():
            what = f"{model} inference, frozen, float32, batch {batch}"
            wanted = {"dtype": "float32", "batch": batch}
            if over_eager is not None:
                yield Target(what, over_eager, _inference(EAGER, model, **wanted))
            yield Target(f"{what}, over the best other engine", over_best, _inference(None, model, **wanted))


MODEL: tuple[Target, ...] = (
    *(
        Target(
            f"{model} training step, patched, {dtype} {layout}",
            goal,
            _training(EAGER, model, dtype=dtype, layout=layout),
        )
        for (dtype, layout), goals in _STEPS.items()
        for model, goal in goals.items()
    ),
    *_frozen_targets(),
    Target("resnet50 training step, patched, over torch.compile", 1, _training(COMPILED, "resnet50")),
    Target("training step, live bytes over eager's", 1, _live, at_least=False),
    Target("training step, process's memory over eager's", 1, _rss, at_least=False),
    Target("resnet50 inference, frozen, bfloat16", 1.8, _inference(EAGER, "resnet50", dtype="bfloat16")),
    Target(
        "resnet50 inference, frozen, bfloat16, over the best other engine",
        1,
        _inference(None, "resnet50", dtype="bfloat16"),
    ),
    Target(
        "slowest patched model of torchvision's families",
        0.97,
        lambda models: models.least(PATCHED, EAGER, part=parts.FAMILIES),
    ),
)


def verdicts(targets: Sequence[Target], results: Any) -> list[tuple[Target, float, bool]]:
    """Each target that the run measured, with its value and whether it is met."""
    found = [(target, target.value(results)) for target in targets]
    return [(target, value, target.met(value)) for target, value in found if value is not None]
