"""What the explorer and the pictures show of a model: its maps on some images, and its static keys."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from .._typing import Size2
from ..errors import StaticKeyError
from ..layers import PartlyStaticAttention, StaticKeyAttention
from .capture import LayerMaps, capture_maps, key_colours
from .explorer import COARSE, FINE, Fineness, Kind, PackedMaps, ShownModel, View, fitting, pack_maps, size_on_a_page
from .figures import attention_overlay, heads_by_layers
from .measures import attention_distances, attention_rollout, average_query_map, key_similarity, static_key_rows

_MOST_NUMBERS = 2**27
"""Of one layer's maps on all images: more would not fit on a page, however they are stored."""
_EVERYWHERE = "all layers"
Pack = Callable[..., PackedMaps]


@dataclass(frozen=True)
class Look:
    """What a model does with some images.

    Args:
        name: Of the model.
        pictures: The images as it saw them, (C, H, W) in uint8.
        maps: Of its layers on whole images, batch by batch, by module name.
        keys: Its static keys (heads, P + H*W, ...) and their mixers, by module name.
        prefix_names: Of its prefix tokens.
        left_out: Layers without a map of whole images, in words.
    """

    name: str
    pictures: Sequence[Tensor]
    maps: Sequence[Mapping[str, LayerMaps]]
    keys: Mapping[str, tuple[Tensor, StaticKeyAttention]]
    prefix_names: tuple[str, ...]
    left_out: str

    @property
    def layers(self) -> list[str]:
        """Names of the layers with maps."""
        return list(self.maps[0])

    def distances(self) -> dict[str, Tensor]:
        """``attention_distances`` of each layer, (heads,), over all images."""
        return {
            name: torch.stack([attention_distances(batch[name]) for batch in self.maps]).mean(dim=0)
            for name in self.layers
        }

    def shown(self, layers: Sequence[str] | None = None, fineness: Fineness = FINE) -> ShownModel:
        """What goes on a page.

        Args:
            layers: Whose maps; default all. Rollout goes through all in any case.
            fineness: Of the numbers.
        """
        chosen = self.layers if layers is None else layers
        of_keys = Fineness(fineness.levels // 2, fineness.uniform)  # what looks alike needs fewer
        pack = partial(pack_maps, fineness=fineness)
        views: dict[Kind, list[View]] = {}
        missing: dict[Kind, str] = {}
        views["attention"] = [
            View(
                layer,
                self.maps[0][layer].num_prefix_tokens,
                [
                    pack(own, batch[layer].feat_size, batch[layer].key_size)
                    for batch in self.maps
                    for own in batch[layer].weights
                ],
            )
            for layer in chosen
        ]
        try:
            views["rollout"] = [_rollout(self, pack)]
        except StaticKeyError as error:
            missing["rollout"] = str(error)
        keys = {layer: key for layer, key in self.keys.items() if layer in chosen}
        if keys:
            views["keys"] = [
                View(
                    layer + _static_heads(mixer),
                    mixer.num_prefix_tokens,
                    [pack_maps(key_similarity(key), mixer.key_grid, mixer.key_grid, of_keys)],
                )
                for layer, (key, mixer) in keys.items()
            ]
        else:
            missing["keys"] = missing["prior"] = f"{self.name} has no static key."
        try:
            priors = [
                View(layer, maps.num_prefix_tokens, [prior]) for layer, maps, prior in _priors(self, keys, pack)
            ]
            if priors:
                views["prior"] = priors
            else:
                missing.setdefault(
                    "prior", "An average query needs images of one size, and heads that are all static."
                )
        except StaticKeyError as error:
            missing["prior"] = str(error)
        pictures = [_pixels(each) for each in self.pictures]
        return ShownModel(self.name, pictures, views, missing, self.prefix_names, self.left_out, fineness)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Pictures, by the stem of their file's name."""
        square = [name for name, maps in self.maps[0].items() if maps.feat_size == maps.key_size]
        last, number = next(reversed(square), ""), 0
        for batch in self.maps if last else ():
            for weights in batch[last].weights:
                picture = _pixels(self.pictures[number]) / 255
                title = f"{self.name}: image {number + 1}\n{last}"
                number += 1
                yield f"overlay-{number}", attention_overlay(picture, weights, batch[last].feat_size, title)
        first = {layer: _of_query(maps) for layer, maps in self.maps[0].items()}
        asker = "the class token" if self.prefix_names[:1] == ("class token",) else "the middle"
        yield "heads", heads_by_layers(first, f"{self.name}, image 1: where {asker} looks")
        keys = {layer: key for layer, key in self.keys.items() if layer in self.layers}
        if keys:
            coloured = {
                layer: key_colours(key, mixer.num_prefix_tokens, mixer.key_grid).numpy()
                for layer, (key, mixer) in keys.items()
            }
            yield "keys", heads_by_layers(coloured, f"{self.name}: static keys")
            alike = {layer: _of_middle(key_similarity(key), mixer) for layer, (key, mixer) in keys.items()}
            yield "similarity", heads_by_layers(alike, f"{self.name}: likeness to the middle's key row", signed=True)


def look(name: str, model: nn.Module, batches: Sequence[Any], pictures: Sequence[Tensor]) -> Look:
    """Read the attention maps of a model.

    Args:
        name: What it is called.
        model: As ``capture_attention`` takes it.
        batches: Images as it takes them, one or several at once.
        pictures: All of these images, (C, H, W) in uint8.

    Raises:
        StaticKeyError: It has no attention map of whole images.
    """
    captured = [capture_maps(model, batch) for batch in batches]
    reasons = {
        layer: _unusable(layer, maps, len(batch))
        for batch, of_batch in zip(batches, captured, strict=True)
        for layer, maps in of_batch.items()
    }
    left_out = {layer: reason for layer, reason in reasons.items() if reason}
    usable = [{layer: maps for layer, maps in of_batch.items() if layer not in left_out} for of_batch in captured]
    words = "; ".join(_counted(left_out))
    if not usable or not usable[0]:
        raise StaticKeyError(f"no attention map of whole images in {name}{f' ({words})' if words else ''}")
    prefix = max(maps.num_prefix_tokens for maps in usable[0].values())
    return Look(name, pictures, usable, static_key_rows(model), _prefix_names(model, prefix), words)


def on_a_page(looks: Sequence[Look], most: int, layers: Sequence[Sequence[str]] | None = None) -> list[ShownModel]:
    """Models for one page: numbers as fine as there is room for, then as many layers.

    Args:
        looks: At the same images.
        most: Bytes of maps and pictures, at most.
        layers: Of each model, which it must show; default all, or as many as find room, evenly spread.

    Raises:
        StaticKeyError: There is no room for these layers, or for one of each model.
    """
    chosen: Sequence[Sequence[str] | None] = [None] * len(looks) if layers is None else layers
    models = [seen.shown(own) for seen, own in zip(looks, chosen, strict=True)]
    if size_on_a_page(models) <= most:
        return models
    models = [seen.shown(own, COARSE) for seen, own in zip(looks, chosen, strict=True)]
    kept = fitting(models, most)
    if layers is not None and size_on_a_page(kept) < size_on_a_page(models):
        raise StaticKeyError(
            f"these layers do not fit into {most / 1e6:.1f} MB; name fewer, take fewer images, or allow more"
        )
    return kept


def _unusable(layer: str, maps: LayerMaps, num_images: int) -> str:
    """Why a layer's maps are not those of whole images, or nothing."""
    prefix = maps.num_prefix_tokens
    queries, keys = (prefix + grid[0] * grid[1] for grid in (maps.feat_size, maps.key_size))
    shape = tuple(maps.weights.shape)
    if maps.weights.ndim == 4 and len(maps.weights) != num_images:
        return "attention in windows"
    if maps.weights.ndim != 4 or shape[2:] != (queries, keys):
        return f"the map of {layer}, {shape}, is not (B, heads, N, N) with N={queries} tokens"
    if maps.feat_size == maps.key_size == (1, 1):
        return "one token"
    if maps.weights.numel() > _MOST_NUMBERS:
        return f"too many tokens ({queries:,}) for a page"
    return ""


def _counted(left_out: Mapping[str, str]) -> list[str]:
    """Reasons with the number of layers that have them."""
    counts = Counter(left_out.values())
    return [
        reason
        if reason.startswith("the map of")
        else f"{count} {'layer' if count == 1 else 'layers'} left out: {reason}"
        for reason, count in counts.items()
    ]


def _prefix_names(model: nn.Module, number: int) -> tuple[str, ...]:
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    known = {"cls_token": "class token", "dist_token": "distillation token"}
    names = [words for parameter, words in known.items() if parameter in parameters][:number]
    return (*names, *(f"register {i + 1}" for i in range(number - len(names))))


def _rollout(seen: Look, pack: Pack) -> View:
    if "windows" in seen.left_out:
        raise StaticKeyError("rollout needs layers that all attend on one grid, some of these attend in windows")
    packed = []
    for batch in seen.maps:
        of_one = next(iter(batch.values()))
        rolled = attention_rollout(list(batch.values()))
        packed += [pack(own[None], of_one.feat_size, of_one.key_size) for own in rolled]
    return View(_EVERYWHERE, next(iter(seen.maps[0].values())).num_prefix_tokens, packed)


def _priors(
    seen: Look, keys: Mapping[str, tuple[Tensor, StaticKeyAttention]], pack: Pack
) -> Iterator[tuple[str, LayerMaps, PackedMaps]]:
    """Layer, its maps, and where its heads look whatever they are asked; of images of one size."""
    for layer, (_, mixer) in keys.items():
        if len(seen.maps) == 1 and not (isinstance(mixer, PartlyStaticAttention) and mixer.mixed):
            maps = seen.maps[0][layer]
            yield layer, maps, pack(average_query_map(maps)[:, None], (1, 1), maps.key_size)


def _of_query(maps: LayerMaps) -> NDArray[Any]:
    """Where the first prefix token looks, or the place in the middle, on the first image, (heads, H, W)."""
    prefix, weights = maps.num_prefix_tokens, maps.weights[0].float()
    return _row(weights, 0 if prefix else _middle(maps.feat_size), prefix, maps.key_size)


def _of_middle(rows: Tensor, mixer: StaticKeyAttention) -> NDArray[Any]:
    """What the place in the middle has to do with all, (heads, H, W)."""
    prefix, grid = mixer.num_prefix_tokens, mixer.key_grid
    return _row(rows, prefix + _middle(grid), prefix, grid)


def _static_heads(mixer: StaticKeyAttention) -> str:
    """Which heads have a key, where not all do."""
    if not isinstance(mixer, PartlyStaticAttention) or not mixer.dynamic_heads:
        return ""
    return f", static heads {', '.join(str(head + 1) for head in mixer.static_heads)}"


def _middle(grid: Size2) -> int:
    return (grid[0] // 2) * grid[1] + grid[1] // 2


def _row(weights: Tensor, row: int, prefix: int, grid: Size2) -> NDArray[Any]:
    numbers: NDArray[Any] = weights[:, row, prefix:].numpy()
    return numbers.reshape(-1, *grid)


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    return image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
