"""What is measured: a network and its input, built wherever they are needed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._typing import Backend, Size2
from ..layers import MIXERS, AttentionMixer, ConvStaticKeyAttention, TokenMixer
from ..layers.attention import AttendOp, Rotate
from ..models import Detector, MaskWindows, Swap, build_detector, build_model, count_macs
from ..ops import reference, static_key_attention


@dataclass(frozen=True)
class Targets:
    """The most that a ratio to the contender it is measured against may be."""

    forward: float | None = None
    training: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Contender:
    """One row: a name, how to make the network and its input, and what it is measured against.

    Args:
        group: Contenders of one group are measured in turns.
        name: Name within the group.
        make: A picklable function without arguments: the network in float32 on the CPU, and its input.
        against: Name of the contender of the same group that the ratios are to; None for a baseline.
        units: Divide times by this before the ratio is taken (tokens, for a cost per token).
        targets: What the ratios are to be at most.
        twin: Make the same function another way; parity with it is checked before anything is timed. Default
            the same network with every map stored (backend ``math``).
        checked: Whether parity is checked here; not where the twin would need more memory than machines have and
            the same network on a smaller input is checked.
    """

    group: str
    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]
    against: str | None = None
    units: int = 1
    targets: Targets = Targets()
    twin: Callable[[], tuple[nn.Module, Tensor]] | None = None
    checked: bool = True


@dataclass(frozen=True)
class LayerShape:
    """The shape of one attention layer and its input."""

    feat_size: Size2
    dim: int
    num_heads: int
    num_prefix_tokens: int = 0
    batch: int = 8

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.num_prefix_tokens + self.feat_size[0] * self.feat_size[1]

    def __str__(self) -> str:
        height, width = self.feat_size
        size = f"{self.num_tokens}x" if self.num_prefix_tokens else f"{height}x{width}x"
        return f"{size}{self.dim}, {self.num_heads} heads, batch {self.batch}"


class PlainConvStaticKeyAttention(ConvStaticKeyAttention):
    """CSKA as the paper writes it: a grouped convolution, a softmax, a product."""

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        query, value = self._split_heads(self.qv(x), 2)  # measured without position embeddings
        return reference.conv_static_key_attention(
            query,
            self.key_rows(feat_size, "conv_key"),
            self.key_rows(feat_size, "conv_bias"),
            value,
            feat_size=feat_size,
            scale=self._logit_scale(),
        )


BUILT_FOR = 224
"""Pixels that the keys of detectors are built for: those of a classifier to start from."""
_OBJECTS = 8
"""On the image that a detector learns from."""
PLAIN_CSKA = "plain cska"
TIMM_MHSA = "timm mhsa"


def layer(
    shape: LayerShape, name: str, built_for: Size2 | None = None, backend: Backend | None = None
) -> tuple[nn.Module, Tensor]:
    """A layer with weights of seed 0, and tokens.

    Args:
        shape: Of the layer and its input.
        name: A mixer, with its arguments if need be (``Swap``), ``PLAIN_CSKA`` or ``TIMM_MHSA``.
        built_for: Build the mixer for this grid; the input is tiled with windows of it unless the arguments say
            otherwise.
        backend: The mixer's, where it is not to be the default.
    """
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.num_tokens, shape.dim)
    if name == TIMM_MHSA:
        return Attention(shape.dim, shape.num_heads), x
    args: dict[str, Any] = {
        "feat_size": shape.feat_size if built_for is None else built_for,
        "num_prefix_tokens": shape.num_prefix_tokens,
    }
    swap = Swap.parse("cska" if name == PLAIN_CSKA else name)
    if built_for is not None and not swap.mixer_args.keys() & {"key_size", "off_grid"}:
        args["off_grid"] = "window"
    mixer: Any = MIXERS[swap.mixer](shape.dim, shape.num_heads, **args | dict(swap.mixer_args))
    if name == PLAIN_CSKA:
        plain(mixer)
    if backend is not None:
        mixer.backend = backend
    return (mixer if built_for is None else OnGrid(mixer, shape.feat_size)), x


class ConvStaticKeyOp(nn.Module):
    """CSKA without projections: queries and values (B, N, 2*h*d), its keys learned."""

    def __init__(self, shape: LayerShape, plain: bool) -> None:
        super().__init__()
        self.shape, self.plain = shape, plain
        width, tokens = shape.dim // shape.num_heads, shape.num_tokens
        key = torch.randn(shape.num_heads, tokens, width, 3, 3) * (9 * width) ** -0.5
        # each as its own convolution wants it: channels first as written, last as queries are unfolded
        self.key = nn.Parameter(key if plain else key.permute(0, 1, 3, 4, 2).flatten(2))
        self.bias = nn.Parameter(0.1 * torch.randn(shape.num_heads, tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        query, value = x.reshape(*x.shape[:2], 2, self.shape.num_heads, -1).permute(2, 0, 3, 1, 4)
        grid, scale = self.shape.feat_size, query.shape[3] ** -0.5
        if self.plain:
            return reference.conv_static_key_attention(query, self.key, self.bias, value, feat_size=grid, scale=scale)
        return static_key_attention(query, self.key, value, key_bias=self.bias, scale=scale, unfold=(grid, 3))

    def macs(self) -> int:
        """Multiply-accumulates of one image: the convolution and the product."""
        return 10 * self.shape.num_tokens**2 * self.shape.dim


def op(shape: LayerShape, plain: bool = False) -> tuple[nn.Module, Tensor]:
    """CSKA's op with keys of seed 0, as the package computes it or as the paper writes it, and tokens."""
    torch.manual_seed(0)
    return ConvStaticKeyOp(shape, plain), torch.randn(shape.batch, shape.num_tokens, 2 * shape.dim)


class OnGrid(nn.Module):
    """A mixer on another grid than it was built for."""

    def __init__(self, mixer: Any, feat_size: Size2) -> None:
        super().__init__()
        self.mixer, self.feat_size = mixer, feat_size

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        return self.mixer(x, self.feat_size)  # type: ignore[no-any-return]


def model(
    name: str, batch: int, img_size: int = 224, plain_cska: bool = False, **model_args: Any
) -> tuple[nn.Module, Tensor]:
    """A timm model with weights of seed 0, and images."""
    torch.manual_seed(0)
    network = timm.create_model(name, **model_args)
    return (plain(network) if plain_cska else network), torch.randn(batch, 3, img_size, img_size)


def network(
    name: str, mixer: str, *, batch: int, img_size: int, num_classes: int, in_chans: int, model_args: dict[str, Any]
) -> tuple[nn.Module, Tensor]:
    """A network as ``train`` and ``compare`` build it, and images."""
    made = build_model(
        name, mixer, img_size=img_size, num_classes=num_classes, in_chans=in_chans, model_args=model_args
    )
    return made, torch.randn(batch, in_chans, img_size, img_size)


class DetectorPass(nn.Module):
    """A detector from images to one tensor: the boxes found, or in training the loss of some objects."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Tensor:
        """Detect, or learn."""
        if not self.training:
            return torch.cat([found["boxes"] for found in self.detector(list(x))])
        height, width = x.shape[-2:]
        starts = torch.linspace(0, 0.5, _OBJECTS, device=x.device, dtype=x.dtype)[:, None]
        sides = torch.tensor([width, height], device=x.device, dtype=x.dtype)
        boxes = torch.cat([starts * sides, (starts + 0.25) * sides], 1)
        whole = torch.ones(height, width, dtype=torch.bool, device=x.device)
        target = {
            "boxes": boxes,
            "labels": torch.zeros(_OBJECTS, dtype=torch.long, device=x.device),
            "masks": MaskWindows.cut(whole for _ in range(_OBJECTS)),
            "seed": 0,
        }
        losses: dict[str, Tensor] = self.detector(list(x), [target] * len(x))
        return torch.stack(list(losses.values())).sum()


def mask_rcnn(name: str, mixer: str | None, size: Size2, **options: Any) -> tuple[nn.Module, Tensor]:
    """Mask R-CNN of one class with weights of seed 0, and an image."""
    settings: Any = {"arch": "mask_rcnn", "img_size": BUILT_FOR, "num_classes": 1, "min_size": None} | options
    detector: Any = build_detector(name, mixer, **settings)
    return DetectorPass(detector), torch.randn(1, 3, *size)


def plain(module: nn.Module) -> nn.Module:
    """The same weights, with every CSKA computed as the paper writes it."""
    for each in module.modules():
        if type(each) is ConvStaticKeyAttention:
            each.__class__ = PlainConvStaticKeyAttention
    return module


def stored_maps(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor]:
    """The same network with every attention map stored in full."""
    made, x = make()
    layers: list[Any] = list(made.modules())
    for each in layers:
        if isinstance(each, AttentionMixer):
            each.backend = "math"
        if hasattr(each, "fused_attn"):  # timm's
            each.fused_attn = False
    return made, x


def twin(contender: Contender) -> tuple[nn.Module, Tensor]:
    """The contender's function made another way."""
    return contender.twin() if contender.twin is not None else stored_maps(contender.make)


def macs(module: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one forward pass on the whole batch."""
    if isinstance(module, TokenMixer | ConvStaticKeyOp):
        return len(x) * module.macs()
    if isinstance(module, OnGrid):
        return len(x) * int(module.mixer.macs(module.feat_size))
    if isinstance(module, Attention):
        num_tokens, dim = x.shape[1:]
        return len(x) * (4 * dim * dim * num_tokens + 2 * num_tokens * num_tokens * dim)
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter sees nothing inside fused attention on the CPU
        return len(x) * count_macs(module, (x.shape[1], x.shape[2], x.shape[3]))


def least_bytes(module: nn.Module, x: Tensor) -> int:
    """The least that must be read and written: weights, input, and an output as large as the input."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) + 2 * x.numel() * x.element_size()
