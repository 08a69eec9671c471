"""A callback for Lightning's Trainer. This module alone needs lightning or pytorch_lightning."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .accelerating import AccelerateReport, accelerate


def _lightning() -> Any:
    """Lightning under the name that the program has imported, else that is installed."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    try:
        return importlib.import_module(names[0])
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
            raise
        return importlib.import_module(names[1])


_Callback: Any = _lightning().Callback


class Accelerate(_Callback):
    """Calls :func:`pooling_ext.accelerate` on the LightningModule, or a network in it, when ``fit`` starts.

    By then the model is on its device and the strategy has wrapped it. Without an example, and on several
    devices, the model is patched and nothing is measured. With an example it is measured in the Trainer's
    precision. It stays accelerated after ``fit``. Checkpoints are the same as without the callback.

    Args:
        example: see :func:`pooling_ext.accelerate`; it is moved to the device.
        network: dotted path of the module to accelerate, such as "model". "" is the LightningModule itself,
            whose forward then takes ``example``.

    Attributes:
        report: an :class:`AccelerateReport`; None before ``fit``.

    Example::

        from pooling_ext.lightning import Accelerate
        trainer = Trainer(callbacks=[Accelerate(example=torch.randn(16, 3, 224, 224))])
    """

    def __init__(self, example: Any = None, network: str = "") -> None:
        super().__init__()
        self.example, self.network = example, network
        self.report: AccelerateReport | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Accelerate the network, unless an earlier ``fit`` has.

        Raises:
            AttributeError: the LightningModule has no module ``network``.
            ArgumentError: the network does not run on ``example``.
        """
        network = pl_module.get_submodule(self.network)
        if "accelerate_report" not in vars(network):
            precision = trainer.precision_plugin
            example = precision.convert_input(trainer.strategy.batch_to_device(self.example))
            with precision.forward_context():
                accelerate(network, example)
        self.report = network.accelerate_report
