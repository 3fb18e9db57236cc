"""Reading a layer's queries, keys and values while a model runs on images, and no further than needed."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StaticKeyError, UnsupportedHostError
from ...layers import PartlyStaticAttention, SelfAttention, TokenMixer
from ..keys import token_mixers

MAP_BYTES = 2**27
"""Of one layer's maps that a batch may make, float64."""
MIN_IMAGES = 8
_IMAGE_KEYS = ("pixel_values", "image", "images")


@dataclass(frozen=True)
class LayerCall:
    """What one layer attends with, on some images or windows.

    Args:
        query: Scaled, so that logits are ``query . key``, (B, h, N, d).
        key: (B, h, N, d).
        value: (B, h, N, d).
        mask: Added to the logits, (1 or B, 1 or h, N, N), or None.
        num_images: How many images these are; fewer than B in windows.
        rope: By which the host turned queries and keys, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    num_images: int
    rope: Tensor | None = None

    def maps(self) -> tuple[Tensor, Tensor]:
        """The maps and their logarithms, (B, h, N, N), float64."""
        return self.maps_of(self.query.double() @ self.key.double().mT)

    def maps_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of other logits (B, h, N, N), under this call's mask, and their logarithms."""
        log_maps = (logits if self.mask is None else logits + self.mask).log_softmax(dim=-1)
        return log_maps.exp(), log_maps


class _EnoughError(Exception):
    """Raised where the rest of a forward pass is not needed."""


def attention_at(model: nn.Module, name: str) -> SelfAttention | PartlyStaticAttention:
    """What stands at a place of a model whose attention was converted to ``"mhsa"``, unless it was partly static.

    Raises:
        UnsupportedHostError: Another mixer stands there, or its heads cannot be told from one another.
    """
    place = model.get_submodule(name)
    mixer: TokenMixer = place if isinstance(place, TokenMixer) else next(iter(token_mixers(place).values()))
    if not isinstance(mixer, SelfAttention | PartlyStaticAttention):
        raise UnsupportedHostError(f"{name} is a {type(mixer).__name__} already; name other layers, or build it anew")
    reasons = {
        "mixes the logits of all heads (talking heads), so none has a map of its own to fit": mixer.head_mix
        is not None,
        "adds a position bias that queries make": mixer.query_bias is not None,
        "takes keys from fewer tokens": mixer.reduction is not None,
        f"makes one query of {mixer.tokens_per_query} tokens": mixer.tokens_per_query > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedHostError(f"{name} {reason}; convert it without calibration, or name other layers")
    return mixer


def dynamic_heads(mixer: SelfAttention | PartlyStaticAttention) -> tuple[int, ...]:
    """The heads that keys of the input are made for."""
    return mixer.dynamic_heads if isinstance(mixer, PartlyStaticAttention) else tuple(range(mixer.num_heads))


def layer_calls(model: nn.Module, name: str, images: Tensor) -> Iterator[LayerCall]:
    """Run a model up to one layer, batch by batch.

    Args:
        model: In evaluation mode, with ``attention_at`` the place.
        name: The layer.
        images: (n, C, H, W).

    Yields:
        What its dynamic heads attend with.

    Raises:
        StaticKeyError: Queries, keys or values are not finite, or the layer does not run on these images.
        UnsupportedHostError: As in ``attention_at``.
    """
    mixer = attention_at(model, name)
    for batch in batches(images, mixer):
        found: list[LayerCall] = []

        def hook(
            _: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            found: list[LayerCall] = found,
            num_images: int = len(batch),
        ) -> None:
            found.append(_call(mixer, args, kwargs, num_images))
            raise _EnoughError

        handle = mixer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            run(model, batch)
        except _EnoughError:
            pass
        finally:
            handle.remove()
        if not found:
            raise StaticKeyError(f"{name} did not run on the calibration images; name other layers")
        for part, tensor in (("queries", found[0].query), ("keys", found[0].key), ("values", found[0].value)):
            if not tensor.isfinite().all():
                raise StaticKeyError(f"{part} of {name} are not finite on the calibration images; check the weights")
        yield found[0]


def check_runs(model: nn.Module, names: Iterable[str], batch: Tensor) -> None:
    """Refuse layers that run more than once per pass, for whose runs one key would have to do.

    Raises:
        UnsupportedHostError: A layer does.
    """
    counts: Counter[str] = Counter()

    def count(name: str, *_: Any) -> None:
        counts[name] += 1

    handles = [attention_at(model, name).register_forward_pre_hook(partial(count, name)) for name in names]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, number in counts.items():
        if number > 1:
            raise UnsupportedHostError(
                f"{name} runs {number} times per pass; convert it without calibration, or name other layers"
            )


@torch.no_grad()
def _call(
    mixer: SelfAttention | PartlyStaticAttention, args: tuple[Any, ...], kwargs: dict[str, Any], num_images: int
) -> LayerCall:
    x, feat_size = mixer._tokens(args[0], args[1] if len(args) > 1 else kwargs.get("feat_size"))
    if feat_size != mixer.feat_size:
        raise StaticKeyError(
            f"calibration images make a grid of {feat_size} tokens where the model is built for {mixer.feat_size}; "
            "resize them, or call the model's set_input_size first"
        )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        seen.append((query, key, value))
        return value

    rope = kwargs.get("rope")
    mixer._attend(x, feat_size, record, mixer._rotation(rope))
    query, key, value = seen[-1]  # a partly static layer comes to its dynamic heads last
    mask = _mask(mixer, kwargs.get("attn_mask"), query)
    if mask is not None and mask.shape[1] == mixer.num_heads:
        mask = mask[:, list(dynamic_heads(mixer))]
    return LayerCall(query * mixer._logit_scale(), key, value, mask, num_images, rope)


def turned_back(mixer: SelfAttention | PartlyStaticAttention, rows: Tensor, rope: Tensor | None) -> Tensor:
    """Undo what a rotary position embedding did to the keys of all heads, (h, N, d)."""
    if rope is None:
        return rows
    sin, cos = rope.to(rows.dtype).chunk(2, dim=-1)
    return mixer._rotation(torch.cat([-sin, cos], dim=-1))(rows)


def _mask(mixer: SelfAttention | PartlyStaticAttention, attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """What the host adds to the logits, (1 or B, 1 or h, N, N)."""
    tokens = query.shape[2]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    if mixer.mask_diagonal:
        diagonal = query.new_zeros(tokens, tokens).fill_diagonal_(float("-inf"))
        attn_mask = diagonal if attn_mask is None else attn_mask + diagonal
    if attn_mask is None:
        return None
    mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    return mask.expand(-1, -1, tokens, tokens)


def batches(images: Tensor, mixer: SelfAttention | PartlyStaticAttention | None = None) -> Iterator[Tensor]:
    """Images a few at a time: at most 32, and so that the maps of a layer stay small."""
    size = 32
    if mixer is not None:
        size = max(min(size, MAP_BYTES // (8 * mixer.num_heads * mixer.num_tokens**2)), 1)
    for start in range(0, len(images), size):
        yield images[start : start + size]


@torch.no_grad()
def run(model: nn.Module, batch: Tensor) -> Any:
    """A model's outputs on some images, moved to where it is."""
    like = next(model.parameters())
    return model(batch.to(like.device, like.dtype))


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All floating-point tensors that a model gives for images, each (n, ...), on the CPU.

    Raises:
        StaticKeyError: It gives none.
    """
    parts = [list(_tensors(run(model, batch))) for batch in batches(images)]
    if not parts[0]:
        raise StaticKeyError(f"{type(model).__name__} gives no tensor whose change could be measured; pass metric=")
    return [torch.cat([part[index] for part in parts]) for index in range(len(parts[0]))]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim:
            yield output.detach().float().cpu() if output.dtype != torch.float64 else output.detach().cpu()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _tensors(value)


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How far outputs moved: the root mean square of the difference as a share of that of what they were."""
    pairs = list(zip(before, after, strict=True))
    moved = sum(float((new - old).double().square().sum()) for old, new in pairs)
    size = sum(float(old.double().square().sum()) for old, _ in pairs)
    return (moved / size) ** 0.5 if size > 0 else float(moved > 0)


def read_images(loader: Any, num_images: int) -> Tensor:
    """Take images from a loader, once.

    Args:
        loader: Batches (B, C, H, W), or lists and tuples that begin with one, or mappings that hold one as
            ``"pixel_values"`` or ``"image"``; a tensor is one batch.
        num_images: How many to take at most.

    Returns:
        (n, C, H, W).

    Raises:
        StaticKeyError: No iterable, or too few images; one is no image, not finite, or of another size.
    """
    if isinstance(loader, Tensor):
        loader = [loader]
    if not isinstance(loader, Iterable):
        raise StaticKeyError(f"calibration images must be a loader of batches, got {type(loader).__name__}")
    taken: list[Tensor] = []
    count = 0
    for batch in loader:
        images = _images_in(batch)
        if taken and images.shape[1:] != taken[0].shape[1:]:
            raise StaticKeyError(
                f"calibration images are {tuple(taken[0].shape[1:])} and {tuple(images.shape[1:])}; give one size"
            )
        if not images.isfinite().all():
            raise StaticKeyError(f"calibration images {count} to {count + len(images) - 1} hold NaN or infinity")
        taken.append(images[: num_images - count].detach().cpu())
        count += len(taken[-1])
        if count >= num_images:
            break
    if count < MIN_IMAGES:
        raise StaticKeyError(f"calibration got {count} images; give at least {MIN_IMAGES}, better 300 to 4,000")
    return torch.cat(taken)


def _images_in(batch: Any) -> Tensor:
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        shown = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise StaticKeyError(f"a calibration batch is {shown}; give floats (B, C, H, W), alone or first in a tuple")
    return found
