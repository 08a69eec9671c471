"""Which backend a call takes, and why not the ones before it.

Backends are an ordered list. Each has a predicate that names the reason it cannot take a call, or
returns None when it can; the first that can, does. PyTorch's own operators ("aten") close the list
and take everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from . import _native, cuda, triton
from .errors import ArgumentError
from .exporting import are_known, is_exporting, is_recording, leaves_us, tracing_state
from .windows import Windows


class Call(NamedTuple):
    """What a backend may look at when it decides."""

    op: str
    device: torch.device
    dtype: torch.dtype
    layout: torch.layout
    tensor_type: type


@dataclass(frozen=True)
class Backend:
    """A set of kernels, and the reason it gives for not taking a call."""

    name: str
    why_not: Callable[[Call], str | None]


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)
_dtypes: dict[str, dict[str, frozenset[torch.dtype]]] = {"cpu": {}, "cuda": {}, "triton": {}}


def register(op: str, **dtypes: frozenset[torch.dtype]) -> None:
    """Declare for which dtypes the backends named have kernels of ``op``."""
    for backend, kinds in dtypes.items():
        _dtypes[backend][op] = kinds


def _not_ours(call: Call) -> str | None:
    if call.layout is not torch.strided:
        return f"the input's layout is {call.layout}, not torch.strided"
    if call.tensor_type not in PLAIN_TENSORS:
        return f"the input is a tensor subclass ({call.tensor_type.__name__})"
    return None


def _cpu_why_not(call: Call) -> str | None:
    if _native.module is None:
        return _native.why_not
    if call.device.type not in ("cpu", "meta"):
        return f"the input is on {call.device}"
    if call.dtype not in _dtypes["cpu"].get(call.op, ()):
        return f"{call.op} has no CPU kernel for {call.dtype}"
    return _not_ours(call)


def _on_a_gpu(call: Call, name: str) -> bool:
    """Whether the GPU backend ``name`` may take the call; on the CPU, where it stands in for it."""
    return call.device.type in ("cuda", "meta") or (call.device.type == "cpu" and _on_cpu == name)


def _cuda_why_not(call: Call) -> str | None:
    if not _on_a_gpu(call, "cuda"):
        return f"the input is on {call.device}"
    if (why_not := cuda.why_not()) is not None:
        return why_not
    if call.device.type == "cuda" and _gpus_why_not is not None:
        return _gpus_why_not
    if call.op in TRITON_FIRST and _forced is None and triton.why_not() is None:
        return "Triton's kernel is the faster one"
    if call.dtype not in _dtypes["cuda"].get(call.op, ()):
        return f"{call.op} has no CUDA kernel for {call.dtype}"
    return _not_ours(call)


def _triton_why_not(call: Call) -> str | None:
    if not _on_a_gpu(call, "triton"):
        return f"the input is on {call.device}"
    if (why_not := triton.why_not()) is not None:
        return why_not
    if call.dtype not in _dtypes["triton"].get(call.op, ()):
        return f"{call.op} has no Triton kernel for {call.dtype}"
    return _not_ours(call)


CPU = Backend("cpu", _cpu_why_not)
CUDA = Backend("cuda", _cuda_why_not)
TRITON = Backend("triton", _triton_why_not)
ATEN = Backend("aten", lambda call: None)
BACKENDS: tuple[Backend, ...] = (CPU, CUDA, TRITON, ATEN)
#: The operators of which Triton's kernels are to be taken where there are CUDA's too, because they were
#: measured to be faster. No measurement has been made.
TRITON_FIRST: frozenset[str] = frozenset()

#: Why the CUDA kernels cannot run on every GPU, as far as is known: nothing is before CUDA is initialised.
#: One GPU decides for all, since the dispatcher has one kernel of an operator for all of them.
_gpus_why_not: str | None = None
#: Triton's kernels on GPUs, of the operators that have no other or of which they are wanted.
_gpu_library: torch.library.Library | None = None
_triton_on_gpus: frozenset[str] = frozenset()
#: The kernels of a GPU backend in the CPU kernels' place, and that backend's name.
_cpu_library: torch.library.Library | None = None
_on_cpu: str | None = None
_forced: str | None = None
_decisions: dict[tuple, Backend] = {}  # by what `choose` looks at
_recorded: list[Decision] | None = None


@dataclass
class Decision:
    """The backend that one call took, with the reasons of those that did not."""

    op: str
    backend: str
    declined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.declined.items()])


@dataclass
class Explanation:
    """The result of :func:`pooling_ext.explain`: one :class:`Decision` for each operator call, in order."""

    decisions: list[Decision]

    @property
    def backend(self) -> str | None:
        """The backend of the call; None when there was none or they differ."""
        names = {decision.backend for decision in self.decisions}
        return names.pop() if len(names) == 1 else None

    def __str__(self) -> str:
        if not self.decisions:
            return "no pooling_ext operator was called"
        return "\n".join(str(decision) for decision in self.decisions)


def _decide(call: Call) -> tuple[Backend, dict[str, str]]:
    declined: dict[str, str] = {}
    for backend in BACKENDS:
        if _forced is not None and backend.name not in (_forced, "aten"):
            reason: str | None = f"backend {_forced!r} was asked for"
        else:
            reason = backend.why_not(call)
        if reason is None:
            return backend, declined
        declined[backend.name] = reason
    raise AssertionError("the last backend takes every call")


def choose(op: str, input: torch.Tensor) -> Backend:
    """Return the backend that takes ``op`` on ``input``."""
    # What is nearly always asked for has a key that takes less time to make.
    usual = type(input) is torch.Tensor and input.is_cpu
    key = (
        (op, input.dtype, input.layout)
        if usual
        else (op, input.device, input.dtype, input.layout, type(input))
    )
    if not is_compiling() and _recorded is None and tracing_state() is None:
        backend = _decisions.get(key)
        if backend is not None:
            return backend
    if leaves_us():
        return ATEN
    if is_exporting() and _forced is None and input.requires_grad and torch.is_grad_enabled():
        # Of an autograd Function the program would have the forward alone, and lose gradients silently.
        return ATEN
    backend, declined = _decide(Call(op, input.device, input.dtype, input.layout, type(input)))
    if is_compiling():
        return backend
    if _recorded is not None:
        _recorded.append(Decision(op, backend.name, declined))
    else:
        _decisions[key] = backend
    return backend


def choose_pool(op: str, input: torch.Tensor, windows: Windows) -> Backend:
    """:func:`choose` for a pooling operator over ``windows``."""
    backend = choose(op, input)
    # AOTInductor cannot hand our operators the empty list that tells adaptive windows. Those of one element,
    # in which most models end, PyTorch's operators do for every size; the others for sizes that are known.
    if is_recording() and windows.adaptive and backend is not ATEN:
        sizes = input.shape[-len(windows.output_size) :]
        if windows.is_global or are_known((*sizes, *windows.output_size)):
            return ATEN
    return backend


def recording() -> bool:
    """Whether :func:`explain` is at work."""
    return _recorded is not None


def record(op: str, name: str, declined: dict[str, str]) -> None:
    """Note for :func:`explain` what took ``op``, and why others did not."""
    if _recorded is not None:
        _recorded.append(Decision(op, name, declined))


def offers(backend: Backend, op: str, input: torch.Tensor) -> bool:
    """Whether ``backend`` can take ``op`` on ``input``, be it the one that is chosen or not."""
    if _forced not in (None, backend.name):
        return False
    return backend.why_not(Call(op, input.device, input.dtype, input.layout, type(input))) is None


def forced() -> str | None:
    """The backend that :func:`use_backend` asks for."""
    return _forced


def _check_name(name: str | None) -> None:
    names = [backend.name for backend in BACKENDS]
    if name is not None and name not in names:
        raise ArgumentError(f"backend must be one of {names}, but got {name!r}")


def _force(name: str | None) -> None:
    global _forced
    _check_name(name)
    _forced = name
    _decisions.clear()
    _wire_gpu()
    _wire_cpu()


def _cuda_on_gpus() -> bool:
    """Whether the CUDA kernels have registered themselves for GPUs."""
    return cuda.why_not() is None and not cuda.on_cpu()


def _look_at_gpus() -> None:
    """Give Triton what the CUDA kernels were to do, where there is a GPU that they cannot run on."""
    global _gpus_why_not
    _gpus_why_not = cuda.gpus_why_not()
    _decisions.clear()
    _wire_gpu()


def _wire_gpu() -> None:
    """Register Triton's kernels for GPUs, before the CUDA ones, which have registered themselves."""
    global _gpu_library, _triton_on_gpus
    cuda_has = cuda.OPERATORS if _cuda_on_gpus() and _gpus_why_not is None else frozenset()
    first = TRITON_FIRST if _forced is None and triton.why_not() is None else frozenset()
    wanted = frozenset(triton.MODULES) if _forced == "triton" else triton.MODULES.keys() - (cuda_has - first)
    if wanted == _triton_on_gpus:  # nearly always; registering takes a while
        return
    if _gpu_library is not None:
        _gpu_library._destroy()
    _gpu_library, _triton_on_gpus = torch.library.Library("pooling_ext", "IMPL"), frozenset(wanted)
    for op in sorted(wanted):
        triton.register(_gpu_library, "CUDA", op)


def _wire_cpu() -> None:
    """Put the kernels of a GPU backend in the CPU kernels' place where it is asked for and can run there."""
    global _cpu_library, _on_cpu
    wanted = None
    if (_forced == "triton" and triton.interpreted()) or (_forced == "cuda" and cuda.on_cpu()):
        wanted = _forced
    if wanted == _on_cpu:
        return
    if _cpu_library is not None:
        _cpu_library._destroy()
        _cpu_library = None
    _on_cpu = wanted
    if wanted is None:
        return
    _cpu_library = torch.library.Library("pooling_ext", "IMPL")
    for op, operators in triton.MODULES.items():
        if wanted == "triton":
            triton.register(_cpu_library, "CPU", op)
            continue
        for operator in operators if op in cuda.OPERATORS else ():
            _cpu_library.impl(operator, cuda.stand_in(operator), "CPU", allow_override=True)
    for operator in cuda.OWN if wanted == "cuda" else ():
        _cpu_library.impl(operator, cuda.stand_in(operator), "CPU")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use only the backend ``name``, or PyTorch's operators where it does not support a call.

    The choice holds for the whole process while the context lasts. ``POOLING_EXT_BACKEND`` in the
    environment sets it from the start.

    Args:
        name: "aten", "cpu", "cuda" or "triton" (which takes CPU tensors where ``TRITON_INTERPRET=1`` is set).

    Returns:
        A context manager.

    Raises:
        ArgumentError: there is no backend of that name.

    Example:
        >>> x = torch.randn(1, 8, 9, 9)
        >>> with pooling_ext.use_backend("aten"):
        ...     print(pooling_ext.explain(F.max_pool2d, x, 3).backend)
        aten
    """
    before = _forced
    _force(name)
    try:
        yield
    finally:
        _force(before)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` without gradients and say which backend each call in it takes.

    Args:
        function: a function or module of this library, or anything that calls them, such as a patched model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        An :class:`~pooling_ext.backends.Explanation`; print it to read it.

    Raises:
        Exception: whatever ``function`` raises.

    Example:
        >>> x = torch.zeros(1, 8, 9, 9, dtype=torch.complex64)
        >>> print(pooling_ext.explain(F.global_avg_pool2d, x))
        avg_pool: aten
          not cpu: avg_pool has no CPU kernel for torch.complex64
          not cuda: the input is on cpu
          not triton: the input is on cpu
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        with torch.no_grad():
            function(*args, **kwargs)
        return Explanation(_recorded)
    finally:
        _recorded = before


_force(os.environ.get("POOLING_EXT_BACKEND") or None)
if _cuda_on_gpus():
    # Importing this must not initialise CUDA: a process that has done so cannot fork.
    torch.cuda._lazy_call(_look_at_gpus)
