"""The rule for timm's MetaFormer family: stages of maps or tokens, any input size."""

from collections.abc import Sequence
from typing import Any

from timm.models import checkpoint, get_model_input_config
from timm.models._input import update_model_input_size
from timm.models.metaformer import Attention, MetaFormer, MetaFormerStage, Pooling, SepConv
from torch import Tensor, nn

from .._checks import check_img_size
from .._typing import Size2
from ..errors import FeatSizeError, UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, StaticKeyHost, register_host_rule
from .keys import token_mixers
from .slots import MixerSlot

HEAD_DIM = 32
"""Width of a head where a host names none, as in the reference."""


class MetaFormerHost(StaticKeyHost):
    """What timm's MetaFormer lacks: ``set_input_size`` and ``group_matcher``."""

    stages: Any
    grad_checkpointing: bool

    def set_input_size(self, img_size: Size2 | int | None = None, patch_size: None = None) -> None:
        """Rebuild the keys of every stage for another input; convolutions and self-attention need nothing.

        Args:
            img_size: (height, width) in pixels, or one side of a square.
            patch_size: There is none; must be None.

        Raises:
            FeatSizeError: A stage would have no token, or a patch size is given.
        """
        if patch_size is not None:
            raise FeatSizeError(f"patch_size={patch_size!r}: the stem of a MetaFormer has a fixed stride of 4")
        if img_size is None:
            return
        size = check_img_size(img_size)
        grids = stage_grids(self, size)
        for name, mixer in token_mixers(self).items():
            mixer.set_input_size(grids[int(name.split(".")[1])])
        update_model_input_size(self, size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise decay; by stage if coarse."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}


class MapStage(MetaFormerStage):  # type: ignore[misc]
    """A stage that hands its blocks maps with the channels last, so that mixers see the grid in the shape.

    Norms, perceptrons and scales of a stage of tokens work on the last axis, whatever is in front of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the next stage's (B, C', H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        for block in self.blocks:
            tokens = not isinstance(block.token_mixer, TokenMixer)
            x = x.reshape(batch, height * width, dim) if tokens else x
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            x = x.reshape(batch, height, width, dim) if tokens else x
        return x.permute(0, 3, 1, 2)


def stage_grids(model: Any, img_size: Size2) -> list[Size2]:
    """The token grid (H, W) of every stage.

    Args:
        model: A timm ``MetaFormer``.
        img_size: (height, width) in pixels.

    Raises:
        FeatSizeError: The image is too small for a stage.
    """
    grid = _through(model.stem.conv, img_size)
    grids = []
    for index, stage in enumerate(model.stages):
        if not isinstance(stage.downsample, nn.Identity):
            grid = _through(stage.downsample.conv, grid)
        if min(grid) < 1:
            raise FeatSizeError(
                f"img_size={img_size} leaves a grid of {grid} in stage {index}; use at least 3 pixels a side"
            )
        grids.append(grid)
    return grids


def _through(conv: nn.Conv2d, size: Sequence[int]) -> Size2:
    height, width = (
        (extent + 2 * pad - kernel) // stride + 1  # type: ignore[operator]
        for extent, pad, kernel, stride in zip(size, conv.padding, conv.kernel_size, conv.stride, strict=True)
    )
    return height, width


def metaformer_sites(model: MetaFormer) -> dict[str, Site]:
    """Every token mixer; self-attention counts as attention, convolution and pooling are reached by name."""
    _, height, width = get_model_input_config(model)["input_size"]
    sites: dict[str, Site] = {}
    for stage_index, (stage, grid) in enumerate(zip(model.stages, stage_grids(model, (height, width)), strict=True)):
        for index, block in enumerate(stage.blocks):
            name, module = f"stages.{stage_index}.blocks.{index}.token_mixer", block.token_mixer
            fmt: Any = "NCHW" if stage.use_nchw else "NHWC"
            if isinstance(module, TokenMixer):
                sites[name] = Site.of_mixer(module)
            elif type(module) is Attention:
                sites[name] = Site.of(module, feat_size=grid, input_fmt=fmt)
            elif isinstance(module, MixerSlot | SepConv | Pooling):
                dim = block.norm1.weight.shape[0]
                slot = module if isinstance(module, MixerSlot) else None
                sites[name] = Site(
                    module=module,
                    dim=dim,
                    num_heads=max(dim // HEAD_DIM, 1),
                    head_dim=HEAD_DIM,
                    feat_size=grid,
                    input_fmt=fmt,
                    is_attention=slot is not None,
                    with_qkv_bias=slot is not None and slot.qkv_bias,
                    with_proj_bias=slot is not None and slot.proj_bias,
                    attn_drop=0.0 if slot is None else slot.attn_drop,
                    proj_drop=block.mlp.drop1.p if slot is None else slot.proj_drop,
                    init_weights=model._init_weights,
                    macs=grid[0] * grid[1] * sum(p.numel() for p in module.parameters() if p.ndim == 4),
                )
            else:
                raise UnsupportedHostError(
                    f"{name} is a {type(module).__name__}; supported: timm's Attention, SepConv and Pooling"
                )
    return sites


def show_maps(model: Any) -> None:
    """Let the stages of tokens that hold mixers hand them maps."""
    for stage in model.stages:
        if not stage.use_nchw and any(isinstance(block.token_mixer, TokenMixer) for block in stage.blocks):
            stage.__class__ = MapStage


register_host_rule(HostRule(host=MetaFormer, sites=metaformer_sites, mixin=MetaFormerHost, finish=show_maps))
