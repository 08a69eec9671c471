"""The errors and warnings that pooling_ext raises on its own behalf."""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """An argument has the right type but a value that is not allowed.

    The message names the argument, its value and what is allowed. It is a ValueError because that
    is what it is, and a RuntimeError because that is what PyTorch's operators raise for the same
    mistake: code written against ``torch.nn`` keeps catching it.

    Example:
        >>> F.max_pool2d(torch.zeros(1, 1, 4, 4), 0)
        Traceback (most recent call last):
        ...
        pooling_ext.errors.ArgumentError: kernel_size must be greater than zero, but got 0
    """


class NativeUnavailableWarning(UserWarning):
    """The compiled kernels are missing, so every call runs on PyTorch's own operators.

    It is given once, when the package is imported.

    Example:
        >>> issubclass(pooling_ext.NativeUnavailableWarning, UserWarning)
        True
    """
