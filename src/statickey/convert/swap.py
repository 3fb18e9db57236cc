"""The one swap path: a model's attention modules are replaced by mixers, all of them or none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .._checks import check_name
from .._typing import Size2
from ..errors import StaticKeyError, UnsupportedHostError
from ..layers import MIXERS, TokenMixer


@dataclass(frozen=True)
class ConvertedModule:
    """One attention module that was replaced."""

    name: str
    feat_size: Size2
    params_before: int
    params_after: int


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert`` did."""

    mixer: str
    modules: tuple[ConvertedModule, ...]


def convert(
    model: nn.Module,
    mixer: str,
    *,
    keep_weights: bool = True,
    mixer_args: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Replace the attention of a timm vision transformer by a mixer, in place.

    The mixers' own parameters are drawn under a forked random state, so a model built and converted at one
    seed shares every other weight, bit for bit, with its siblings that got another mixer.

    Args:
        model: A timm ``VisionTransformer`` with plain attention and a fixed input size.
        mixer: A name in ``MIXERS``.
        keep_weights: Carry over the host's query, value and output projections where the mixer has them.
        mixer_args: Further constructor arguments of the mixer, such as ``kernel_size``.

    Returns:
        Which modules were replaced, their grids and parameters. On any error the model is unchanged.

    Raises:
        UnknownNameError: No mixer of that name.
        UnsupportedHostError: The model, or one of its attention modules, is of a kind this cannot swap.
        StaticKeyError: The mixer refuses its arguments.
    """
    check_name("mixer", mixer, MIXERS)
    if not isinstance(model, VisionTransformer):
        raise UnsupportedHostError(
            f"{type(model).__name__} is not a timm VisionTransformer; build the host with "
            "timm.create_model('vit_small_patch16_224') or another vit_* / deit_* name"
        )
    if model.dynamic_img_size:
        raise UnsupportedHostError("dynamic_img_size=True: a static key needs the grid; use img_size= instead")
    hosts: dict[str, Any] = {
        f"blocks.{i}.attn": block.attn for i, block in enumerate(model.blocks) if hasattr(block, "attn")
    }
    if len(hosts) != len(model.blocks):
        raise UnsupportedHostError(f"blocks of type {type(model.blocks[0]).__name__} hold no attn module")
    height, width = model.patch_embed.grid_size
    feat_size = (height, width)
    with torch.random.fork_rng():
        swapped = {
            name: _build_mixer(name, host, mixer, feat_size, model.num_prefix_tokens, mixer_args)
            for name, host in hosts.items()
        }
    if keep_weights:
        for name, host in hosts.items():
            _carry_over(host, swapped[name])
    for name, new in swapped.items():
        model.get_submodule(name.removesuffix(".attn")).attn = new
    return ConversionReport(
        mixer,
        tuple(
            ConvertedModule(name, feat_size, _num_params(host), _num_params(swapped[name]))
            for name, host in hosts.items()
        ),
    )


def _build_mixer(
    name: str,
    host: Any,
    mixer: str,
    feat_size: Size2,
    num_prefix_tokens: int,
    mixer_args: Mapping[str, Any] | None,
) -> TokenMixer:
    plain = (
        type(host) is Attention
        and host.gate is None
        and all(isinstance(norm, nn.Identity) for norm in (host.q_norm, host.k_norm, host.norm))
    )
    if not plain:
        raise UnsupportedHostError(
            f"{name} is a {type(host).__name__} with parts that cannot be carried over; "
            "supported: timm's Attention without qk_norm, scale_norm and gate"
        )
    weight = host.qkv.weight
    try:
        new = MIXERS[mixer](
            host.proj.out_features,
            host.num_heads,
            feat_size=feat_size,
            num_prefix_tokens=num_prefix_tokens,
            head_dim=host.head_dim,
            qkv_bias=host.qkv.bias is not None,
            proj_bias=host.proj.bias is not None,
            attn_drop=host.attn_drop.p,
            proj_drop=host.proj_drop.p,
            device=weight.device,
            dtype=weight.dtype,
            **({} if mixer_args is None else mixer_args),
        )
    except TypeError as error:
        raise StaticKeyError(f"mixer {mixer!r}: {error}") from None
    return new.train(host.training)


@torch.no_grad()
def _carry_over(host: Any, mixer: TokenMixer) -> None:
    """Copy the rows of the host's qkv that the mixer has too, and the output projection."""
    rows = {"qkv": (0, 1, 2), "qv": (0, 2), "v": (2,)}
    for name, parts in rows.items():
        target = getattr(mixer, name, None)
        if target is None:
            continue
        for tensor in ("weight", "bias"):
            if getattr(host.qkv, tensor) is not None:
                source = getattr(host.qkv, tensor).chunk(3)
                getattr(target, tensor).copy_(torch.cat([source[part] for part in parts]))
    if hasattr(mixer, "proj"):
        cast(nn.Linear, mixer.proj).load_state_dict(host.proj.state_dict())


def _num_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
