"""The registry: which backend a call takes, and why not the ones before it.

Backends are an ordered list. Each has a predicate that names the reason it cannot take a call, or
returns None when it can; the first that can, does. PyTorch's own operators ("aten") close the list
and take everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.compiler import is_compiling

from ..errors import ArgumentError
from ..exporting import are_known, is_exporting, is_recording, leaves_us, tracing_state
from ..windows import Windows
from . import cpu_library, cuda_library, triton_library
from .dispatcher import Slot
from .explanation import Decision
from .operators import Dtypes, Operator, operator


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


def _unsupported_tensor(call: Call) -> str | None:
    if call.layout is not torch.strided:
        return f"the input's layout is {call.layout}, not torch.strided"
    if call.tensor_type not in PLAIN_TENSORS:
        return f"the input is a tensor subclass ({call.tensor_type.__name__})"
    return None


class Registry:
    """The operators, the backends, and everything that decides between them.

    Attributes:
        operators: by name.
        backends: the ordered list.
        forced: the backend that :func:`use_backend` asks for.
    """

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self.cpu = Backend("cpu", self._cpu_why_not)
        self.cuda = Backend("cuda", self._cuda_why_not)
        self.triton = Backend("triton", self._triton_why_not)
        self.aten = Backend("aten", lambda call: None)
        self.backends = (self.cpu, self.cuda, self.triton, self.aten)
        self.forced: str | None = None
        self._recorded: list[Decision] | None = None
        self._decisions: dict[tuple, Backend] = {}  # by what `choose` looks at
        # Why the CUDA kernels cannot run on every GPU, as far as is known: nothing is before CUDA is
        # initialized. One GPU decides for all, since the dispatcher has one kernel of an operator for all.
        self._gpus_why_not: str | None = None
        self._on_gpus, self._on_cpu = Slot("CUDA"), Slot("CPU")
        self._stand_in: str | None = None  # the GPU backend that takes CPU tensors

    # --- operators -------------------------------------------------------------------------------

    def register(
        self,
        op: str,
        *,
        cpu: Dtypes | None = None,
        cuda: Dtypes | None = None,
        triton: Dtypes | None = None,
        kernels: tuple[str, ...] | None = None,
        cuda_kernels: tuple[str, ...] | None = None,
        triton_module: str | None = None,
        triton_first: bool = False,
    ) -> None:
        """Declare an operator, beside its definition.

        Args:
            op: its name.
            cpu, cuda, triton: the dtypes of the input for which that backend has kernels; None for none.
            kernels: the low-level operators (``torch.ops.pooling_ext``) that belong to it; ``op`` by default.
            cuda_kernels: CUDA's, where they are operators of their own beside Triton's.
            triton_module: of Triton's kernels, as ``pooling_ext.triton.pool.max_pool``; imported when one is
                first called.
            triton_first: Triton's kernels were measured to be faster than CUDA's, so they are preferred.

        Raises:
            ArgumentError: there is an operator of that name, or no module for Triton's kernels.
        """
        if op in self.operators:
            raise ArgumentError(f"op must be the name of a new operator, but {op!r} is registered")
        if triton is not None and triton_module is None:
            raise ArgumentError(f"triton_module must name the module of {op}'s Triton kernels")
        self.operators[op] = operator(
            op,
            cpu=cpu,
            cuda=cuda,
            triton=triton,
            kernels=kernels,
            cuda_kernels=cuda_kernels,
            triton_module=triton_module,
            triton_first=triton_first,
        )
        self._decisions.clear()
        self._dispatch()

    def _kernels(self, backend: str) -> dict[str, Callable[..., Any]]:
        """The kernels of a GPU backend as Python calls them, by the low-level operator."""
        return {
            name: triton_library.Kernel(op.triton_module, name)
            if backend == "triton"
            else cuda_library.StandIn(name)
            for op in self.operators.values()
            for name in op.kernels.get(backend, ())
        }

    # --- the dispatcher --------------------------------------------------------------------------

    def force(self, backend: str | None) -> None:
        """Take ``backend`` alone, or PyTorch's operators; with None whichever is first in the list."""
        names = [known.name for known in self.backends]
        if backend is not None and backend not in names:
            raise ArgumentError(f"backend must be one of {names}, but got {backend!r}")
        self.forced = backend
        self._decisions.clear()
        self._dispatch()

    def look_at_gpus(self) -> None:
        """Give Triton the CUDA kernels' work, where there is a GPU that they cannot run on."""
        self._gpus_why_not = cuda_library.gpus_why_not()
        self._decisions.clear()
        self._dispatch()

    def _dispatch(self) -> None:
        """Have the dispatcher call the kernels of the backends that are chosen."""
        # The CUDA kernels have registered themselves for GPUs; Triton's go before them where they are wanted.
        replaced = set() if self.forced == "triton" else self._cuda_on_gpus()
        on_gpus = self._kernels("triton")
        self._on_gpus.hold({name: kernel for name, kernel in on_gpus.items() if name not in replaced})
        self._stand_in = None
        if self.forced == "triton" and triton_library.interpreted():
            self._stand_in = "triton"
        if self.forced == "cuda" and cuda_library.on_cpu():
            self._stand_in = "cuda"
        self._on_cpu.hold(self._kernels(self._stand_in) if self._stand_in else {})

    def _cuda_on_gpus(self) -> set[str]:
        """The low-level operators for which the CUDA kernels are called on a GPU."""
        if not registers_itself() or self._gpus_why_not is not None:
            return set()
        return {
            name
            for op in self.operators.values()
            if not self._prefers_triton(op)
            for name in op.kernels.get("cuda", ())
        }

    def _prefers_triton(self, op: Operator) -> bool:
        return op.triton_first and self.forced is None and triton_library.why_not() is None

    # --- the backends ----------------------------------------------------------------------------

    def _unsupported(self, call: Call, backend: str, title: str) -> str | None:
        op = self.operators.get(call.op)
        if op is None or call.dtype not in op.dtypes.get(backend, ()):
            return f"{call.op} has no {title} kernel for {call.dtype}"
        return _unsupported_tensor(call)

    def _is_elsewhere(self, call: Call, backend: str) -> bool:
        """Whether the tensors are not on a GPU, nor on a CPU where the GPU backend stands in for it."""
        if call.device.type == "cpu":
            return self._stand_in != backend
        return call.device.type not in ("cuda", "meta")

    def _cpu_why_not(self, call: Call) -> str | None:
        if cpu_library.module is None:
            return cpu_library.why_not
        if call.device.type not in ("cpu", "meta"):
            return f"the input is on {call.device}"
        return self._unsupported(call, "cpu", "CPU")

    def _cuda_why_not(self, call: Call) -> str | None:
        if self._is_elsewhere(call, "cuda"):
            return f"the input is on {call.device}"
        if (why_not := cuda_library.why_not()) is not None:
            return why_not
        if call.device.type == "cuda" and self._gpus_why_not is not None:
            return self._gpus_why_not
        op = self.operators.get(call.op)
        if op is not None and self._prefers_triton(op):
            return "Triton's kernel is the faster one"
        return self._unsupported(call, "cuda", "CUDA")

    def _triton_why_not(self, call: Call) -> str | None:
        if self._is_elsewhere(call, "triton"):
            return f"the input is on {call.device}"
        if (why_not := triton_library.why_not()) is not None:
            return why_not
        return self._unsupported(call, "triton", "Triton")

    # --- calls -----------------------------------------------------------------------------------

    def choose(self, op: str, input: torch.Tensor) -> Backend:
        """Return the backend that takes ``op`` on ``input``."""
        # What is nearly always asked for has a key that takes less time to make.
        usual = type(input) is torch.Tensor and input.is_cpu
        key = (
            (op, input.dtype, input.layout)
            if usual
            else (op, input.device, input.dtype, input.layout, type(input))
        )
        if not is_compiling() and self._recorded is None and tracing_state() is None:
            backend = self._decisions.get(key)
            if backend is not None:
                return backend
        if leaves_us():
            return self.aten
        if is_exporting() and self.forced is None and input.requires_grad and torch.is_grad_enabled():
            # Of an autograd Function the program would have the forward alone, and lose gradients silently.
            return self.aten
        backend, declined = self._decide(Call(op, input.device, input.dtype, input.layout, type(input)))
        if is_compiling():
            return backend
        if self._recorded is not None:
            self._recorded.append(Decision(op, backend.name, declined))
        else:
            self._decisions[key] = backend
        return backend

    def choose_pool(self, op: str, input: torch.Tensor, windows: Windows) -> Backend:
        """:meth:`choose` for a pooling operator over ``windows``."""
        backend = self.choose(op, input)
        # AOTInductor cannot hand our operators the empty list that tells adaptive windows. Those of one
        # element, in which most models end, PyTorch's operators do for every size; the others for sizes that
        # are known.
        if is_recording() and windows.adaptive and backend is not self.aten:
            sizes = input.shape[-len(windows.output_size) :]
            if windows.is_global or are_known((*sizes, *windows.output_size)):
                return self.aten
        return backend

    def _decide(self, call: Call) -> tuple[Backend, dict[str, str]]:
        declined: dict[str, str] = {}
        for backend in self.backends:
            if self.forced is not None and backend.name not in (self.forced, "aten"):
                reason: str | None = f"backend {self.forced!r} was asked for"
            else:
                reason = backend.why_not(call)
            if reason is None:
                return backend, declined
            declined[backend.name] = reason
        raise AssertionError("the last backend takes every call")

    def offers(self, backend: Backend, op: str, input: torch.Tensor) -> bool:
        """Whether ``backend`` can take ``op`` on ``input``, be it the one that is chosen or not."""
        if self.forced not in (None, backend.name):
            return False
        return backend.why_not(Call(op, input.device, input.dtype, input.layout, type(input))) is None

    # --- explain ---------------------------------------------------------------------------------

    @contextmanager
    def recorded(self) -> Iterator[list[Decision]]:
        """Collect the decisions that are made."""
        before, self._recorded = self._recorded, []
        try:
            yield self._recorded
        finally:
            self._recorded = before

    def recording(self) -> bool:
        """Whether :func:`explain` is at work."""
        return self._recorded is not None

    def record(self, op: str, name: str, declined: dict[str, str]) -> None:
        """Note for :func:`explain` what took ``op``, and why others did not."""
        if self._recorded is not None:
            self._recorded.append(Decision(op, name, declined))


def registers_itself() -> bool:
    """Whether the CUDA kernels have registered themselves for GPUs."""
    return cuda_library.why_not() is None and not cuda_library.on_cpu()


REGISTRY = Registry()
REGISTRY.force(os.environ.get("POOLING_EXT_BACKEND") or None)
if registers_itself():
    # Importing this must not initialize CUDA: a process that has done so cannot fork.
    torch.cuda._lazy_call(REGISTRY.look_at_gpus)
