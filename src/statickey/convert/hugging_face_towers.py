"""The vision towers of transformers: where their attention stands, and on which grid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import Site, attention_classes, converted_class
from .hugging_face_grids import (
    check_image_size,
    tell_embeddings,
    tell_encoder,
    tell_layers,
    tell_maps,
    tell_nothing,
    tell_tower,
    tell_tower_of_patches,
)
from .hugging_face_modules import AddedStandIn, MarkedStandIn, RotaryStandIn, StandIn, VariableGridStandIn
from .hugging_face_places import (
    Place,
    ReadPlace,
    aifi_place,
    detr_place,
    hiera_parts,
    hiera_place,
    pixio_place,
    pvt_v2_parts,
    pvt_v2_place,
    segformer_parts,
    segformer_place,
    swin_place,
    swin_v2_parts,
    swin_v2_place,
    whole,
    windowed,
    yolos_place,
)
from .refusals import NO_MAP


@dataclass(frozen=True, kw_only=True)
class Family:
    """Vision towers of one kind.

    Args:
        towers: Names of the classes that take images.
        place: Reads the tokens of an attention module off the tower and the layer that holds it.
        parts: Reads what else of the module there a ``Site`` is told.
        within: The part of a tower whose attention is meant; all of it by default.
        tell: Puts hooks in place by which mixers are told the grid.
        needs_map: Whether the host adds a bias to the logits.
        rotate_half: How a rotary position embedding pairs channels, where there is one; see ``Site``.
        adds_pos_embed: Whether the host adds a position embedding to queries and keys alone.
    """

    towers: tuple[str, ...]
    place: ReadPlace
    parts: Callable[[Any, Place], dict[str, Any]] = lambda module, place: {}
    within: str = ""
    tell: Callable[[Any], None] = tell_tower
    needs_map: bool = False
    rotate_half: bool | None = None
    adds_pos_embed: bool = False


def _detr(name: str, stand_in: type[StandIn] = AddedStandIn, tell: Callable[[Any], None] = tell_encoder) -> Family:
    place = detr_place(stand_in)
    return Family(towers=(f"{name}Model",), place=place, within="encoder", tell=tell, adds_pos_embed=True)


def _rt_detr(name: str) -> Family:
    return Family(towers=(f"{name}HybridEncoder",), place=aifi_place, tell=tell_maps, adds_pos_embed=True)


FAMILIES: dict[str, Family] = {
    "ViTAttention": Family(towers=("ViTModel",), place=whole(1)),
    "ViTMSNAttention": Family(towers=("ViTMSNModel",), place=whole(1)),
    "DeiTAttention": Family(towers=("DeiTModel",), place=whole(2)),
    "Dinov2Attention": Family(towers=("Dinov2Model", "Dinov2Backbone"), place=whole(1)),
    "Dinov2WithRegistersAttention": Family(
        towers=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"), place=whole(1, registers=True)
    ),
    "DINOv3ViTAttention": Family(
        towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        place=whole(1, registers=True, stand_in=RotaryStandIn),
        rotate_half=True,
    ),
    "IJepaAttention": Family(towers=("IJepaModel",), place=whole(0)),
    "SiglipAttention": Family(towers=("SiglipVisionModel",), place=whole(0)),
    "Siglip2Attention": Family(
        towers=("Siglip2VisionModel",), place=whole(0, stand_in=VariableGridStandIn), tell=tell_tower_of_patches
    ),
    "CLIPAttention": Family(towers=("CLIPVisionModel",), place=whole(1)),
    "AltCLIPAttention": Family(towers=("AltCLIPVisionModel",), place=whole(1)),
    "ChineseCLIPVisionAttention": Family(towers=("ChineseCLIPVisionModel",), place=whole(1)),
    "CLIPSegAttention": Family(towers=("CLIPSegVisionModel",), place=whole(1)),
    "MetaClip2Attention": Family(towers=("MetaClip2VisionModel",), place=whole(1)),
    "OwlViTAttention": Family(towers=("OwlViTVisionTransformer",), place=whole(1)),
    "Owlv2Attention": Family(towers=("Owlv2VisionTransformer",), place=whole(1)),
    "Aimv2Attention": Family(towers=("Aimv2VisionModel",), place=whole(0)),
    "Tipsv2VisionAttention": Family(
        towers=("Tipsv2VisionModel", "Tipsv2VisionBackbone"), place=whole(1, registers=True)
    ),
    "BlipAttention": Family(towers=("BlipVisionModel",), place=whole(1)),
    "Blip2Attention": Family(towers=("Blip2VisionModel",), place=whole(1)),
    "InstructBlipAttention": Family(towers=("InstructBlipVisionModel",), place=whole(1)),
    "Kosmos2VisionAttention": Family(towers=("Kosmos2VisionModel",), place=whole(1)),
    "Ovis2VisionAttention": Family(towers=("Ovis2VisionModel",), place=whole(0)),
    "PixioAttention": Family(towers=("PixioModel", "PixioBackbone"), place=pixio_place),
    "BeitAttention": Family(towers=("BeitModel",), place=whole(1), needs_map=True),
    "SwinAttention": Family(towers=("SwinModel",), place=swin_place, tell=tell_nothing, needs_map=True),
    "YolosSelfAttention": Family(towers=("YolosModel",), place=yolos_place, tell=tell_layers),
    "DPTSelfAttention": Family(towers=("DPTModel",), place=whole(1), tell=tell_layers),
    "SegformerAttention": Family(
        towers=("SegformerModel",), place=segformer_place, parts=segformer_parts, tell=tell_nothing
    ),
    "PvtV2SelfAttention": Family(
        towers=("PvtV2Model", "PvtV2Backbone"), place=pvt_v2_place, parts=pvt_v2_parts, tell=tell_nothing
    ),
    "HieraMaskUnitAttention": Family(
        towers=("HieraModel", "HieraBackbone"), place=hiera_place, parts=hiera_parts, tell=check_image_size
    ),
    "Swinv2SelfAttention": Family(
        towers=("Swinv2Model", "Swinv2Backbone"),
        place=swin_v2_place,
        parts=swin_v2_parts,
        tell=tell_nothing,
        needs_map=True,
    ),
    "RfDetrDinov2Attention": Family(
        towers=("RfDetrDinov2Backbone",), place=windowed(1, lambda layer: not layer.global_attention)
    ),
    "LwDetrViTAttention": Family(towers=("LwDetrViTBackbone",), place=windowed(0, lambda layer: bool(layer.window))),
    "DetrSelfAttention": _detr("Detr"),
    "ConditionalDetrSelfAttention": _detr("ConditionalDetr"),
    "TableTransformerAttention": _detr("TableTransformer", MarkedStandIn, tell_embeddings),
    "DetrAttention": _detr("DabDetr", MarkedStandIn, tell_embeddings),
    **{
        f"{name}SelfAttention": _rt_detr(name)
        for name in ("RTDetr", "RTDetrV2", "DFine", "Deimv2", "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4")
    },
}
"""By the name of the attention class, so that no model is imported before it is met."""

REASONS = {
    "DeformableDetrMultiscaleDeformableAttention": f"samples values at a few points: {NO_MAP}",
    "MobileViTV2LinearSelfAttention": f"sums its keys up to a single one: {NO_MAP}",
    "SwiftFormerEfficientAdditiveAttention": f"sums its queries up to a single one: {NO_MAP}",
    "CvtSelfAttention": "convolves its tokens apart for queries, keys and values, for which a mixer has no place",
}
"""Why no mixer can stand for some others, by the name of their class."""


def towers(model: nn.Module) -> Iterator[tuple[str, Any, Family]]:
    """The vision towers in a model, by module name."""
    by_class = {tower: family for family in FAMILIES.values() for tower in family.towers}
    for name, module in model.named_modules():
        family = by_class.get(_kind(module))
        if family is not None:
            yield name, module, family


def hugging_face_sites(model: Any) -> dict[str, Site]:
    """The self-attention of every vision tower in a model.

    Raises:
        UnsupportedHostError: There is none.
    """
    sites: dict[str, Site] = {}
    for tower_name, tower, family in towers(model):
        part, part_name = tower.get_submodule(family.within), ".".join(filter(None, (tower_name, family.within)))
        for layer_name, layer in part.named_modules(prefix=part_name):
            for name, module in layer.named_children():
                if FAMILIES.get(_kind(module)) is family:
                    full_name = f"{layer_name}.{name}".removeprefix(".")
                    sites[full_name] = _site(module, layer, tower, family)
    if sites:
        return sites
    found = attention_classes(model)
    reasons = "; ".join(f"{name} {REASONS[name]}" for name in found if name in REASONS)
    if reasons:
        raise UnsupportedHostError(f"{type(model).__name__} has no attention this can convert: {reasons}")
    known = sorted(tower for family in FAMILIES.values() for tower in family.towers)
    raise UnsupportedHostError(
        f"{type(model).__name__} has no vision tower this can convert (attention classes in it: "
        f"{', '.join(found) if found else 'none'}); supported: whatever contains one of {', '.join(known)}"
    )


def _site(module: Any, layer: Any, tower: Any, family: Family) -> Site:
    place = family.place(tower, layer)
    fields: dict[str, Any] = {
        "windows": place.windows,
        "needs_map": family.needs_map,
        "rotate_half": family.rotate_half,
        "adds_pos_embed": family.adds_pos_embed,
        "wrap": partial(_stand_in, place, module),
    }
    if isinstance(module, StandIn):
        return Site.of_mixer(module.mixer, **fields)
    weight, bias = _projections(module)
    head_dim = _first(module, "head_dim", "attention_head_size")
    scale, proj = _first(module, "scaling", "scale"), _first(module, "o_proj", "out_proj", "proj", "projection")
    drop = _first(module, "attention_dropout", "dropout_prob", "attn_drop", "dropout")
    return Site.of(
        module,
        feat_size=place.feat_size,
        num_prefix_tokens=place.num_prefix_tokens,
        num_heads=len(weight) // 3 // head_dim,
        qkv_weight=weight,
        qkv_bias=bias,
        proj=proj,
        with_proj=proj is not None,
        attn_drop=drop.p if isinstance(drop, nn.Dropout) else drop or 0.0,
        mixer_args={} if scale in (None, head_dim**-0.5) else {"scale": scale},
        init_weights=tower._init_weights,
        **fields | family.parts(module, place),
    )


def _stand_in(place: Place, module: nn.Module, mixer: TokenMixer) -> nn.Module:
    host = type(module).__bases__[1] if isinstance(module, StandIn) else type(module)
    kind: Any = converted_class(place.stand_in, host)
    return kind(mixer, module, **place.stand_in_args)  # type: ignore[no-any-return]


def _kind(module: nn.Module) -> str:
    """The name of the nearest class that is transformers' own."""
    names = (cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers."))
    return next(names, "")


def _first(module: nn.Module, *names: str) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _projections(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of queries, keys and values as one; a bias is zero where one has none, None where none has."""
    if hasattr(module, "qkv"):
        return module.qkv.weight, module.qkv.bias
    parts = [_first(module, f"{name[0]}_proj", name) for name in ("query", "key", "value")]
    weight = torch.cat([part.weight for part in parts])
    if all(part.bias is None for part in parts):
        return weight, None
    return weight, torch.cat(
        [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    )
