"""Other inference engines, each in the settings that may be its best.

A baseline maps names of settings to calls. It is asked only when it can be imported: `pip install .[peers]`.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


class Case(NamedTuple):
    """What a baseline is to run: a channels_last model in eval mode, on one float32 input, in ``dtype``."""

    model: nn.Module
    x: Tensor
    dtype: torch.dtype
    threads: int
    autotune: bool


class Baseline(NamedTuple):
    """A rival engine: its name, the packages it needs, and what makes its settings."""

    name: str
    packages: tuple[str, ...]
    settings: Callable[[Case], dict[str, Call]]

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if find_spec(package) is None]


@contextmanager
def _quiet() -> Any:
    """Exporters print and warn a good deal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _torch_compile(case: Case) -> dict[str, Call]:
    import torch._inductor.config as inductor

    half = case.dtype != torch.float32
    modes = [None, "max-autotune-no-cudagraphs"] if case.autotune else [None]
    settings: dict[str, Call] = {}
    with inductor.patch(freezing=True), torch.no_grad(), _quiet():
        for mode in modes:
            torch._dynamo.reset()
            compiled = torch.compile(case.model, mode=mode)
            with torch.autocast("cpu", case.dtype, enabled=half):
                compiled(case.x)
                compiled(case.x)

            def call(compiled: Any = compiled) -> Tensor:
                with torch.no_grad(), torch.autocast("cpu", case.dtype, enabled=half):
                    return compiled(case.x)

            settings[f"freezing, {mode or 'default'}"] = call
    return settings


def _openvino(case: Case) -> dict[str, Call]:
    import openvino  # pyright: ignore[reportMissingImports]

    array = case.x.contiguous().numpy()
    with _quiet():
        graph = openvino.convert_model(case.model, example_input=case.x)
        graph.reshape(list(case.x.shape))
    hint = "bf16" if case.dtype == torch.bfloat16 else "f32"
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()

    def call() -> Tensor:
        (output,) = request.infer({0: array}, share_inputs=True, share_outputs=True).values()
        return torch.from_numpy(output)

    return {f"latency, one stream, {hint}": call}


def _onnxruntime(case: Case) -> dict[str, Call]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    if case.dtype != torch.float32:
        return {}  # its CPU convolutions have no kernels for other floating dtypes
    array = case.x.contiguous().numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with _quiet():
            torch.onnx.export(case.model, (case.x.contiguous(),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return {"all optimizations": lambda: torch.from_numpy(session.run(None, {name: array})[0])}


BASELINES = (
    Baseline("torch.compile", (), _torch_compile),
    Baseline("OpenVINO", ("openvino",), _openvino),
    Baseline("ONNX Runtime", ("onnxruntime", "onnx", "onnxscript"), _onnxruntime),
)
