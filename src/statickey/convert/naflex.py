"""The rule for timm's NaFlexVit, on batches of images of one size; and why Gemma4's encoder has none."""

from typing import Any, NoReturn

from timm.layers import Attention, AttentionRope
from timm.models import get_model_input_config
from timm.models._input import update_model_input_size
from timm.models.eva import EvaAttention
from timm.models.gemma4_vit import Gemma4VitEncoder
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from .._checks import check_img_size
from .._typing import Size2
from ..errors import FeatSizeError, UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, register_host_rule
from .keys import token_mixers
from .rotary import RotaryMixer, rotary_site, swapped_site
from .transformers import GridHost, refuse_patch_drop, share_grids, vit_attention_site


class NaFlexHost(GridHost):
    """A NaFlexVit: any size of images at each call, one size in a batch."""

    dynamic_img_size = True
    embeds: Any

    def set_input_size(self, img_size: Size2 | None = None, patch_size: Size2 | None = None) -> None:
        """Rebuild the keys for another input; embeddings follow any.

        Args:
            img_size: (height, width) in pixels; None keeps it.
            patch_size: Must be None.

        Raises:
            FeatSizeError: A patch size is given.
        """
        if patch_size is not None:
            raise FeatSizeError(f"patch_size={patch_size!r}: a NaFlexVit keeps that of its embedding")
        if img_size is None:
            return
        size = check_img_size(img_size)
        for mixer in token_mixers(self).values():
            mixer.set_input_size(self.embeds.dynamic_feat_size(size))
        update_model_input_size(self, size)

    def _forward_embeds(
        self, x: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> Any:
        if patch_coord is not None:
            raise FeatSizeError(
                "patch_coord gives each image a grid of its own, a static key is that of one grid for the batch; "
                "pass images of one size, (B, C, H, W)"
            )
        height, width = self.embeds.dynamic_feat_size(x.shape[-2:])
        self.grids.note(self.num_prefix_tokens + height * width, (height, width))
        return super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)  # type: ignore[misc]


def naflex_sites(model: Any) -> dict[str, Site]:
    """Every block of a NaFlexVit."""
    refuse_patch_drop(model)
    size = get_model_input_config(model)["input_size"][1:]
    grid, prefix, rotary = model.embeds.dynamic_feat_size(size), model.num_prefix_tokens, model.rope is not None
    sites = {}
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", getattr(block, "attn", None)
        if isinstance(attn, RotaryMixer):
            sites[name] = swapped_site(attn, rotary=rotary)
        elif isinstance(attn, TokenMixer):
            sites[name] = Site.of_mixer(attn)
        elif type(attn) is Attention:
            sites[name] = vit_attention_site(attn, grid, prefix)
        elif type(attn) in (EvaAttention, AttentionRope):
            sites[name] = rotary_site(attn, grid, prefix, rotary=rotary)
        else:
            raise UnsupportedHostError(
                f"blocks.{index} is a {type(block).__name__}; supported: those with timm's Attention, EvaAttention "
                "or AttentionRope"
            )
    return sites


def _refuse_gemma(model: Any) -> NoReturn:
    raise UnsupportedHostError(
        "Gemma4Attention norms its values, clips its projections and turns each half of a head by one axis, for "
        "which mixers have no place; use another encoder, such as qwen3_vit_* or vit_*_dinov3"
    )


register_host_rule(HostRule(host=NaFlexVit, sites=naflex_sites, mixin=NaFlexHost, finish=share_grids))
register_host_rule(HostRule(host=Gemma4VitEncoder, sites=_refuse_gemma))
