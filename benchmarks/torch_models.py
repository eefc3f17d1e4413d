"""The networks that are measured beside PyTorch on a GPU, as torch modules: PyTorch runs the module, Ingot its export.

Weights are torch's own initial ones from a seed; batch norms have statistics that keep activations of order one.
"""
# mypy: disable-error-code="no-untyped-call,misc"

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import INVERTED_RESIDUALS


class ConvNorm(nn.Sequential):
    """Conv without bias, padded to keep the extent at stride 1; batch norm; activation."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, group: int = 1,
                 activation: nn.Module | None = None) -> None:  # fmt: skip
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=group, bias=False)
        parts: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
        super().__init__(*parts, *([activation] if activation else []))


class Residual(nn.Module):
    """activation(branch(x) + shortcut(x))"""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, relu: bool = True) -> None:
        super().__init__()
        self.branch, self.shortcut, self.relu = branch, shortcut or nn.Identity(), relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x) + self.shortcut(x)
        return F.relu(y) if self.relu else y


# classifiers


def _classifier(features: nn.Sequential, width: int) -> nn.Module:
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def resnet50() -> nn.Module:
    """ResNet-50 v1.5."""
    parts: list[nn.Module] = [ConvNorm(3, 64, 7, 2, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for middle, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride, outputs = first if block == 0 else 1, 4 * middle
            branch = nn.Sequential(ConvNorm(inputs, middle, 1, activation=nn.ReLU()),
                                   ConvNorm(middle, middle, 3, stride, activation=nn.ReLU()),
                                   ConvNorm(middle, outputs, 1))  # fmt: skip
            parts.append(Residual(branch, ConvNorm(inputs, outputs, 1, stride) if inputs != outputs else None))
            inputs = outputs
    return _classifier(nn.Sequential(*parts), inputs)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0."""
    parts: list[nn.Module] = [ConvNorm(3, 32, 3, 2, activation=nn.ReLU6())]
    inputs = 32
    for expansion, outputs, blocks, first in INVERTED_RESIDUALS:
        for block in range(blocks):
            stride, middle = first if block == 0 else 1, inputs * expansion
            expand = [] if expansion == 1 else [ConvNorm(inputs, middle, 1, activation=nn.ReLU6())]
            branch = nn.Sequential(*expand, ConvNorm(middle, middle, 3, stride, middle, nn.ReLU6()),
                                   ConvNorm(middle, outputs, 1))  # fmt: skip
            parts.append(Residual(branch, relu=False) if stride == 1 and inputs == outputs else branch)
            inputs = outputs
    parts.append(ConvNorm(inputs, 1280, 1, activation=nn.ReLU6()))
    return _classifier(nn.Sequential(*parts), 1280)


# transformers


class SelfAttention(nn.Module):
    """Multi-head attention over its own positions, or over those of a context."""

    def __init__(self, width: int, heads: int, context: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias)
        self.key, self.value = (nn.Linear(context or width, width, bias) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        query, key, value = (self._split(y) for y in (self.query(x), self.key(source), self.value(source)))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class PostNormLayer(nn.Module):
    """BERT's layer: a norm after each residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm1 = SelfAttention(width, heads), nn.LayerNorm(width, 1e-12)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self.feed(x))


class Bert(nn.Module):
    """BERT-base without its pooler."""

    def __init__(self, width: int = 768, heads: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(n, width) for n in (30522, 512, 2))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.layers = nn.ModuleList(PostNormLayer(width, heads) for _ in range(layers))

    def forward(self, ids: Tensor, attention: Tensor, kinds: Tensor) -> Tensor:
        x = self.words(ids) + self.kinds(kinds) + self.places.weight[: ids.shape[1]]
        mask = (1.0 - attention[:, None, None, :].to(x.dtype)) * -10000.0
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class PreNormLayer(nn.Module):
    """ViT's layer: a norm before each branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), SelfAttention(width, heads), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-B/16."""

    def __init__(self, width: int = 768, heads: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first, self.places = (nn.Parameter(0.02 * torch.randn(1, n, width)) for n in (1, 197))
        self.layers = nn.Sequential(*(PreNormLayer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


# detector


class Branches(nn.Module):
    """YOLOv8's C2f: half of the channels through blocks in a row, all that comes out of any of them joined."""

    def __init__(self, inputs: int, outputs: int, blocks: int, residual: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.first = ConvNorm(inputs, outputs, 1, activation=nn.SiLU())
        inner = [nn.Sequential(*(ConvNorm(half, half, activation=nn.SiLU()) for _ in range(2))) for _ in range(blocks)]
        self.blocks = nn.ModuleList(Residual(block, relu=False) if residual else block for block in inner)
        self.last = ConvNorm((2 + blocks) * half, outputs, 1, activation=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """YOLOv8's SPPF: three max pools in a row, joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.pool = ConvNorm(width, width // 2, 1, activation=nn.SiLU()), nn.MaxPool2d(5, 1, 2)
        self.last = ConvNorm(width * 2, width, 1, activation=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Head(nn.Module):
    """Boxes and class scores of one scale, [N, 64 + classes, cells]."""

    def __init__(self, inputs: int, boxes: int, classes: int) -> None:
        super().__init__()
        self.boxes, self.scores = (
            nn.Sequential(ConvNorm(inputs, width, activation=nn.SiLU()), ConvNorm(width, width, activation=nn.SiLU()),
                          nn.Conv2d(width, outputs, 1))
            for width, outputs in ((boxes, 64), (max(boxes, classes), classes))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.boxes(x), self.scores(x)], 1).flatten(2)


class Detector(nn.Module):
    """Like YOLOv8s at 640 x 640: backbone, two-way pyramid, three heads; what suppression would get."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        down = [ConvNorm(a, b, 3, 2, activation=nn.SiLU()) for a, b in ((3, 32), (32, 64), (64, 128), (128, 256),
                                                                        (256, 512))]  # fmt: skip
        self.start = nn.Sequential(down[0], down[1], Branches(64, 64, 1, True), down[2], Branches(128, 128, 2, True))
        self.middle = nn.Sequential(down[3], Branches(256, 256, 2, True))
        self.deep = nn.Sequential(down[4], Branches(512, 512, 1, True), Pyramid(512))
        self.up1, self.up2 = Branches(768, 256, 1, False), Branches(384, 128, 1, False)
        self.down1, self.down2 = (ConvNorm(n, n, 3, 2, activation=nn.SiLU()) for n in (128, 256))
        self.join1, self.join2 = Branches(384, 256, 1, False), Branches(768, 512, 1, False)
        self.heads = nn.ModuleList(Head(n, 64, classes) for n in (128, 256, 512))

    def forward(self, x: Tensor) -> Tensor:
        small = self.start(x)
        middle = self.middle(small)
        deep = self.deep(middle)
        wide = self.up1(torch.cat([F.interpolate(deep, scale_factor=2.0), middle], 1))
        first = self.up2(torch.cat([F.interpolate(wide, scale_factor=2.0), small], 1))
        second = self.join1(torch.cat([self.down1(first), wide], 1))
        third = self.join2(torch.cat([self.down2(second), deep], 1))
        found = [head(y) for head, y in zip(self.heads, (first, second, third), strict=True)]
        joined = torch.cat(found, 2)
        return torch.cat([joined[:, :64], joined[:, 64:].sigmoid()], 1)


# a block of a diffusion model's U-Net


class Gated(nn.Module):
    """GEGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))


class UnetBlock(nn.Module):
    """A block as in Stable Diffusion 1: residual convolutions with a time step, then a transformer that sees a text."""

    def __init__(self, width: int = 320, heads: int = 8, text: int = 768, steps: int = 1280) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(32, width) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.step, self.first, self.last = nn.Linear(steps, width), nn.Linear(width, width), nn.Linear(width, width)
        self.inner1, self.inner2, self.inner3 = (nn.LayerNorm(width) for _ in range(3))
        self.itself = SelfAttention(width, heads, bias=False)
        self.text = SelfAttention(width, heads, text, bias=False)
        self.feed = Gated(width)

    def forward(self, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.step(F.silu(step))[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(y)))
        tokens = self.first(self.norm3(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.itself(self.inner1(tokens))
        tokens = tokens + self.text(self.inner2(tokens), text)
        tokens = self.last(tokens + self.feed(self.inner3(tokens)))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


# the table

Inputs = Callable[[int], Sequence[Tensor]]


@dataclass(frozen=True)
class TorchModel:
    """How a module is made, and inputs for a batch of it."""

    make: Callable[[], nn.Module]
    inputs: Inputs


def _images(extent: int) -> Inputs:
    return lambda batch: (torch.randn(batch, 3, extent, extent),)


def _tokens(batch: int) -> Sequence[Tensor]:
    ids = torch.randint(1000, 30000, (batch, 128))
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def _latents(batch: int) -> Sequence[Tensor]:
    return torch.randn(batch, 320, 64, 64), torch.randn(batch, 1280), torch.randn(batch, 77, 768)


MODELS = {
    "resnet50": TorchModel(resnet50, _images(224)), "mobilenet_v2": TorchModel(mobilenet_v2, _images(224)),
    "bert_base": TorchModel(Bert, _tokens), "vit_b16": TorchModel(VisionTransformer, _images(224)),
    "detector": TorchModel(Detector, _images(640)), "unet_block": TorchModel(UnetBlock, _latents),
}  # fmt: skip


def module(name: str) -> nn.Module:
    """The seeded module in float32, for inference."""
    torch.manual_seed(0)
    made = MODELS[name].make().eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.0)
            nn.init.normal_(part.bias, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.2, 0.6)
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, 0, 0.5)
    return made


def inputs(name: str, batch: int) -> Sequence[Tensor]:
    """Seeded inputs."""
    torch.manual_seed(1)
    return MODELS[name].inputs(batch)
