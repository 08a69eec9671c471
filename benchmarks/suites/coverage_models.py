"""The models whose batch norms the suite "coverage" counts, of many libraries."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from . import model_zoo


@dataclass(frozen=True)
class CoverageCase:
    """A model of a library.

    Attributes:
        library: what has to be installed.
        make: gives the model.
        size: of an input, without the batch.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] = (3, 224, 224)

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model, and an input for it."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initializations that take long
            model = self.make()
        return model, torch.rand(1, *self.size)


#: timm's, by name; those with a size take no other.
_TIMM = """
    resnet18 resnet50 resnet50d resnetaa50 resnetblur50 resnext50_32x4d seresnet50 ecaresnet26t
    wide_resnet50_2 legacy_seresnet18 skresnet18 resnest14d res2net50_14w_8s resnetrs50 resnetv2_50
    gcresnet33ts resnet33ts densenet121 dla34 dla60_res2net dpn68 vgg11_bn inception_v3 inception_v4
    inception_resnet_v2 legacy_xception xception41 efficientnet_b0 efficientnet_es tf_efficientnet_b0
    tf_efficientnetv2_b0 mixnet_s mnasnet_small mobilenetv2_100 mobilenetv3_large_100
    mobilenetv4_conv_small mobilenetv4_hybrid_medium fbnetc_100 spnasnet_100 lcnet_050 hardcorenas_a
    ghostnet_100 rexnet_100 regnetx_002 regnety_002 regnetz_b16 repvgg_a0 mobileone_s0 repvit_m1
    repghostnet_100 hgnetv2_b0 ese_vovnet19b_dw cspresnet50 cspdarknet53 cs3darknet_s hrnet_w18_small
    selecsls42b tresnet_m coatnet_nano_rw_224 maxvit_nano_rw_256:256 mobilevit_s levit_128s
    efficientvit_b0 fastvit_t8 nextvit_small starnet_s1
"""


def _timm(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False)


def _smp(kind: str, encoder: str) -> nn.Module:
    library = importlib.import_module("segmentation_models_pytorch")
    return getattr(library, kind)(encoder, encoder_weights=None)


def _transformers(name: str, **config: Any) -> nn.Module:
    library = importlib.import_module("transformers")
    settings = getattr(library, f"{name}Config")(return_dict=False, **config)
    return getattr(library, f"{name}ForImageClassification")(settings)


def _monai(name: str, **arguments: Any) -> nn.Module:
    return getattr(importlib.import_module("monai.networks.nets"), name)(**arguments)


def _video(name: str) -> nn.Module:
    return importlib.import_module("torchvision.models").get_model(name, weights=None)


_ARCHITECTURES = [
    "Unet",
    "UnetPlusPlus",
    "FPN",
    "DeepLabV3Plus",
    "PAN",
    "Linknet",
    "MAnet",
    "UPerNet",
    "PSPNet",
]
_SMP = [(kind, "resnet18") for kind in _ARCHITECTURES]
_SMP += [("Unet", "mobilenet_v2"), ("Unet", "efficientnet-b0")]
_SMALL = {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 64], "depths": [2, 2, 2, 2]}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": _SMALL,
    "RegNet": {**_SMALL, "groups_width": 16},
    "EfficientNet": {},
    "MobileNetV1": {},
    "MobileNetV2": {},
}
_3D = {"spatial_dims": 3, "in_channels": 1}
_NORM = {"norm": "BATCH"}
_LEVELS = {"channels": (8, 16, 32), "strides": (2, 2)}
_MONAI: dict[str, dict[str, Any]] = {
    "UNet": {**_3D, **_NORM, "out_channels": 2, **_LEVELS, "num_res_units": 2},
    "BasicUNet": {**_3D, **_NORM, "out_channels": 2, "features": (8, 8, 16, 32, 32, 8)},
    "DynUNet": {
        **_3D,
        "out_channels": 2,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "norm_name": "BATCH",
        "res_block": True,
    },
    "SegResNet": {**_3D, **_NORM, "out_channels": 2},
    "VNet": {**_3D, "out_channels": 2},
    "AttentionUnet": {**_3D, "out_channels": 2, **_LEVELS},
    "HighResNet": {**_3D, "out_channels": 2},
    "DenseNet121": {**_3D, "out_channels": 2},
    "ResNetFeatures": {"model_name": "resnet10", "pretrained": False, "spatial_dims": 3, "in_channels": 1},
    "SEResNet50": {**_3D, "num_classes": 2},
    "EfficientNetBN": {**_3D, "model_name": "efficientnet-b0", "pretrained": False},
}


def cases() -> list[CoverageCase]:
    """Those whose libraries are installed."""
    found = [
        CoverageCase(
            "torchvision",
            case.name,
            lambda name=case.name: model_zoo.make(name, 1, "NCHW", 32)[0],
            (3, *[model_zoo.SIZES.get(case.name, model_zoo.SIZE)] * 2),
        )
        for case in model_zoo.FAMILIES
    ]
    found += [
        CoverageCase("torchvision", name, lambda name=name: _video(name), (3, 8, 64, 64))
        for name in ("r3d_18", "mc3_18", "r2plus1d_18")
    ]
    for entry in _TIMM.split():
        name, _, size = entry.partition(":")
        side = int(size or 224)
        found.append(CoverageCase("timm", name, lambda name=name: _timm(name), (3, side, side)))
    for kind, encoder in _SMP:
        make = lambda kind=kind, encoder=encoder: _smp(kind, encoder)  # noqa: E731
        found.append(CoverageCase("segmentation_models_pytorch", f"{kind} {encoder}", make, (3, 256, 256)))
    for name, config in _TRANSFORMERS.items():
        make = lambda name=name, config=config: _transformers(name, **config)  # noqa: E731
        found.append(CoverageCase("transformers", name, make))
    for name, arguments in _MONAI.items():
        make = lambda name=name, arguments=arguments: _monai(name, **arguments)  # noqa: E731
        found.append(CoverageCase("monai", name, make, (1, 64, 64, 64)))
    return [case for case in found if find_spec(case.library) is not None]
