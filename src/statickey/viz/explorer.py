"""The part of a page that shows attention maps: choose image, layer and head, and move over the image."""

import base64
import html
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .._typing import Size2
from ..errors import StaticKeyError

Kind = Literal["attention", "rollout", "keys", "prior"]
_LONGER_SIDE = 448
"""Pixels of a photo on the page, at most."""
_PIXELLED = 64
"""Pixels up to which an image is kept as it is."""


class Fineness(NamedTuple):
    """How finely numbers are stored."""

    levels: int
    """Steps in a row's range, at most."""
    uniform: int
    """Steps in uniform attention, 1/N, at most: so that flat rows take little room."""


FINE, COARSE = Fineness(255, 32), Fineness(127, 8)


@dataclass(frozen=True)
class PackedMaps:
    """Maps of one layer for one image as the page holds them: bytes times a step for each row."""

    heads: int
    feat_size: Size2
    key_size: Size2
    low: float
    data: str
    """Base64 of a zlib stream: steps (heads, queries) in float32, then bytes (heads, queries, keys)."""


@dataclass(frozen=True)
class View:
    """One layer of a model on the page."""

    layer: str
    num_prefix_tokens: int
    maps: Sequence[PackedMaps]
    """One an image, or one for all."""


@dataclass(frozen=True)
class ShownModel:
    """A model on the page.

    Args:
        name: What it is called there.
        pictures: The images as it saw them, (H, W, C) in uint8.
        views: What is shown of it, by kind.
        missing: Why a kind is not there.
        prefix_names: Of its prefix tokens.
        left_out: Layers that are not on the page, and why, in words.
        fineness: Of its numbers.
    """

    name: str
    pictures: Sequence[NDArray[np.uint8]]
    views: Mapping[Kind, Sequence[View]]
    missing: Mapping[Kind, str] = field(default_factory=dict)
    prefix_names: Sequence[str] = ()
    left_out: str = ""
    fineness: Fineness = FINE


def as_stored(models: Sequence[ShownModel]) -> str:
    """What the numbers on a page are, in words."""
    levels, uniform = models[0].fineness
    return (
        f"The page holds every map as bytes times a step for each row: a row's range in {levels} parts, but no finer "
        f"than 1/{uniform} of uniform attention. A number shown is the model's to half a step."
    )


def pack_maps(weights: Tensor, feat_size: Size2, key_size: Size2, fineness: Fineness = FINE) -> PackedMaps:
    """Bring maps to bytes; a number is ``low + step * byte``, wrong by half a step at most.

    Args:
        weights: (heads, queries, keys).
        feat_size: Grid of the queries, (1, 1) where one row stands for all.
        key_size: Grid of the keys.
        fineness: What decides the steps.
    """
    values = weights.double().numpy()
    low = min(0.0, float(values.min()))
    finest = 1 / (fineness.uniform * values.shape[-1])
    steps = np.maximum((values.max(axis=-1) - low) / fineness.levels, finest).astype("<f4")
    filled = np.rint((values - low) / steps[..., None]).astype(np.uint8)
    # of maps, which are noise between stretches of zeros, runs alone compress as well as any search, in no time
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    stream = packer.compress(steps.tobytes() + filled.tobytes()) + packer.flush()
    return PackedMaps(len(values), feat_size, key_size, low, base64.b64encode(stream).decode())


def unpack_maps(packed: PackedMaps, num_prefix_tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The maps, (heads, queries, keys), and the steps of their rows, (heads, queries), as the page reads them."""
    content = zlib.decompress(base64.b64decode(packed.data))
    keys = num_prefix_tokens + packed.key_size[0] * packed.key_size[1]
    queries = len(content) // (packed.heads * (keys + 4))
    steps = np.frombuffer(content, "<f4", packed.heads * queries).reshape(packed.heads, queries).astype(np.float64)
    filled = np.frombuffer(content, np.uint8, offset=4 * steps.size).reshape(packed.heads, queries, keys)
    return packed.low + steps[..., None] * filled, steps


def size_on_a_page(models: Sequence[ShownModel]) -> int:
    """Bytes of maps and pictures."""
    views = (view for model in models for own in model.views.values() for view in own)
    return sum(len(maps.data) for view in views for maps in view.maps) + sum(map(len, _pictures(models)[0]))


def fitting(models: Sequence[ShownModel], most: int) -> list[ShownModel]:
    """The models with as many layers as there is room for, evenly spread, the last among them.

    Args:
        models: With all their layers.
        most: Bytes of maps and pictures, at most.

    Raises:
        StaticKeyError: Not even one layer of each finds room.
    """
    deepest = max((len(views) for model in models for views in model.views.values()), default=0)
    for count in range(deepest, 0, -1):
        kept = [_thinned(model, count) for model in models]
        if size_on_a_page(kept) <= most:
            return kept
    raise StaticKeyError(
        f"not even one layer of each model fits into {most / 1e6:.1f} MB; take fewer or smaller images or "
        "models, or allow more"
    )


def spread(total: int, count: int) -> list[int]:
    """``count`` indices, or all, evenly spread up to the last."""
    count = min(count, total)
    return [total - 1 - round(i * total / count) for i in reversed(range(count))]


def _thinned(model: ShownModel, count: int) -> ShownModel:
    views = {kind: [own[i] for i in spread(len(own), count)] for kind, own in model.views.items()}
    total, shown = (len(each.get("attention", ())) for each in (model.views, views))
    words = [model.left_out] * bool(model.left_out)
    if shown < total:
        words.append(f"{shown} of {total} layers, evenly spread")
    return replace(model, views=views, left_out="; ".join(words))


def attention_explorer(models: Sequence[ShownModel], captions: Sequence[str]) -> str:
    """The part of a page, with all it needs.

    Args:
        models: Side by side.
        captions: Of the images.

    Returns:
        HTML for ``page.section``, once a page.
    """
    pictures, places = _pictures(models)
    content = {
        "captions": list(captions),
        "pictures": pictures,
        "models": [_model(model, own) for model, own in zip(models, places, strict=True)],
    }
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    style, parts, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("explorer.css", "explorer_parts.js", "explorer.js")
    )
    names = ", ".join(html.escape(model.name) for model in models)
    return (
        f"<style>{style}</style><div class=explorer data-models='{len(models)}'>"
        f"<noscript><p>The maps of {names} need a browser with JavaScript.</p></noscript></div>"
        f"<script type=application/json id=attention-data>{data}</script>"
        f"<script>(()=>{{'use strict';\n{parts}{script}}})()</script>"
    )


def _model(model: ShownModel, pictures: Sequence[int]) -> dict[str, Any]:
    return {
        "name": model.name,
        "pictures": list(pictures),
        "prefix": list(model.prefix_names),
        "missing": dict(model.missing),
        "leftOut": model.left_out,
        "views": {
            kind: [
                {
                    "layer": view.layer,
                    "prefix": view.num_prefix_tokens,
                    "maps": [
                        {
                            "heads": maps.heads,
                            "queries": maps.feat_size,
                            "keys": maps.key_size,
                            "low": maps.low,
                            "data": maps.data,
                        }
                        for maps in view.maps
                    ],
                }
                for view in views
            ]
            for kind, views in model.views.items()
        },
    }


def _pictures(models: Sequence[ShownModel]) -> tuple[list[str], list[list[int]]]:
    """All pictures as data URLs, each once, and for each model which are its own."""
    found: dict[str, int] = {}
    places = [[found.setdefault(_data_url(picture), len(found)) for picture in model.pictures] for model in models]
    return list(found), places


def _data_url(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    if max(image.size) <= _PIXELLED:
        image.save(file, "PNG")
        kind = "png"
    else:
        image.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
        image.save(file, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
