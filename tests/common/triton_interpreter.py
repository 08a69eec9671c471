"""Triton's interpreter as the tests want it: it rounds as a GPU does, and leaves out what it does in vain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pooling_ext.backends import triton_library


@pytest.fixture(autouse=True, scope="session")
def triton_interpreter() -> Iterator[None]:
    if find_spec("triton") is None or not triton_library.interpreted():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        round_to_nearest(patch)
        leave_out_overflows(patch)
        replace_builtins_once(patch)
        yield


def round_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off the bits that bfloat16 has not; on a GPU they are rounded."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, dtype):
        kinds = (source.dtype.scalar, dtype.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view("uint16"), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            exact = torch.tensor(source.data.view("int16")).view(torch.bfloat16).float().numpy()
            return TensorHandle(exact, tl.float32)
        return cast(self, source, dtype)

    patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)


def leave_out_overflows(patch: pytest.MonkeyPatch) -> None:
    """For each sum and product of integers it computes another in 64 bits, and compares.

    What comes of that is asserted by ``device_assert`` alone, which asserts nothing where ``debug`` is off.
    """
    from triton.runtime.interpreter import interpreter_builder

    assert not interpreter_builder.options.debug
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter_builder, "options", options)


def replace_builtins_once(patch: pytest.MonkeyPatch) -> None:
    """It puts functions of its own in the place of the language's for a kernel, and again wherever that calls
    another function, which takes longer than the call."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace_builtins = interpreter._patch_lang  # pyright: ignore[reportPrivateUsage]

    def where_needed(fn: Any) -> Any:
        languages = [one for one in (tl, tl.core) if any(one is value for value in fn.__globals__.values())]
        # Those of tensors are put back after each kernel, and with them all that a kernel replaced.
        samples = [tl.tensor.__add__, *(language.load for language in languages)]
        if any(map(tl.core.is_builtin, samples)):
            return replace_builtins(fn)
        return SimpleNamespace(restore=lambda: None)

    patch.setattr(interpreter, "_patch_lang", where_needed)
