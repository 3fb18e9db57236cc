"""Loading weights into a model of another size, layout or attention, and a report of what was taken."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from timm.models._input import get_pretrained_grid_size
from timm.models.metaformer import MetaFormer
from torch import Tensor, nn

from .._checks import check_mapping, check_saved_grid
from .._typing import Size2
from ..convert import token_mixers
from ..convert.metaformers import HEAD_DIM
from ..errors import StaticKeyError
from ..layers import AttentionMixer, GridState, PartlyStaticAttention, TokenMixer
from .reference import accept_reference_layout, same_but_for_ones


@dataclass(frozen=True)
class LoadReport:
    """What ``warm_start`` did, by tensor name. ``print`` it for a summary."""

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = {"taken": self.taken, "fresh": self.fresh, "unused": self.unused}
        return "\n".join(f"{kind} {len(names)}: {_modules(names)}" for kind, names in parts.items())


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Bring a checkpoint to a model's layout and input size, as timm's loaders call it.

    Accepts this package's layout, the layout of timm's own state dicts, the reference's and the official
    MetaFormer release's. Static keys, position embeddings and biases, and patch kernels of another image, patch or
    key size are resampled; the grid they were saved on is read from the checkpoint. A continuous key is taken as it
    is, to be evaluated on the model's ``key_size``. Shifted patches are adapted to another number of channels (for
    convolutions timm's loader does that). What does not fit passes unchanged, and loading it names it.

    Args:
        state_dict: The checkpoint.
        model: The model it will be loaded into.

    Returns:
        Names and tensors for ``model.load_state_dict``.

    Raises:
        StaticKeyError: Not a mapping, an entry of another kind than the model's, or a reference checkpoint whose
            heads are not the model's.
        FeatSizeError: A key has another number of rows than the grid saved beside it.
    """
    out = dict(accept_reference_layout(check_mapping("state_dict", state_dict), model))
    _check_kinds(out, model)
    patch_grid = None
    for prefix, mixer in token_mixers(model).items():
        extra = f"{prefix}._extra_state"
        if extra not in out:
            continue
        patch_grid, key_grid = check_saved_grid(out[extra], extra)
        if (patch_grid, key_grid) == (mixer.feat_size, mixer.key_grid):
            continue
        names = [name for name in mixer.grid_parameters if f"{prefix}.{name}" in out]
        resampled = mixer.resample_state({name: out[f"{prefix}.{name}"] for name in names}, key_grid)
        out |= {f"{prefix}.{name}": tensor for name, tensor in resampled.items()}
        if isinstance(mixer, GridState):
            out[extra] = mixer.get_extra_state()
        _fit_position_bias(out, model, prefix.removesuffix(".mixer"), patch_grid, mixer.feat_size)
    if hasattr(model, "patch_embed"):
        _fit_patches(out, model, patch_grid)
    return out


def warm_start(model: nn.Module, state_dict: Mapping[str, Any]) -> LoadReport:
    """Load everything of another model's weights that fits, and say what did.

    Query and value rows are taken from a packed ``qkv`` where the model has ``qv`` or ``v``; the rest goes by name
    and shape. For instance a CAFormer's weights into ``cskaformer_s18``, or a ViT's into
    ``ska_vit_small_patch16_224``. Projections whose heads differ stay fresh, as far as the state dict shows its
    heads: by a key, or in a MetaFormer by timm's 32 channels a head.

    Args:
        model: Changed in place.
        state_dict: Weights in any layout that ``checkpoint_filter_fn`` accepts.

    Returns:
        Names of the model's tensors that were taken and that stayed fresh, and of the given ones not used.

    Raises:
        StaticKeyError: No tensor fits, a parameter would not be finite, or as ``checkpoint_filter_fn``.
    """
    given = checkpoint_filter_fn(state_dict, model)
    own = model.state_dict(keep_vars=True)
    used: set[str] = set()
    taken: dict[str, Tensor] = {}
    mixers = token_mixers(model)
    foreign = {prefix for prefix, mixer in mixers.items() if not _same_heads(prefix, mixer, given, model)}
    for name, target in own.items():
        source, rows = _source(name, given)
        module = name.rpartition(".")[0]
        if source is None or not isinstance(given[source], Tensor) or foreign & {module, module.rpartition(".")[0]}:
            continue
        if rows is not None and given[source].ndim == 0:
            continue
        tensor = given[source] if rows is None else torch.cat([given[source].chunk(3)[row] for row in rows])
        mixer = mixers.get(module.rpartition(".")[0])
        if rows == (1,) and isinstance(mixer, PartlyStaticAttention):
            tensor = tensor[mixer.key_channels()]
        if same_but_for_ones(tensor, target):
            taken[name] = tensor.reshape(target.shape)
            used.add(source)
    if not taken:
        raise StaticKeyError(
            f"nothing fits: the model has {next(iter(own))!r}, the weights start with "
            f"{next(iter(given), 'nothing')!r}; take those of a model of the same family and width"
        )
    check_finite(model, taken)
    model.load_state_dict(taken, strict=False)
    fresh = [name for name in own if name not in taken and not name.endswith("_extra_state")]
    unused = [name for name in given if name not in used]
    return LoadReport(tuple(taken), tuple(fresh), tuple(unused))


def check_finite(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse parameters that are not finite, with which no training begins; a buffer may well be, such as a mask."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in state and not state[name].isfinite().all():
            raise StaticKeyError(f"{name} holds values that are not finite; give weights that are")


def _check_kinds(state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse what cannot be brought to the model's tensor of that name, whatever the grids."""
    tied = {f"{prefix}.{name}" for prefix, mixer in token_mixers(model).items() for name in mixer.grid_parameters}
    for name, own in model.state_dict(keep_vars=True).items():
        if name not in state or not isinstance(own, Tensor) or name.endswith("_extra_state"):
            continue
        other = state[name]
        if not isinstance(other, Tensor):
            raise StaticKeyError(f"{name} is a {type(other).__name__} in the checkpoint, it must be a tensor")
        if own.is_floating_point() and not other.is_floating_point():
            raise StaticKeyError(f"{name} is {other.dtype} in the checkpoint, the model has {own.dtype}; cast it")
        if own.ndim != other.ndim and (name in tied or name == "pos_embed"):
            raise StaticKeyError(
                f"{name} is {tuple(other.shape)} in the checkpoint, which is not {tuple(own.shape)} on another grid; "
                "give weights of this model"
            )


def _source(name: str, given: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...] | None]:
    """The tensor to fill ``name`` from, and which thirds of it."""
    if name in given:
        return name, None
    for own, rows in {"qv": (0, 2), "k": (1,), "v": (2,)}.items():
        packed = re.sub(rf"\.{own}\.(weight|bias)$", r".qkv.\1", name)
        if packed != name and packed in given:
            return packed, rows
    return None, None


def _same_heads(prefix: str, mixer: TokenMixer, given: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether the given projections of a mixer have its heads, as far as can be told."""
    if not isinstance(mixer, AttentionMixer):
        return True
    for key in ("static_key", "prefix_key", "conv_key"):
        tensor = given.get(f"{prefix}.{key}")
        if tensor is not None:
            own = len(mixer.static_heads) if isinstance(mixer, PartlyStaticAttention) else mixer.num_heads
            shown = tuple(tensor.shape[::2][:2])
            return shown in ((own, mixer.head_dim), (mixer.num_heads, mixer.head_dim))
        tensor = given.get(f"{prefix}.{key}.weight")
        if tensor is not None:
            return tuple(tensor.shape[:2]) == (mixer.num_heads, mixer.head_dim)
    former = isinstance(model, MetaFormer)
    return not (former and f"{prefix}.qkv.weight" in given) or mixer.head_dim == HEAD_DIM


def _fit_position_bias(
    state: dict[str, Any], model: nn.Module, prefix: str, old_grid: Size2, feat_size: Size2
) -> None:
    """Resample the bias table beside a key, in the layout of Swin and BEiT."""
    name = f"{prefix}.rel_pos.relative_position_bias_table"
    if name not in state:
        return
    own, given = model.get_parameter(name), state[name]
    added = len(own) - _num_distances(feat_size)  # of the class token
    if given.shape == (_num_distances(old_grid) + added, own.shape[1]):
        state[name] = resize_rel_pos_bias_table(
            given, new_window_size=feat_size, new_bias_shape=tuple(own.shape), old_window_size=old_grid
        )


def _num_distances(grid: Size2) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _fit_patches(state: dict[str, Any], model: Any, patch_grid: Size2 | None) -> None:
    weight = state.get("patch_embed.proj.weight")
    pos_embed = state.get("pos_embed")
    num_patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if pos_embed is not None and getattr(model, "pos_embed", None) is not None and num_patches is not None:
        # the difference to the patches is the prefix, wherever a host keeps its class token
        num_prefix = model.pos_embed.shape[1] - num_patches
        if patch_grid is None:
            kernel = weight if weight is not None and weight.ndim == 4 else torch.empty(model.patch_embed.patch_size)
            kernel = kernel.reshape(-1, 1, *kernel.shape[-2:])  # only its extent is read
            patch_grid = get_pretrained_grid_size(model, kernel, pos_embed.shape[1] - num_prefix)
        side = math.isqrt(max(pos_embed.shape[1] - num_prefix, 0))
        if patch_grid is None and side * side == pos_embed.shape[1] - num_prefix:
            patch_grid = (side, side)  # as timm assumes of position embeddings; keys carry their grid
        fits = patch_grid is not None and pos_embed.shape[1] == num_prefix + patch_grid[0] * patch_grid[1]
        if fits and patch_grid != tuple(model.patch_embed.grid_size):
            state["pos_embed"] = resample_abs_pos_embed(
                pos_embed,
                new_size=model.patch_embed.grid_size,
                old_size=patch_grid,
                num_prefix_tokens=num_prefix,
            )
    if weight is None:
        return
    target = model.patch_embed.proj.weight
    if weight.ndim == 4 == target.ndim and weight.shape[2:] != target.shape[2:]:
        state["patch_embed.proj.weight"] = resample_patch_embed(weight, list(target.shape[2:]))
    elif weight.ndim == 2 == target.ndim and weight.shape[1] != target.shape[1]:
        _fit_shifted_patches(state, model.patch_embed)


def _fit_shifted_patches(state: dict[str, Any], patch_embed: Any) -> None:
    """Adapt normalised, shifted patches (row, column, copy, channel) to another number of channels."""
    area = patch_embed.patch_size[0] * patch_embed.patch_size[1]
    copies = patch_embed.norm.weight.shape[0] // (area * patch_embed.in_chans)
    weight = state["patch_embed.proj.weight"]
    if weight.shape[1] != area * copies * 3:  # another patch size, or not of the three colours timm adapts
        return
    patches = weight.reshape(weight.shape[0], area, copies, -1).permute(0, 3, 1, 2)
    adapted = adapt_input_conv(patch_embed.in_chans, patches).permute(0, 2, 3, 1)
    state["patch_embed.proj.weight"] = adapted.reshape(weight.shape[0], -1)
    for name in ("patch_embed.norm.weight", "patch_embed.norm.bias"):
        if name not in state or state[name].shape != weight.shape[1:]:
            continue
        mean = state[name].reshape(area * copies, -1).mean(dim=1, keepdim=True)
        state[name] = mean.expand(-1, patch_embed.in_chans).reshape(-1)


def _modules(names: tuple[str, ...]) -> str:
    """Tensor names with the indices of blocks folded, and how many tensors each stands for."""
    folded = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in folded.items()]
    return (
        ", ".join(shown[:12]) + (f" and {len(shown) - 12} more kinds" if len(shown) > 12 else "") if shown else "none"
    )
