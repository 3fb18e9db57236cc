"""Rules for transformers on one patch grid: ViT and DeiT, CaiT, BEiT."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

from timm.layers import Attention, resample_abs_pos_embed
from timm.models._input import update_model_input_size
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.cait import Cait, TalkingHeadAttn
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from .._typing import Size2
from ..errors import FeatSizeError, UnsupportedHostError
from ..layers import HeadMix, TokenGrids, TokenMixer
from .host import (
    HostRule,
    Site,
    StaticKeyHost,
    packed_bias,
    refusal_reasons,
    register_host_rule,
)
from .keys import token_mixers
from .parallel import parallel_site
from .slots import MixerSlot
from .windows import BiasedMixer, bias_table


class GridHost(StaticKeyHost):
    """A host with one patch grid, ``patch_embed.grid_size``, and possibly a dynamic input size.

    Attributes: ``grids``, with a dynamic input size the grid (H, W) last seen for each number of tokens; its
    mixers look theirs up in it.
    """

    patch_embed: Any
    dynamic_img_size: bool
    num_prefix_tokens: int
    blocks: Any
    grids: TokenGrids

    def set_input_size(self, img_size: Size2 | None = None, patch_size: Size2 | None = None) -> None:
        """Rebuild position embedding and keys for another input; see timm's ``set_input_size``."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]
        height, width = self.patch_embed.grid_size
        for mixer in token_mixers(self).values():
            mixer.set_input_size((height, width))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing what they need; see timm."""
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        if self.dynamic_img_size:
            for handle in self.__dict__.pop("_grid_hooks", []):
                handle.remove()
            if enable:
                keep = partial(_keep_grid, self.grids)
                self.__dict__["_grid_hooks"] = [block.register_forward_pre_hook(keep) for block in self.blocks]

    def _pos_embed(self, x: Tensor) -> Any:
        if self.dynamic_img_size:  # the last place that sees the grid, before tokens are flattened
            height, width = x.shape[1], x.shape[2]
            self.grids.note(self.num_prefix_tokens + height * width, (height, width))
        return super()._pos_embed(x)  # type: ignore[misc]


class CaitHost(StaticKeyHost):
    """A CaiT, which timm gives no ``set_input_size``."""

    patch_embed: Any
    pos_embed: nn.Parameter

    def set_input_size(self, img_size: Size2 | None = None, patch_size: Size2 | None = None) -> None:
        """Rebuild patch embedding, position embedding and keys for another input.

        Args:
            img_size: (height, width) in pixels; None keeps it.
            patch_size: (height, width) in pixels; None keeps it.
        """
        before = patch_grid(self)
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        grid = patch_grid(self)
        if grid != before:
            positions = resample_abs_pos_embed(
                self.pos_embed.detach(), new_size=list(grid), old_size=list(before), num_prefix_tokens=0
            )
            self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        for mixer in token_mixers(self).values():
            mixer.set_input_size(grid)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)


def _keep_grid(grids: TokenGrids, block: nn.Module, args: tuple[Any, ...]) -> None:
    """Tie a block's input to its grid: recomputed later, it must not see that of another input of equal length."""
    x = args[0]
    if hasattr(x, "feat_size"):
        grids.note(x.shape[1], x.feat_size)
    else:
        x.feat_size = grids.find(x.shape[1])


class BeitMixer(BiasedMixer):
    """A mixer called as BEiT's blocks call their attention."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, dim) to the same."""
        bias = shared_rel_pos_bias
        if self.rel_pos is not None:
            bias = self.rel_pos.get_bias() if bias is None else bias + self.rel_pos.get_bias()
        return self.mixer(x, attn_mask=bias)


def share_grids(model: Any) -> None:
    """Let all mixers of a host with a dynamic input size look up grids in one table."""
    if model.dynamic_img_size:
        model.grids = getattr(model, "grids", None) or TokenGrids()
        for mixer in token_mixers(model).values():
            mixer.grids = model.grids


def vit_sites(model: VisionTransformer) -> dict[str, Site]:
    """Every attention in the blocks of a vision transformer."""
    refuse_patch_drop(model)
    grid, prefix = patch_grid(model), model.num_prefix_tokens
    init_weights = get_init_weights_vit(model.weight_init_mode, needs_reset=False)
    sites: dict[str, Site] = {}
    for index, block in enumerate(model.blocks):
        found = {}
        for name, module in block.named_modules(prefix=f"blocks.{index}"):
            if isinstance(module, TokenMixer):
                found[name] = Site.of_mixer(module)
            elif isinstance(module, MixerSlot):
                found[name] = slot_site(module, grid, prefix, init_weights=init_weights)
            elif type(module) is ParallelScalingBlock:
                found[name] = parallel_site(module, grid, prefix)
            elif type(module) is Attention:
                found[name] = vit_attention_site(module, grid, prefix)
        if not found:
            lacks = f"blocks.{index} is a {type(block).__name__} without a timm.layers.Attention"
            raise UnsupportedHostError("; ".join(filter(None, [lacks, refusal_reasons(block)])))
        sites |= found
    return sites


def vit_attention_site(attn: Attention, feat_size: Size2, num_prefix_tokens: int) -> Site:
    """The site of timm's plain attention."""
    return Site.of(
        attn,
        feat_size=feat_size,
        num_prefix_tokens=num_prefix_tokens,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        out_norm=attn.norm,
        gate=attn.gate,
    )


def slot_site(
    slot: MixerSlot, feat_size: Size2, num_prefix_tokens: int, *, init_weights: Callable[[nn.Module], None] | None
) -> Site:
    """The site of an empty slot, with what the host asked of it."""
    return Site(
        module=slot,
        dim=slot.dim,
        num_heads=slot.num_heads,
        head_dim=slot.dim // slot.num_heads,
        feat_size=feat_size,
        num_prefix_tokens=num_prefix_tokens,
        with_qkv_bias=slot.qkv_bias,
        with_proj_bias=slot.proj_bias,
        attn_drop=slot.attn_drop,
        proj_drop=slot.proj_drop,
        q_norm=slot.q_norm,
        k_norm=slot.q_norm,
        out_norm=slot.out_norm,
        init_weights=init_weights,
    )


def cait_sites(model: Cait) -> dict[str, Site]:
    """The patch blocks of a CaiT; its class-attention blocks stay dynamic."""
    sites = {}
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", block.attn
        if isinstance(attn, TokenMixer):
            sites[name] = Site.of_mixer(attn)
        elif type(attn) is TalkingHeadAttn:
            mix = HeadMix(deepcopy(attn.proj_l), deepcopy(attn.proj_w))
            sites[name] = Site.of(attn, feat_size=patch_grid(model), head_mix=mix)
        else:
            raise UnsupportedHostError(f"{name} is a {type(attn).__name__}; supported: TalkingHeadAttn")
    return sites


def beit_sites(model: Beit) -> dict[str, Site]:
    """The blocks of a BEiT, each with its relative position bias."""
    sites = {}
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", block.attn
        if isinstance(attn, BeitMixer):
            sites[name] = Site.of_mixer(attn.mixer, wrap=partial(BeitMixer, rel_pos=attn.rel_pos), needs_map=True)
            continue
        if type(attn) is not BeitAttention:
            raise UnsupportedHostError(f"{name} is a {type(attn).__name__}; supported: BEiT's Attention")
        bias = packed_bias(attn.q_bias, attn.v_bias)
        rel_pos = None if attn.relative_position_bias_table is None else bias_table(attn, 1)
        sites[name] = Site.of(
            attn,
            feat_size=patch_grid(model),
            num_prefix_tokens=model.num_prefix_tokens,
            qkv_bias=bias,
            needs_map=True,
            wrap=partial(BeitMixer, rel_pos=rel_pos),
        )
    return sites


def patch_grid(model: Any) -> Size2:
    """The token grid (H, W) of a model with one patch embedding."""
    height, width = model.patch_embed.grid_size
    if min(height, width) < 1:
        raise FeatSizeError(
            f"img_size={tuple(model.patch_embed.img_size)} is smaller than the patch size "
            f"{tuple(model.patch_embed.patch_size)}; enlarge img_size or pass a smaller patch_size"
        )
    return height, width


def refuse_patch_drop(model: Any) -> None:
    """Refuse a model that drops tokens at random."""
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise UnsupportedHostError(
            "patch_drop_rate > 0 removes tokens at random, a static key needs all of them; build the host without it"
        )


register_host_rule(HostRule(host=VisionTransformer, sites=vit_sites, mixin=GridHost, finish=share_grids))
register_host_rule(HostRule(host=Cait, sites=cait_sites, mixin=CaitHost))
register_host_rule(HostRule(host=Beit, sites=beit_sites))
