"""Every shape and argument check, in one place; each refusal carries the value and the remedy."""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ._typing import Key, OffGrid, Size2
from .errors import BackendError, FeatSizeError, OutputError, StaticKeyError, UnknownNameError


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the nearest names that are."""
    names = sorted(known)
    if not isinstance(name, str):
        raise UnknownNameError(f"{kind}={name!r} must be a name, such as {', '.join(names[:5])}")
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:12])}"
    own = "; --plugin FILE brings one of your own" if kind == "mixer" else ""
    raise UnknownNameError(f"unknown {kind} {name!r}; {hint}{own}")


def check_choice(**values: tuple[Any, Iterable[Any]]) -> None:
    """Refuse any keyword whose value is none of those it may have, given as a pair of both."""
    for name, (value, known) in values.items():
        if value not in tuple(known):
            raise StaticKeyError(f"{name}={value!r} must be one of {', '.join(map(str, known))}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_seed(seed: Any) -> None:
    """Refuse a seed that torch does not take."""
    if not _is_whole(seed, 0) or seed >= 2**63:
        raise StaticKeyError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")


def check_folder(**folders: str) -> None:
    """Refuse any keyword whose value is empty, which would be the current folder."""
    for name, folder in folders.items():
        if not folder:
            raise OutputError(f"{name}={folder!r} must name a folder; '.' is the current one")


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """Arguments by name, as a dict of their own; None means none."""
    if value is not None and not isinstance(value, Mapping):
        shown = repr(value) if isinstance(value, str | int | float | list | tuple) else f"a {type(value).__name__}"
        raise StaticKeyError(f"{name} is {shown}; it must map names to values")
    for key in {} if value is None else value:
        if not isinstance(key, str):
            raise StaticKeyError(f"{name} has the key {key!r}, which is no name; it must map names to values")
    return {} if value is None else dict(value)


def check_types(options: Any) -> None:
    """Refuse a dataclass of options in which one is not of its annotated type, or a number is not finite."""
    hints = get_type_hints(type(options))
    for field in fields(options):
        _check_type(field.name, getattr(options, field.name), hints[field.name])


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a function that are not of their annotated types; text and paths stand for each other."""
    hints = get_type_hints(function)
    for name, value in arguments.items():
        if name in hints:
            _check_type(name, value, hints[name], paths=True)


def _check_type(name: str, value: Any, hint: Any, paths: bool = False) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise StaticKeyError(f"{name}={value} must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise StaticKeyError(f"{name}={value} is more than torch counts; choose a smaller number")
    text = str(value) if isinstance(value, str | Path) else ""
    if "\0" in text or text.encode(errors="replace").decode() != text:
        raise StaticKeyError(f"{name}={text!r} holds a null character or is not UTF-8; write it otherwise")
    if not _is_of(value, hint, paths):
        raise StaticKeyError(f"{name}={reprlib.repr(value)} must be {type_in_words(hint)}")


def _is_of(value: Any, hint: Any, paths: bool = False) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if paths and hint in (str, Path):
        return isinstance(value, str | Path)
    if origin is Sequence:
        whole = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return whole and all(_is_of(item, args[0], paths) for item in value)
    if origin in (Union, UnionType):
        return any(_is_of(value, arg, paths) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_is_of(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or hint) and not (hint is int and isinstance(value, bool))


def type_in_words(hint: Any) -> str:
    """What a type's values are, in words; None, which means a default, is left out."""
    args = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_in_words(arg) for arg in args if arg is not NoneType)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, args))
    if hint == Size2:
        return "a pair of positive whole numbers"
    if get_origin(hint) is tuple:
        return "a list of finite numbers"
    if get_origin(hint) is Sequence:
        return f"a list, each {type_in_words(get_args(hint)[0])}"
    if isinstance(hint, type) and hint.__module__.startswith(("statickey.", "rich.")):
        return f"a {hint.__name__}"
    words = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", Path: "a path"}
    return words.get(hint, "names and their values")


def check_img_size(img_size: Any) -> Size2:
    """(height, width) in pixels, from one side or a pair."""
    pair = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(_is_whole(side, 1) for side in pair):
        raise FeatSizeError(f"img_size={img_size!r} must be one side in pixels, or a pair (height, width)")
    return pair[0], pair[1]


def check_positive(**values: int) -> None:
    """Refuse any keyword whose value is not a positive integer."""
    for name, value in values.items():
        if not _is_whole(value, 1):
            raise StaticKeyError(f"{name}={value!r} must be a positive integer")
        if value >= 2**63:
            raise StaticKeyError(f"{name}={value} is more than torch counts; choose a smaller number")


def check_count(**values: int) -> None:
    """Refuse any keyword whose value is neither zero nor a positive integer."""
    for name, value in values.items():
        if not _is_whole(value, 0):
            raise StaticKeyError(f"{name}={value!r} must be zero or a positive integer")


def check_rate(**values: float) -> None:
    """Refuse any keyword whose value is not a rate in [0, 1)."""
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < 1.0:
            raise StaticKeyError(f"{name}={value!r} must be in [0, 1)")


def check_probability(**values: float) -> None:
    """Refuse any keyword whose value is not a number in [0, 1]."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise StaticKeyError(f"{name}={value!r} must be in [0, 1]")


def check_not_negative(**values: float) -> None:
    """Refuse any keyword whose value is not a finite number from 0 on."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise StaticKeyError(f"{name}={value!r} must be a finite number")
        if value < 0:
            raise StaticKeyError(f"{name}={value!r} must not be negative; 0 switches it off")


_LARGEST = {"depth": 1000, "depths": 1000} | dict.fromkeys(
    ("embed_dim", "dims", "num_heads", "head_dim", "patch_size", "window_size"), 1_000_000
)
"""Arguments of hosts that count something, one number or one per stage, and how many it may be."""


def check_model_args(args: Mapping[str, Any]) -> None:
    """Refuse sizes and rates that no host can have, which hosts answer in many ways or not at all."""
    for name, value in args.items():
        if value is None:
            continue
        if name.endswith(("drop_rate", "drop_path_rate", "attn_drop", "proj_drop")):
            check_rate(**{name: value})
        for number in value if isinstance(value, list | tuple) else [value]:
            if name in _LARGEST and number is not None:
                check_positive(**{name: number})
                if number > _LARGEST[name]:
                    raise StaticKeyError(f"{name}={number} is more than {_LARGEST[name]:,}; choose a smaller one")


def check_head_dim(dim: int, num_heads: int, head_dim: int | None) -> int:
    """The width of one head: as given, or dim // num_heads where that divides."""
    check_positive(dim=dim, num_heads=num_heads)
    if head_dim is not None:
        check_positive(head_dim=head_dim)
        return head_dim
    if dim % num_heads:
        near = nearest_divisors(dim, num_heads)
        raise StaticKeyError(
            f"dim={dim} is not divisible by num_heads={num_heads}; "
            f"use num_heads in {near} or pass head_dim explicitly"
        )
    return dim // num_heads


def nearest_divisors(whole: int, wanted: int) -> list[int]:
    """The three divisors of ``whole`` that are nearest to ``wanted``, ascending."""
    small = [d for d in range(1, min(math.isqrt(whole), 1_000_000) + 1) if whole % d == 0]
    divisors = sorted({*small, *(whole // d for d in small)})
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:3])


def check_rank(name: str, tensor: torch.Tensor, axes: str) -> None:
    """Refuse a tensor without exactly these axes, written like ``"B h N d"``."""
    if tensor.ndim != axes.count(" ") + 1:
        raise StaticKeyError(f"{name} {tuple(tensor.shape)} must be ({', '.join(axes.split())})")


def check_feat_size(feat_size: Size2, name: str = "feat_size") -> Size2:
    """A (H, W) pair of positive integers, as a plain tuple."""
    if not isinstance(feat_size, tuple | list) or len(feat_size) != 2:
        raise FeatSizeError(f"{name}={feat_size!r} must be a pair (H, W) of token counts")
    height, width = feat_size
    for extent in (height, width):
        if not (_is_whole(extent, 1) or isinstance(extent, torch.SymInt)):  # a symbol while a model is exported
            raise FeatSizeError(f"{name}={feat_size!r} must hold two positive integers")
    return height, width


def check_key_options(key: Key, key_size: Size2 | None, off_grid: OffGrid) -> Size2 | None:
    """Refuse options of a static key that do not exist or do not go together; ``key_size`` as a plain tuple."""
    for name, value, known in (("key", key, get_args(Key)), ("off_grid", off_grid, get_args(OffGrid))):
        if value not in known:
            raise StaticKeyError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
    if key_size is None:
        return None
    if off_grid == "window":
        raise StaticKeyError(
            f"key_size={key_size!r} with off_grid='window': a window's key has its grid; leave one out"
        )
    return check_feat_size(key_size, "key_size")


def check_saved_grid(state: Any, name: str = "_extra_state") -> tuple[Size2, Size2]:
    """The grids (H, W) of tokens and of keys that a checkpoint carries, a tensor of two or, if they differ, four."""
    shown = type(state).__name__
    if isinstance(state, torch.Tensor):
        shown = str(state.tolist()) if state.numel() <= 4 else f"{tuple(state.shape)} of {state.dtype}"
        if state.shape in ((2,), (4,)) and state.dtype != torch.bool and not state.is_complex():
            extents = state.tolist()
            if all(extent >= 1 and extent % 1 == 0 for extent in extents):
                height, width, *key_grid = map(int, extents)
                return (height, width), (key_grid[0], key_grid[1]) if key_grid else (height, width)
    raise FeatSizeError(
        f"{name} in the checkpoint is {shown}, but must be a grid (H, W), a tensor of two positive integers; "
        "save the checkpoint again with model.state_dict()"
    )


def check_kernel_size(kernel_size: int) -> None:
    """Refuse a convolution kernel that has no centre."""
    if not _is_whole(kernel_size, 1) or kernel_size % 2 == 0:
        raise StaticKeyError(f"kernel_size={kernel_size!r} must be an odd positive integer")


def check_tokens(x: torch.Tensor, dim: int, feat_size: Size2, num_prefix_tokens: int) -> None:
    """Refuse an input that is not (B, num_prefix_tokens + H*W, dim)."""
    expected = num_prefix_tokens + feat_size[0] * feat_size[1]
    if x.ndim != 3 or x.shape[2] != dim:
        raise FeatSizeError(f"x has shape {tuple(x.shape)}, expected (B, {expected}, {dim})")
    if x.shape[1] != expected:
        raise FeatSizeError(
            f"x has {x.shape[1]} tokens, but feat_size={feat_size} with {num_prefix_tokens} prefix tokens "
            f"makes {expected}; pass feat_size=(H, W) of this input, or call the layer's set_input_size((H, W)) first"
        )


def check_map(x: torch.Tensor, dim: int, num_prefix_tokens: int, *, channels_first: bool) -> None:
    """Refuse an input that is not a map of tokens, (B, H, W, dim) or (B, dim, H, W)."""
    if x.ndim != 4 or x.shape[1 if channels_first else 3] != dim:
        expected = f"(B, {dim}, H, W)" if channels_first else f"(B, H, W, {dim})"
        raise FeatSizeError(f"x has shape {tuple(x.shape)}, expected {expected}")
    if num_prefix_tokens:
        raise FeatSizeError(
            f"a map has no place for num_prefix_tokens={num_prefix_tokens}; pass tokens (B, N, {dim})"
        )


def check_not_causal(is_causal: bool) -> None:
    """Refuse causal attention, which timm's Block can ask for."""
    if is_causal:
        raise StaticKeyError("is_causal=True: tokens of an image have no order; pass an attn_mask instead")


def check_no_mask(mixer: str, attn_mask: torch.Tensor | None) -> None:
    """Refuse a mask in a mixer that has no attention map to put it on."""
    if attn_mask is not None:
        raise StaticKeyError(f"attn_mask given, but {mixer} makes no attention map from its input; leave it None")


def check_static_key_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    scale: float | torch.Tensor | None,
    mask_diagonal: bool,
    query_offset: int,
    attn_mask: torch.Tensor | None,
    key_count: torch.Tensor | None,
    query_shape: Sequence[int] | None = None,
) -> None:
    """Refuse inputs of the op whose shapes or dtypes do not fit together, the query as if it had ``query_shape``."""
    if query.ndim != 4 or key.ndim not in (3, 4):
        raise StaticKeyError(
            f"query {tuple(query.shape)} must be (B, h, N, d) and the key {tuple(key.shape)} (h, M, d), "
            "or (B, h, M, d) when it is dynamic"
        )
    batch, heads, num_queries, width = query.shape if query_shape is None else query_shape
    *images, key_heads, num_keys, key_width = key.shape
    if key_heads != heads or key_width != width or (images and images[0] != batch):
        raise StaticKeyError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ: with {batch} images, {heads} heads and "
            f"width {width} the key must be ({heads}, M, {width}) or ({batch}, {heads}, M, {width})"
        )
    if not query.is_floating_point():
        raise StaticKeyError(f"query is {query.dtype}; attention needs a floating-point dtype")
    if scale is not None:
        check_scale(scale)
    if value is not None and (value.ndim != 4 or value.shape[:3] != (batch, heads, num_keys)):
        raise StaticKeyError(f"value {tuple(value.shape)} must be ({batch}, {heads}, {num_keys}, head_dim)")
    if key_bias is not None and key_bias.shape != (heads, num_keys):
        raise StaticKeyError(f"key_bias {tuple(key_bias.shape)} must be ({heads}, {num_keys})")
    if key_count is not None:
        if not isinstance(key_count, torch.Tensor):
            raise StaticKeyError(f"key_count is a {type(key_count).__name__}; pass a tensor of floats ({num_keys},)")
        if key_count.shape != (num_keys,) or not key_count.is_floating_point():
            shown = f"key_count {tuple(key_count.shape)} of {key_count.dtype}"
            raise StaticKeyError(f"{shown} must be floats ({num_keys},)")
        if key_count.device != query.device:
            raise StaticKeyError(f"key_count is on {key_count.device}, the query on {query.device}; move one of them")
    dtype = query.dtype
    for name, tensor in (("key", key), ("value", value), ("key_bias", key_bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise StaticKeyError(f"{name} is {tensor.dtype}, the query {dtype}; cast one of them")
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise StaticKeyError(
                f"attn_mask is {attn_mask.dtype}; pass bool, true where attention is allowed, or a floating dtype"
            )
        if attn_mask.device != query.device:
            raise StaticKeyError(f"attn_mask is on {attn_mask.device}, the query on {query.device}; move one of them")
        full = (batch, heads, num_queries, num_keys)
        missing = len(full) - attn_mask.ndim
        if missing < 0 or any(
            size not in (1, want) for size, want in zip(attn_mask.shape, full[missing:], strict=True)
        ):
            raise StaticKeyError(f"attn_mask {tuple(attn_mask.shape)} must broadcast to (B, h, N, M) = {full}")
    if mask_diagonal:
        if num_keys < 2:
            raise StaticKeyError("mask_diagonal=True needs at least 2 keys, else nothing is left to attend to")
        if not 0 <= query_offset <= num_keys - num_queries:
            raise StaticKeyError(
                f"query_offset={query_offset} places {num_queries} queries outside the {num_keys} keys"
            )


def check_scale(scale: Any) -> None:
    """Refuse a factor on the logits that is neither a finite number nor a floating-point 0-dim tensor."""
    if isinstance(scale, torch.Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            raise StaticKeyError(
                f"scale {tuple(scale.shape)} of {scale.dtype} must be a number or a floating-point 0-dim tensor"
            )
        return
    try:
        finite = -math.inf < scale < math.inf
    except TypeError:
        finite = False
    if not finite:
        raise StaticKeyError(f"scale={scale!r} must be a finite number")


def check_dtype(dtype: Any) -> None:
    """Refuse a type of parameters that is not a floating-point one; None is torch's default."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise StaticKeyError(f"dtype={dtype!r} must be a floating-point torch.dtype, such as torch.float32")


def check_backend(backend: str, known: Iterable[str]) -> None:
    """Refuse a backend that does not exist."""
    if backend not in known:
        raise BackendError(f"unknown backend {backend!r}; choose one of {', '.join(sorted(known))}")


def check_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    traced: bool,
    installed: bool,
    interpreted: bool,
) -> None:
    """Refuse what the Triton kernel cannot run on; ``interpreted``: on the CPU, by Triton's interpreter."""
    if not installed:
        raise BackendError("backend='triton' needs triton, which is not installed; use backend='sdpa'")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BackendError(
            f"backend='triton' does not compute in {query.dtype}; use float32, bfloat16 or float16, or backend='sdpa'"
        )
    if query.device.type not in ("cuda", "cpu" if interpreted else "cuda"):
        raise BackendError(
            f"backend='triton' needs CUDA, but the query is on {query.device.type}; use backend='sdpa', "
            "or set TRITON_INTERPRET=1 to try the kernel without a GPU"
        )
    if interpreted and query.dtype == torch.bfloat16:
        raise BackendError(
            "backend='triton' cannot compute in torch.bfloat16 under TRITON_INTERPRET=1, whose products take it for "
            "integers; use float32 or float16"
        )
    reasons = {
        "takes no dynamic key (B, h, M, d), which self-attention has": key.ndim == 4,
        "takes no attn_mask": attn_mask is not None,
        f"has no dropout, but dropout_p={dropout_p} (attn_drop of a layer in training)": dropout_p > 0,
        "does not run while the call is traced, exported, compiled or transformed by torch.func": traced,
    }
    for reason, holds in reasons.items():
        if holds:
            raise BackendError(f"backend='triton' {reason}; use backend='sdpa'")
