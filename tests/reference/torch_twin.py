"""The networks in PyTorch, written from docs/method.md and papers: the reference of tests and benchmarks.

Modules have the names of the original's state dicts. Needs PyTorch.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

LOW_LEVEL_CHANNELS = 48
XCEPTION_MOMENTUM = 3e-4
RESNET_STAGES = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, dilation: int = 1, **options) -> nn.Conv2d:
    """Returns a convolution with "same" padding, by default without bias."""
    padding = dilation * (kernel - 1) // 2
    options = {"bias": False, **options}
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, **options)


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, dilation=dilation), nn.BatchNorm2d(outputs), nn.ReLU())


def resize(x: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution; `average` pools before the projection of the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, project: bool, average: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if project and average is None:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, stride=stride), nn.BatchNorm2d(4 * width))
        elif project:
            self.downsample = nn.Sequential(average, conv(inputs, 4 * width), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + shortcut)


def average_pool(stage: int, stride: int) -> nn.Module:
    """Returns the pooling of timm's `downsample_avg` before the 1x1 convolution; with stride 1 it keeps the size."""
    if stage == 0:
        return nn.Identity()
    if stride == 2:
        return nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))


class ResNet(nn.Module):
    """ResNet of output stride 16 or 8: the last one or two stages are dilated instead of strided.

    Stems: `deep` (the original), `7x7` (torchvision), `deep_narrow` (timm's resnet50d). Shortcuts: `strided`, or
    `average` (timm's resnet50d).
    """

    channels = (256, 2048)

    def __init__(self, stages: tuple[int, ...], stem: str = "deep", shortcut: str = "strided", output_stride: int = 16):
        super().__init__()
        if stem == "7x7":
            self.conv1, inputs = conv(3, 64, 7, 2), 64
        else:
            first, inputs = {"deep": (64, 128), "deep_narrow": (32, 64)}[stem]
            self.conv1 = nn.Sequential(
                conv(3, first, 3, 2), nn.BatchNorm2d(first), nn.ReLU(),
                conv(first, first, 3), nn.BatchNorm2d(first), nn.ReLU(), conv(first, inputs, 3),
            )  # fmt: skip
        self.bn1 = nn.BatchNorm2d(inputs)
        strides = {16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}[output_stride]
        # (Of the first block, of the other blocks) per stage.
        dilations = {16: ((1, 1), (1, 1), (1, 1), (1, 2)), 8: ((1, 1), (1, 1), (1, 2), (2, 4))}[output_stride]
        for stage, blocks in enumerate(stages):
            width = 64 * 2**stage
            layers = []
            for block in range(blocks):
                stride = strides[stage] if block == 0 else 1
                average = average_pool(stage, stride) if shortcut == "average" else None
                layers.append(Bottleneck(inputs, width, stride, dilations[stage][block > 0], block == 0, average))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        c1 = self.layer1(x)
        return c1, self.layer4(self.layer3(self.layer2(c1)))


class SeparableConv(nn.Module):
    """3x3 depthwise and 1x1 pointwise convolution, each with batch norm; a ReLU before both, or after each."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1, relu_first: bool = True):
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, momentum=XCEPTION_MOMENTUM)
        self.depthwise, self.bn1 = conv(inputs, inputs, 3, stride, dilation, groups=inputs), norm(inputs)
        self.pointwise, self.bn2 = conv(inputs, outputs), norm(outputs)
        self.relu_first = relu_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.relu_first:
            return self.bn2(self.pointwise(self.bn1(self.depthwise(F.relu(x)))))
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class XceptionBlock(nn.Module):
    """Three separable convolutions; without a projection the shortcut is relu(input) (docs/method.md)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1, grow_first: bool = True):
        super().__init__()
        self.skip = None
        if inputs != outputs or stride != 1:
            self.skip = conv(inputs, outputs, stride=stride)
            self.skipbn = nn.BatchNorm2d(outputs, momentum=XCEPTION_MOMENTUM)
        first = outputs if grow_first else inputs
        self.sepconv1 = SeparableConv(inputs, first, dilation=dilation)
        self.sepconv2 = SeparableConv(first, outputs, dilation=dilation)
        self.sepconv3 = SeparableConv(outputs, outputs, stride, dilation)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, and that of the second convolution."""
        shortcut = F.relu(x) if self.skip is None else self.skipbn(self.skip(x))
        middle = self.sepconv2(self.sepconv1(x))
        return self.sepconv3(middle) + shortcut, middle


class Xception(nn.Module):
    """Aligned Xception-65 of output stride 16, or 8: block 3 is not strided, and later blocks are dilated."""

    channels = (256, 2048)

    def __init__(self, output_stride: int = 16):
        super().__init__()
        dilation = 16 // output_stride
        norm = functools.partial(nn.BatchNorm2d, momentum=XCEPTION_MOMENTUM)
        self.conv1, self.bn1 = conv(3, 32, 3, 2), norm(32)
        self.conv2, self.bn2 = conv(32, 64, 3), norm(64)
        self.block1, self.block2 = XceptionBlock(64, 128, 2), XceptionBlock(128, 256, 2)
        self.block3 = XceptionBlock(256, 728, 2 // dilation)
        for i in range(4, 20):
            setattr(self, f"block{i}", XceptionBlock(728, 728, dilation=dilation))
        self.block20 = XceptionBlock(728, 1024, dilation=dilation, grow_first=False)
        self.conv3 = SeparableConv(1024, 1536, dilation=dilation, relu_first=False)
        self.conv4 = SeparableConv(1536, 1536, dilation=dilation, relu_first=False)
        self.conv5 = SeparableConv(1536, 2048, dilation=dilation, relu_first=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x, _ = self.block1(x)
        x, c1 = self.block2(x)
        for i in range(3, 21):
            x, _ = getattr(self, f"block{i}")(x)
        return c1, self.conv5(self.conv4(self.conv3(x)))


class ImagePooling(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resize(self.gap(x), x.shape[2:])


class ASPP(nn.Module):
    def __init__(self, inputs: int, outputs: int = 256, dilations: tuple[int, ...] = (6, 12, 18)):
        super().__init__()
        self.b0 = conv_norm_relu(inputs, outputs)
        for i, dilation in enumerate(dilations, 1):
            setattr(self, f"b{i}", conv_norm_relu(inputs, outputs, 3, dilation))
        self.b4 = ImagePooling(inputs, outputs)
        self.project = conv_norm_relu(5 * outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(torch.cat([getattr(self, f"b{i}")(x) for i in range(5)], 1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (docs/method.md): images [B, 3, H, W] -> logits [B, K, H, W]."""

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        stem: str = "deep",
        shortcut: str = "strided",
        output_stride: int = 16,
    ):
        super().__init__()
        if backbone == "xception":
            self.backbone = Xception(output_stride)
        else:
            self.backbone = ResNet(RESNET_STAGES[backbone], stem, shortcut, output_stride)
        low, high = self.backbone.channels
        self.head = ASPP(high)
        self.reduce = conv_norm_relu(low, LOW_LEVEL_CHANNELS)
        self.fuse = nn.Sequential(*conv_norm_relu(256 + LOW_LEVEL_CHANNELS, 256, 3), *conv_norm_relu(256, 256, 3))
        self.classifier = conv(256, num_classes, bias=True)

    def forward(self, x: torch.Tensor, views: int = 0):
        """Returns logits, or with `views` > 0 a tuple: also those of `views` channel-dropout copies of the features."""
        c1, c4 = self.backbone(x)
        if not views:
            return self.decode(c1, c4, x.shape[2:])
        c1, c4 = (torch.cat([f, *(F.dropout2d(f, 0.5, self.training) for _ in range(views))]) for f in (c1, c4))
        return self.decode(c1, c4, x.shape[2:]).chunk(1 + views)

    def decode(self, c1: torch.Tensor, c4: torch.Tensor, size) -> torch.Tensor:
        c4 = resize(self.head(c4), c1.shape[2:])
        return resize(self.classifier(self.fuse(torch.cat([self.reduce(c1), c4], 1))), size)
