"""The nets of the speed benchmarks in plain PyTorch, as a peer.

They are written as a PyTorch user would write them: channels first, modules of
`torch.nn`, `grid_sample` for the retina. Each has as many weights as ours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5)


class Standardize(nn.Module):
    """Subtracts the mean colour and divides by the standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", _MEAN), ("std", _STD)):
            row = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, row, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Basic(nn.Module):
    """A residual block of version 1 with biases."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, 1)
        self.norm1 = _norm(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1)
        self.norm2 = _norm(filters)
        self.project: nn.Module = nn.Identity()
        if stride != 1 or inputs != filters:
            self.project = nn.Sequential(
                nn.Conv2d(inputs, filters, 1, stride), _norm(filters)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.project(x)
        x = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """A residual block of version 2 with three convolutions."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, filters, 1, bias=False)
        self.norm2 = _norm(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, stride, 1, bias=False)
        self.norm3 = _norm(filters)
        self.conv3 = nn.Conv2d(filters, 4 * filters, 1, bias=False)
        self.project: nn.Module | None = None
        if stride != 1 or inputs != 4 * filters:
            self.project = nn.Conv2d(inputs, 4 * filters, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = functional.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(active)
        x = self.conv1(active)
        x = self.conv2(functional.relu(self.norm2(x)))
        x = self.conv3(functional.relu(self.norm3(x)))
        return x + shortcut


def _stages(
    block: type,
    inputs: int,
    filters: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    factor: int = 1,
) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for count, depth, first in zip(filters, depths, strides, strict=True):
        for index in range(depth):
            blocks.append(block(inputs, count, 1 if index else first))
            inputs = factor * count
    return blocks


def _pooled() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def resnet20() -> nn.Sequential:
    """ResNet-20 for 32 pixels, without its last layer."""
    blocks = _stages(Basic, 16, (16, 32, 64), (3, 3, 3), (1, 2, 2))
    stem = [nn.Conv2d(3, 16, 3, 1, 1), _norm(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, *_pooled())


def resnet18() -> nn.Sequential:
    """ResNet-18 for photographs, without its last layer."""
    blocks = _stages(Basic, 64, (64, 128, 256, 512), (2,) * 4, (1, 2, 2, 2))
    stem = [nn.Conv2d(3, 64, 7, 2, 3), _norm(64), nn.ReLU()]
    pool = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, pool, *blocks, *_pooled())


def resnet50_map(strides: Sequence[int]) -> nn.Sequential:
    """ResNet-50 V2 to its last map."""
    filters, depths = (64, 128, 256, 512), (3, 4, 6, 3)
    blocks = _stages(Bottleneck, 64, filters, depths, strides, 4)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, _norm(2048), nn.ReLU())


class MultiGaze(nn.Module):
    """Five retinal glimpses at learned gazes, a ResNet-18 for each."""

    def __init__(self, size: int, num_classes: int, count: int = 5) -> None:
        super().__init__()
        from saccade.models import attention

        from glimpse import retina_mapping

        self.standardize = Standardize()
        self.localize, self.head = resnet18(), nn.Linear(512, 2 * count)
        nn.init.zeros_(self.head.weight)
        start = torch.tensor(attention.spread_fixations(count)).flatten()
        self.head.bias.data.copy_(start)
        self.branches = nn.ModuleList(resnet18() for _ in range(count))
        self.logits = nn.Linear(512 * count, num_classes)
        # Pixels of the view as offsets from the gaze, in halves of the image.
        p0, p1 = retina_mapping(size, size)
        line = np.arange(size) - (size - 1) / 2
        offset = np.stack(np.meshgrid(line, line), axis=-1)
        radius = np.linalg.norm(offset, axis=-1, keepdims=True)
        offset = offset * (p0 * radius + p1) / (size / 2)
        grid = torch.tensor(offset, dtype=torch.float32)
        self.register_buffer("grid", grid, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.localize(self.standardize(images))
        gazes = torch.tanh(self.head(features).float()).view(len(images), -1, 2)
        with torch.autocast(images.device.type, enabled=False):
            views = [
                functional.grid_sample(
                    images.float(),
                    self.grid + gaze.flip(-1)[:, None, None],
                    align_corners=False,
                )
                for gaze in gazes.unbind(1)
            ]
        found = [
            branch(self.standardize(view))
            for branch, view in zip(self.branches, views, strict=True)
        ]
        return self.logits(torch.cat(found, dim=-1))


class S3TA(nn.Module):
    """Sequential soft attention on the map of a vision net."""

    def __init__(
        self,
        vision: nn.Module,
        channels: int,
        side: int,
        num_classes: int,
        steps: int,
        keys: int = 32,
        heads: int = 4,
        units: int = 1024,
    ) -> None:
        super().__init__()
        from saccade.models import attention

        self.standardize, self.vision = Standardize(), vision
        self.steps, self.keys, self.heads = steps, keys, heads
        basis = attention.spatial_basis(side, side).reshape(side * side, -1)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        query = keys + basis.shape[-1]
        inputs = heads * (channels - keys + basis.shape[-1] + query)
        self.cell = nn.LSTMCell(inputs, units)
        # One bias, as in Keras.
        self.cell.bias_hh.requires_grad_(False)
        self.initial = nn.Parameter(0.1 * torch.randn(2, units))
        self.query = nn.Sequential(
            nn.Linear(units + num_classes, units),
            nn.ReLU(),
            nn.Linear(units, heads * query),
        )
        self.output = nn.Sequential(
            nn.Linear(units, units), nn.ReLU(), nn.Linear(units, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.vision(self.standardize(images))
        count = len(images)
        features = features.flatten(2).transpose(1, 2)
        keys = features[..., : self.keys].transpose(1, 2)
        values = features[..., self.keys :]
        basis = self.basis.to(features.dtype)
        hidden, carry = (row.expand(count, -1) for row in self.initial)
        logits = hidden.new_zeros(count, self.output[-1].out_features)
        for _ in range(self.steps):
            queries = self.query(torch.cat([hidden, logits.to(hidden)], -1))
            queries = queries.view(count, self.heads, -1)
            products = queries[..., : self.keys] @ keys
            products = products + queries[..., self.keys :] @ basis.T
            weights = products.float().softmax(-1).to(values.dtype)
            parts = [weights @ values, weights @ basis, queries]
            inputs = torch.cat(parts, dim=-1).flatten(1)
            hidden, carry = self.cell(inputs, (hidden, carry))
            logits = self.output(hidden)
        return logits


def make(name: str, size: int, num_classes: int, steps: int = 0) -> nn.Module:
    """Returns a net by the name of ours.

    Args:
        name: `"resnet_cifar"`, `"resnet50"`, `"multi_gaze"`, `"s3ta"` (behind
            ResNet-50) or `"s3ta_small"` (behind ResNet-20, as at 32 pixels).
        size: Side of the images in pixels.
        num_classes: Number of logits.
        steps: Attention steps of S3TA.
    """
    if name == "multi_gaze":
        return MultiGaze(size, num_classes)
    if name == "s3ta":
        vision = resnet50_map((1, 2, 1, 1))
        return S3TA(vision, 2048, size // 8, num_classes, steps)
    if name == "resnet50":
        net = nn.Sequential(resnet50_map((1, 2, 2, 2)), *_pooled())
        return nn.Sequential(Standardize(), net, nn.Linear(2048, num_classes))
    net = resnet20()
    return nn.Sequential(Standardize(), net, nn.Linear(64, num_classes))


def perturb(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    steps: int,
    autocast: torch.autocast,
) -> torch.Tensor:
    """PGD in L-infinity from a random start, in inference mode."""
    size = 2.5 * epsilon / steps
    x = images + torch.empty_like(images).uniform_(-epsilon, epsilon)
    x = x.clamp(0, 1)
    net.eval()
    for _ in range(steps):
        x.requires_grad_(True)
        with autocast:
            loss = functional.cross_entropy(
                net(x).float(), labels, reduction="sum"
            )
        (grad,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x = x + size * grad.sign()
            x = torch.clamp(x, images - epsilon, images + epsilon).clamp(0, 1)
    net.train()
    return x.detach()


def take_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    steps: int,
    autocast: torch.autocast,
) -> torch.Tensor:
    """One step of adversarial training (standard with no PGD steps)."""
    if steps:
        images = perturb(net, images, labels, epsilon, steps, autocast)
    with autocast:
        loss = functional.cross_entropy(net(images).float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()
