"""The 3x3 convolutions, the depthwise ones and those of images in torchvision's models, and a few others."""

from __future__ import annotations

from typing import NamedTuple


class ConvShape(NamedTuple):
    """One layer: channels in and out, groups, side of its square input, padding on each side, and a model."""

    channels: int
    features: int
    groups: int
    side: int
    padding: int
    model: str

    @property
    def name(self) -> str:
        """Usable as a test id."""
        groups = f"-g{self.groups}" if self.groups > 1 else ""
        padding = "" if self.padding == 1 else f"-p{self.padding}"
        return f"{self.model}-{self.channels}-{self.features}{groups}-{self.side}{padding}"

    @property
    def output_side(self) -> int:
        return self.side + 2 * self.padding - 2

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return self.features, self.output_side, self.output_side

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.features, self.channels // self.groups, 3, 3

    def flops(self, batch: int) -> int:
        """Of the direct way, a multiplication and an addition as two."""
        return 18 * batch * self.output_side**2 * self.features * self.channels // self.groups


#: The 3x3 layers of stride 2 with 16 channels or more in a group, at 224 pixels: channels, features and side
#: of the input. Of ResNets, DLA-like and detection heads, RegNets, EfficientNetV2 and Inception.
STRIDED_LAYERS: tuple[tuple[int, int, int], ...] = (
    (64, 128, 56),
    (128, 256, 28),
    (256, 512, 14),
    (128, 128, 56),
    (256, 256, 28),
    (512, 512, 14),
    (24, 96, 112),
    (48, 192, 56),
    (32, 64, 112),
    (256, 256, 14),
    (288, 384, 35),
)

#: Layers of stride 1 of other kernels: channels, features, kernel, and size of the input. Of AlexNet,
#: GoogLeNet, Inception, and networks on sequences, which are images of one row.
OTHER_KERNELS: tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...] = (
    (16, 32, (5, 5), (28, 28)),
    (24, 64, (5, 5), (14, 14)),
    (48, 64, (5, 5), (35, 35)),
    (48, 128, (5, 5), (7, 7)),
    (64, 192, (5, 5), (27, 27)),
    (128, 128, (5, 5), (14, 14)),
    (256, 256, (5, 5), (14, 14)),
    (384, 384, (1, 3), (8, 8)),
    (448, 384, (1, 3), (8, 8)),
    (32, 32, (1, 3), (1, 4096)),
    (64, 64, (1, 3), (1, 1024)),
    (64, 64, (1, 3), (1, 16384)),
    (128, 128, (1, 3), (1, 512)),
    (256, 256, (1, 3), (1, 256)),
    (256, 512, (1, 3), (1, 1024)),
    (512, 512, (1, 3), (1, 128)),
    (128, 128, (1, 7), (17, 17)),
    (160, 192, (1, 7), (17, 17)),
    (192, 192, (1, 7), (17, 17)),
    (64, 64, (1, 7), (1, 1024)),
    (128, 128, (1, 7), (1, 4096)),
    (256, 256, (1, 7), (1, 256)),
    (512, 512, (1, 7), (1, 128)),
)

#: Every 3x3 layer of stride 1 at 224 pixels (inception_v3 at 299) whose groups have at least 16 channels each
#: way, each under the name of one model that has it.
TORCHVISION: tuple[ConvShape, ...] = (
    ConvShape(16, 32, 1, 28, 1, "googlenet"),
    ConvShape(16, 48, 1, 14, 1, "googlenet"),
    ConvShape(16, 64, 1, 54, 1, "squeezenet1_0"),
    ConvShape(16, 64, 1, 55, 1, "squeezenet1_1"),
    ConvShape(24, 24, 1, 112, 1, "efficientnet_v2_m"),
    ConvShape(24, 64, 1, 14, 1, "googlenet"),
    ConvShape(32, 32, 1, 112, 1, "efficientnet_v2_l"),
    ConvShape(32, 32, 1, 149, 0, "inception_v3"),
    ConvShape(32, 64, 1, 14, 1, "googlenet"),
    ConvShape(32, 64, 1, 147, 1, "inception_v3"),
    ConvShape(32, 96, 1, 28, 1, "googlenet"),
    ConvShape(32, 128, 1, 7, 1, "googlenet"),
    ConvShape(32, 128, 1, 14, 1, "googlenet"),
    ConvShape(32, 128, 1, 27, 1, "squeezenet1_0"),
    ConvShape(32, 128, 1, 54, 1, "squeezenet1_0"),
    ConvShape(48, 128, 1, 7, 1, "googlenet"),
    ConvShape(48, 192, 1, 13, 1, "squeezenet1_1"),
    ConvShape(48, 192, 1, 27, 1, "squeezenet1_0"),
    ConvShape(48, 192, 1, 56, 1, "efficientnet_v2_m"),
    ConvShape(64, 64, 1, 56, 1, "resnet101"),
    ConvShape(64, 64, 1, 224, 1, "vgg13"),
    ConvShape(64, 96, 1, 35, 1, "inception_v3"),
    ConvShape(64, 128, 1, 112, 1, "vgg11"),
    ConvShape(64, 192, 1, 56, 1, "googlenet"),
    ConvShape(64, 256, 1, 13, 1, "squeezenet1_0"),
    ConvShape(64, 256, 1, 27, 1, "squeezenet1_0"),
    ConvShape(64, 256, 1, 28, 1, "efficientnet_v2_s"),
    ConvShape(64, 256, 1, 56, 1, "efficientnet_v2_l"),
    ConvShape(80, 192, 1, 73, 0, "inception_v3"),
    ConvShape(80, 320, 1, 28, 1, "efficientnet_v2_m"),
    ConvShape(96, 96, 1, 35, 1, "inception_v3"),
    ConvShape(96, 128, 1, 28, 1, "googlenet"),
    ConvShape(96, 208, 1, 14, 1, "googlenet"),
    ConvShape(96, 384, 1, 28, 1, "efficientnet_v2_l"),
    ConvShape(112, 224, 1, 14, 1, "googlenet"),
    ConvShape(128, 32, 1, 7, 1, "densenet121"),
    ConvShape(128, 32, 1, 14, 1, "densenet121"),
    ConvShape(128, 32, 1, 28, 1, "densenet121"),
    ConvShape(128, 32, 1, 56, 1, "densenet121"),
    ConvShape(128, 128, 1, 28, 1, "resnet101"),
    ConvShape(128, 128, 1, 56, 1, "wide_resnet101_2"),
    ConvShape(128, 128, 1, 112, 1, "vgg13"),
    ConvShape(128, 192, 1, 28, 1, "googlenet"),
    ConvShape(128, 256, 1, 14, 1, "googlenet"),
    ConvShape(128, 256, 1, 56, 1, "vgg11"),
    ConvShape(144, 288, 1, 14, 1, "googlenet"),
    ConvShape(160, 320, 1, 7, 1, "googlenet"),
    ConvShape(160, 320, 1, 14, 1, "googlenet"),
    ConvShape(192, 48, 1, 7, 1, "densenet161"),
    ConvShape(192, 48, 1, 14, 1, "densenet161"),
    ConvShape(192, 48, 1, 28, 1, "densenet161"),
    ConvShape(192, 48, 1, 56, 1, "densenet161"),
    ConvShape(192, 384, 1, 7, 1, "googlenet"),
    ConvShape(192, 384, 1, 13, 1, "alexnet"),
    ConvShape(256, 256, 1, 13, 1, "alexnet"),
    ConvShape(256, 256, 1, 14, 1, "resnet101"),
    ConvShape(256, 256, 1, 28, 1, "wide_resnet101_2"),
    ConvShape(256, 256, 1, 56, 1, "vgg11"),
    ConvShape(256, 512, 1, 28, 1, "vgg11"),
    ConvShape(384, 256, 1, 13, 1, "alexnet"),
    ConvShape(448, 384, 1, 8, 1, "inception_v3"),
    ConvShape(512, 512, 1, 7, 1, "resnet101"),
    ConvShape(512, 512, 1, 14, 1, "vgg11"),
    ConvShape(512, 512, 1, 28, 1, "vgg11"),
    ConvShape(512, 512, 32, 14, 1, "resnext50_32x4d"),
    ConvShape(512, 512, 32, 28, 1, "resnext101_32x8d"),
    ConvShape(1024, 1024, 1, 7, 1, "wide_resnet101_2"),
    ConvShape(1024, 1024, 32, 7, 1, "resnext50_32x4d"),
    ConvShape(1024, 1024, 32, 14, 1, "resnext101_32x8d"),
    ConvShape(1024, 1024, 64, 14, 1, "resnext101_64x4d"),
    ConvShape(2048, 2048, 32, 7, 1, "resnext101_32x8d"),
    ConvShape(2048, 2048, 64, 7, 1, "resnext101_64x4d"),
    ConvShape(48, 48, 2, 56, 1, "regnet_y_1_6gf"),
    ConvShape(64, 64, 4, 28, 1, "regnet_x_400mf"),
    ConvShape(72, 72, 3, 56, 1, "regnet_x_1_6gf"),
    ConvShape(80, 80, 1, 56, 1, "regnet_x_8gf"),
    ConvShape(96, 96, 2, 56, 1, "regnet_x_3_2gf"),
    ConvShape(120, 120, 5, 28, 1, "regnet_y_1_6gf"),
    ConvShape(128, 128, 8, 28, 1, "regnet_x_800mf"),
    ConvShape(144, 144, 9, 28, 1, "regnet_y_800mf"),
    ConvShape(160, 160, 10, 14, 1, "regnet_x_400mf"),
    ConvShape(168, 168, 7, 28, 1, "regnet_x_1_6gf"),
    ConvShape(192, 192, 4, 28, 1, "regnet_x_3_2gf"),
    ConvShape(216, 216, 9, 28, 1, "regnet_y_3_2gf"),
    ConvShape(224, 224, 2, 56, 1, "regnet_y_16gf"),
    ConvShape(224, 224, 4, 56, 1, "regnet_y_8gf"),
    ConvShape(232, 232, 1, 56, 1, "regnet_y_32gf"),
    ConvShape(240, 240, 2, 28, 1, "regnet_x_8gf"),
    ConvShape(256, 256, 2, 56, 1, "regnet_x_16gf"),
    ConvShape(288, 288, 18, 14, 1, "regnet_x_800mf"),
    ConvShape(320, 320, 20, 14, 1, "regnet_y_800mf"),
    ConvShape(336, 336, 2, 56, 1, "regnet_x_32gf"),
    ConvShape(336, 336, 14, 14, 1, "regnet_y_1_6gf"),
    ConvShape(400, 400, 25, 7, 1, "regnet_x_400mf"),
    ConvShape(408, 408, 17, 14, 1, "regnet_x_1_6gf"),
    ConvShape(432, 432, 9, 14, 1, "regnet_x_3_2gf"),
    ConvShape(448, 448, 4, 28, 1, "regnet_y_16gf"),
    ConvShape(448, 448, 8, 28, 1, "regnet_y_8gf"),
    ConvShape(512, 512, 4, 28, 1, "regnet_x_16gf"),
    ConvShape(576, 576, 24, 14, 1, "regnet_y_3_2gf"),
    ConvShape(672, 672, 4, 28, 1, "regnet_x_32gf"),
    ConvShape(672, 672, 42, 7, 1, "regnet_x_800mf"),
    ConvShape(696, 696, 3, 28, 1, "regnet_y_32gf"),
    ConvShape(720, 720, 6, 14, 1, "regnet_x_8gf"),
    ConvShape(784, 784, 49, 7, 1, "regnet_y_800mf"),
    ConvShape(888, 888, 37, 7, 1, "regnet_y_1_6gf"),
    ConvShape(896, 896, 7, 14, 1, "regnet_x_16gf"),
    ConvShape(896, 896, 16, 14, 1, "regnet_y_8gf"),
    ConvShape(912, 912, 38, 7, 1, "regnet_x_1_6gf"),
    ConvShape(1008, 1008, 21, 7, 1, "regnet_x_3_2gf"),
    ConvShape(1232, 1232, 11, 14, 1, "regnet_y_16gf"),
    ConvShape(1344, 1344, 8, 14, 1, "regnet_x_32gf"),
    ConvShape(1392, 1392, 6, 14, 1, "regnet_y_32gf"),
)

#: The layers of ResNet and VGG.
RESNET: tuple[ConvShape, ...] = tuple(
    ConvShape(channels, channels, 1, side, 1, "resnet")
    for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
)
VGG: tuple[ConvShape, ...] = tuple(
    ConvShape(channels, channels, 1, side, 1, "vgg")
    for channels, side in ((64, 224), (64, 112), (128, 112), (256, 56), (512, 28), (512, 14))
)

#: Channels, kernel, stride and height of depthwise layers: those of torchvision's mobilenet_v2,
#: mobilenet_v3_small and _large, mnasnet1_0, efficientnet_b0, shufflenet_v2_x1_0 and convnext_tiny, for
#: images of 224 pixels.
DEPTHWISE_LAYERS: tuple[tuple[int, int, int, int], ...] = (
    *((channels, 3, 1, 112) for channels in (16, 32)),
    *((channels, 3, 2, 112) for channels in (16, 48, 64, 96)),
    *((channels, 3, 1, 56) for channels in (72, 144)),
    *((channels, 3, 2, 56) for channels in (24, 58, 72, 144)),
    *((channels, 3, 1, 28) for channels in (58, 88, 192)),
    *((channels, 3, 2, 28) for channels in (116, 192, 240)),
    *((channels, 3, 1, 14) for channels in (116, 184, 200, 384, 480, 576, 672)),
    *((channels, 3, 2, 14) for channels in (232, 576)),
    *((channels, 3, 1, 7) for channels in (232, 960, 1152)),
    *((channels, 5, 2, 56) for channels in (72, 144)),
    *((channels, 5, 1, 28) for channels in (120, 240)),
    *((channels, 5, 2, 28) for channels in (96, 240)),
    *((channels, 5, 1, 14) for channels in (120, 144, 240, 480, 672)),
    *((channels, 5, 2, 14) for channels in (288, 576, 672)),
    *((channels, 5, 1, 7) for channels in (576, 960, 1152)),
    (96, 7, 1, 56),
    (192, 7, 1, 28),
    (384, 7, 1, 14),
    (768, 7, 1, 7),
)

#: Channels, features and height of 1x1 layers: a choice of those of torchvision's models, for images of 224
#: pixels.
POINTWISE_LAYERS: tuple[tuple[int, int, int], ...] = (
    *((channels, features, 112) for channels, features in ((16, 96), (32, 16), (32, 64), (48, 24), (16, 64))),
    *(
        (channels, features, 56)
        for channels, features in ((24, 72), (24, 144), (96, 24), (144, 24), (64, 64))
    ),
    *((channels, features, 56) for channels, features in ((64, 256), (256, 64), (256, 128), (128, 64))),
    *((channels, features, 28) for channels, features in ((40, 120), (40, 240), (144, 40), (240, 40))),
    *((channels, features, 28) for channels, features in ((128, 512), (512, 128), (512, 256), (192, 96))),
    *((channels, features, 14) for channels, features in ((80, 480), (240, 80), (480, 80), (480, 112))),
    *((channels, features, 14) for channels, features in ((112, 672), (672, 112), (256, 1024), (1024, 256))),
    *((channels, features, 14) for channels, features in ((1024, 512), (384, 64), (96, 576), (512, 128))),
    *((channels, features, 7) for channels, features in ((192, 1152), (672, 192), (1152, 320), (320, 1280))),
    *((channels, features, 7) for channels, features in ((512, 2048), (2048, 512), (160, 960), (960, 160))),
    (464, 1024, 7),
    (832, 128, 7),
)

#: Channels, features, kernel, stride, padding and height of first layers: those of torchvision's models, and
#: of small images.
IMAGE_LAYERS: tuple[tuple[int, int, int, int, int, int], ...] = (
    (3, 64, 7, 2, 3, 224),
    (3, 64, 3, 1, 1, 224),
    (3, 16, 3, 2, 1, 224),
    (3, 24, 3, 2, 1, 224),
    (3, 32, 3, 2, 1, 224),
    (3, 32, 3, 2, 0, 299),
    (3, 64, 3, 2, 0, 224),
    (3, 96, 7, 2, 0, 224),
    (3, 64, 11, 4, 2, 224),
    (3, 96, 4, 4, 0, 224),
    (3, 768, 16, 16, 0, 224),
    (3, 16, 3, 1, 1, 32),
    (3, 64, 3, 1, 1, 32),
    (1, 32, 3, 1, 1, 28),
    (1, 6, 5, 1, 2, 28),
    (1, 64, 7, 2, 3, 224),
)
