"""Checkpoints trained with the reference implementation and with the official MetaFormer release.

The layouts are described, with their slips, in Hu, Zhou, Rostami, arXiv 2412.07049 and its code. Two families: a
MetaFormer whose names are those of the official release plus ``k``, ``v``, ``qv`` and ``to_k`` in a token mixer, and
a small vision transformer (``to_patch_embedding``, ``transformer.layers``).
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._checks import check_mapping
from ..convert import check_shapes, token_mixers
from ..errors import StaticKeyError
from ..layers import TokenMixer

_FORMER_NAMES = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"(stem|downsample)\.(?:pre|post)_norm\.", r"\1.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
]
_VIT_NAMES = [
    (r"^to_patch_embedding\.to_patch_tokens\.1\.", "patch_embed.norm."),
    (r"^to_patch_embedding\.to_patch_tokens\.2\.", "patch_embed.proj."),
    (r"^pos_embedding$", "pos_embed"),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
    (r"^transformer\.layers\.(\d+)\.0\.fn\.", r"blocks.\1.attn."),
    (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
    (r"^mlp_head\.0\.", "norm."),
    (r"^mlp_head\.1\.", "head."),
]
_MIXER_NAMES = [
    (r"\.k$", ".static_key"),
    (r"\.k2$", ".prefix_key"),
    (r"\.to_k\.weight$", ".conv_key"),
    (r"\.to_k\.bias$", ".conv_bias"),
    (r"\.to_(qkv|qv|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj."),
    (r"\.temperature$", ".log_temperature"),
]


def load_reference_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load a checkpoint of the reference implementation, exactly.

    Args:
        model: A model of this package with the checkpoint's sizes, such as ``cskaformer_s18``.
        state_dict: The checkpoint, or its ``"model"`` or ``"state_dict"`` entry.

    Raises:
        StaticKeyError: Not a checkpoint of the reference, or of another model: names the first tensor that
            differs.
    """
    state_dict = unwrap(check_mapping("state_dict", state_dict))
    if not is_reference_layout(state_dict):
        first = next(iter(state_dict), "nothing")
        raise StaticKeyError(
            f"not a checkpoint of the reference implementation: it starts with {first!r}; it should have "
            "'downsample_layers.0.conv.weight' or 'pos_embedding'. Load others with load_state_dict or warm_start"
        )
    converted = from_reference(state_dict, model)
    check_shapes(model, converted)
    own = model.state_dict()
    for kind, names in {"lacks": own.keys() - converted.keys(), "has": converted.keys() - own.keys()}.items():
        if names:
            raise StaticKeyError(
                f"the checkpoint {kind} {sorted(names)[0]!r}, in the model's names; build the model with the token "
                "mixers, depths and num_classes it was trained with"
            )
    model.load_state_dict(converted)


def accept_reference_layout(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Rename a reference checkpoint to the model's names; pass any other through."""
    state_dict = unwrap(state_dict)
    return from_reference(state_dict, model) if is_reference_layout(state_dict) else state_dict


def unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of a checkpoint that keeps them under ``"model"`` or ``"state_dict"``."""
    for name in ("model", "state_dict"):
        inner = state_dict.get(name)
        if isinstance(inner, Mapping):
            return inner
    return state_dict


def is_reference_layout(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the reference, or of the official MetaFormer release."""
    return any(name.startswith(("downsample_layers.", "to_patch_embedding.")) for name in state_dict)


def from_reference(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Rename and reshape a reference checkpoint for a model of the same sizes.

    The CSKA of the reference's small vision transformer does not scale its convolution logits, ours multiplies
    them by the learned temperature: the temperature is divided out of its kernels.

    Args:
        state_dict: Names and tensors in the reference's layout.
        model: The model to load.

    Returns:
        Names and tensors in the model's layout, with the grid of every key.
    """
    vit = any(name.startswith("to_patch_embedding.") for name in state_dict)
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    mixers = token_mixers(model)
    out: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise StaticKeyError(f"{name} is a {type(tensor).__name__} in the checkpoint, it must be a tensor")
        for pattern, replacement in (_VIT_NAMES if vit else _FORMER_NAMES) + _MIXER_NAMES:
            name = re.sub(pattern, replacement, name)
        target = own.get(name)
        # pointwise convolutions are linear layers in a stage of tokens, and the other way round
        if isinstance(target, Tensor) and same_but_for_ones(target, tensor):
            tensor = tensor.reshape(target.shape)
        mixer = mixers.get(name.rpartition(".")[0])
        if mixer is not None and name.endswith((".conv_key", ".conv_bias")):
            tensor = _unfold_heads(name, tensor, mixer)
        out[name] = tensor
    if vit:
        _divide_temperatures(out)
    for name in own:
        if name.endswith("._extra_state") and any(key.startswith(name.removesuffix("_extra_state")) for key in out):
            out.setdefault(name, own[name])
    return out


def same_but_for_ones(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ at most by axes of extent one."""
    return [size for size in a.shape if size != 1] == [size for size in b.shape if size != 1]


def _unfold_heads(name: str, tensor: Tensor, mixer: TokenMixer) -> Tensor:
    """(h*N, ...) to (h, N, ...)."""
    if tensor.shape[0] % mixer.num_heads:
        raise StaticKeyError(
            f"{name}: {tensor.shape[0]} channels in the checkpoint are not divisible by num_heads={mixer.num_heads} "
            "of the model; build the model with the heads it was trained with"
        )
    return tensor.reshape(mixer.num_heads, -1, *tensor.shape[1:])


def _divide_temperatures(state: dict[str, Any]) -> None:
    temperature = {name: name.rpartition(".")[0] + ".log_temperature" for name in state}
    scaled = [name for name in state if name.endswith((".conv_key", ".conv_bias")) and temperature[name] in state]
    if not scaled:
        return
    warnings.warn(
        "this CSKA checkpoint was trained by code that puts every output row one token off and masks the wrong "
        "diagonal; its weights are loaded, but the outputs are those of the method as published, not of that code: "
        "train it further before use",
        stacklevel=4,
    )
    for name in scaled:
        state[name] = state[name] / state[temperature[name]].exp()
