"""Defines image networks in plain PyTorch: ViT and ResNet up to their pooled features.

Modules and parameters have timm's names and timm's order of operations, so published weights fit as they are. The last
layer (`head`, `fc`) is left out: in a contrastive model it is the projection.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-6  # epsilon of a ViT's layer norms, as in timm and in SatMAE's own code
RSHF_EPSILON = 1e-5  # PyTorch's default, with which rshf runs SatMAE, and with which RANGE's values were made
SENTINEL_GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))  # of B02 to B08, B8A, B11, B12: 10 m, 20 m, short-wave infrared


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (n, token, dim) to the same shape."""
        n, length, dim = tokens.shape
        split = self.qkv(tokens).reshape(n, length, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, dim))


class Mlp(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (n, token, dim) to the same shape."""
        return self.fc2(functional.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """One transformer block, normalised before each half."""

    def __init__(self, dim: int, heads: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=epsilon)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=epsilon)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (n, token, dim) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PatchEmbed(nn.Module):
    """The layer that makes tokens of the squares of an image."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, channel, y, x) to (n, token, dim)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A ViT (Dosovitskiy et al. 2021) without its head."""

    def __init__(
        self,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        size: int = 224,
        mean: bool = False,
        epsilon: float = EPSILON,
    ) -> None:
        """Makes random weights, to be replaced by published ones.

        Args:
            channels: Channels of the image.
            dim: Length of a token, and of the features.
            depth: Number of blocks.
            heads: Number of attention heads.
            patch: Pixels along one side of a token's square.
            size: Pixels along one side of an image.
            mean: Whether the features are the mean of the squares' tokens, as in a masked autoencoder, or the class
                token.
            epsilon: What is added to the variance in layer norms.
        """
        super().__init__()
        self.mean = mean
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, epsilon) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=epsilon)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, channel, size, size) to (n, dim)."""
        tokens = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1) + self.pos_embed
        tokens = self.norm(self.blocks(tokens))
        if self.mean:
            return tokens[:, 1:].mean(1)
        return tokens[:, 0]


class GroupedVisionTransformer(nn.Module):
    """The encoder of SatMAE for many bands (Cong et al. 2022): a token for each square and group of bands.

    A token's position is that of its square, then that of its group. The features are the mean of all tokens.
    """

    def __init__(
        self,
        groups: tuple[tuple[int, ...], ...],
        dim: int,
        depth: int,
        heads: int,
        patch: int = 8,
        size: int = 96,
        group_dim: int = 256,
    ) -> None:
        """Makes random weights, to be replaced by published ones.

        Args:
            groups: Channels of each group.
            dim: Length of a token, and of the features.
            depth: Number of blocks.
            heads: Number of attention heads.
            patch: Pixels along one side of a token's square.
            size: Pixels along one side of an image.
            group_dim: Numbers of a token's position that tell its group.
        """
        super().__init__()
        self.groups = groups
        self.patch_embed = nn.ModuleList([PatchEmbed(len(group), dim, patch) for group in groups])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, dim - group_dim))
        self.channel_embed = nn.Parameter(torch.zeros(1, len(groups), group_dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, channel, size, size) to (n, dim)."""
        squares = self.pos_embed[:, 1:]
        tokens = [self.cls_token.expand(len(images), -1, -1)]  # without a position, as in pretraining
        for i, group in enumerate(self.groups):
            own = self.channel_embed[:, i : i + 1].expand(-1, squares.shape[1], -1)
            tokens.append(self.patch_embed[i](images[:, list(group)]) + torch.cat([squares, own], 2))
        return self.norm(self.blocks(torch.cat(tokens, 1)))[:, 1:].mean(1)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    widening = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, inputs, y, x) to (n, width, y / stride, x / stride)."""
        out = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(out)) + self.downsample(images))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, beside a shortcut."""

    widening = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, inputs, y, x) to (n, 4 * width, y / stride, x / stride)."""
        out = functional.relu(self.bn1(self.conv1(images)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.downsample(images))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Returns the identity where shapes agree, else a 1 x 1 convolution."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A ResNet (He et al. 2016) without its last layer."""

    def __init__(self, channels: int, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> None:
        """Makes random weights, to be replaced by published ones.

        Args:
            channels: Channels of the image.
            block: The kind of block.
            depths: Blocks at each of the four sizes.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths):
            width, outputs = 64 * 2**i, 64 * 2**i * block.widening
            strides = [2 if i else 1] + [1] * (depth - 1)
            blocks = [block(outputs if j else inputs, width, stride) for j, stride in enumerate(strides)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            inputs = outputs
        self.sizes = len(depths)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (n, channel, y, x) to (n, feature)."""
        out = functional.max_pool2d(functional.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for i in range(self.sizes):
            out = self.get_submodule(f"layer{i + 1}")(out)
        return out.mean((2, 3))


def vit_small(channels: int) -> VisionTransformer:
    """Makes a ViT-S/16 with 384 features."""
    return VisionTransformer(channels, dim=384, depth=12, heads=6)


def vit_large_mean(channels: int) -> VisionTransformer:
    """Makes a ViT-L/16 with 1024 features, the mean of the squares' tokens, with rshf's epsilon."""
    return VisionTransformer(channels, dim=1024, depth=24, heads=16, mean=True, epsilon=RSHF_EPSILON)


def vit_large_grouped(channels: int) -> GroupedVisionTransformer:
    """Makes a ViT-L/8 of three groups of Sentinel-2's bands for 96 x 96 pixels, with 1024 features."""
    return GroupedVisionTransformer(SENTINEL_GROUPS, dim=1024, depth=24, heads=16)


def resnet18(channels: int) -> ResNet:
    """Makes a ResNet-18 with 512 features."""
    return ResNet(channels, BasicBlock, (2, 2, 2, 2))


def resnet50(channels: int) -> ResNet:
    """Makes a ResNet-50 with 2048 features."""
    return ResNet(channels, Bottleneck, (3, 4, 6, 3))
