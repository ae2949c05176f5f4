"""UniMatch V2's DPT head in PyTorch, written from its description: the reference of tests. Needs PyTorch.

Modules have the names of the original's state dicts.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Unit(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1, self.resConfUnit2 = Unit(features), Unit(features)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None, size) -> torch.Tensor:
        """`x` and `skip` have one size; the result has `size`."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = self.resConfUnit2(x)
        return self.out_conv(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


class DPTHead(nn.Module):
    """Maps four feature maps [B, width, h, w] to logits [B, classes, 8h, 8w]."""

    def __init__(self, width: int, features: int, channels: tuple[int, ...], classes: int):
        super().__init__()
        first, second, _, last = channels
        self.projects = nn.ModuleList(nn.Conv2d(width, each, 1) for each in channels)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(first, first, 4, stride=4), nn.ConvTranspose2d(second, second, 2, stride=2),
            nn.Identity(), nn.Conv2d(last, last, 3, stride=2, padding=1),
        ])  # fmt: skip
        self.scratch = nn.Module()
        for number, each in enumerate(channels, start=1):
            setattr(self.scratch, f"layer{number}_rn", nn.Conv2d(each, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{number}", Fusion(features))
        classify = [nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, classes, 1)]
        self.scratch.output_conv = nn.Sequential(*classify)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        layers = zip(self.projects, self.resize_layers, strict=True)
        maps = [resize(project(x)) for (project, resize), x in zip(layers, maps, strict=True)]
        skips = [getattr(self.scratch, f"layer{number}_rn")(x) for number, x in enumerate(maps, start=1)]
        path = self.scratch.refinenet4(skips[3], None, skips[2].shape[2:])
        path = self.scratch.refinenet3(path, skips[2], skips[1].shape[2:])
        path = self.scratch.refinenet2(path, skips[1], skips[0].shape[2:])
        height, width = skips[0].shape[2:]
        path = self.scratch.refinenet1(path, skips[0], (2 * height, 2 * width))
        return self.scratch.output_conv(path)
