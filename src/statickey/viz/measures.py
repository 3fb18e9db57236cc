"""What attention maps and static keys amount to: rollout, distances, the prior of a key, likeness of its rows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .._typing import Size2
from ..convert import token_mixers
from ..errors import StaticKeyError
from ..layers import StaticKeyAttention
from .capture import LayerMaps


def attention_rollout(maps: Sequence[LayerMaps]) -> Tensor:
    """What each token of the input has a part in, through all layers: the product of (A + I) / 2, heads averaged.

    Args:
        maps: Of all layers, the first first, of whole images.

    Returns:
        (B, N, N), a row for each token of the output.

    Raises:
        StaticKeyError: The layers do not have one grid, or there is none.

    Source:
        Abnar, Zuidema, Quantifying Attention Flow in Transformers, arXiv 2005.00928.
    """
    grids = {(each.feat_size, each.key_size, each.num_prefix_tokens, each.weights.shape[0]) for each in maps}
    if len(grids) != 1 or maps[0].feat_size != maps[0].key_size:
        shown = ", ".join(dict.fromkeys(f"{h} x {w}" for each in maps for h, w in (each.feat_size, each.key_size)))
        raise StaticKeyError(f"rollout needs layers that all attend on one grid, these are on {shown or 'none'}")
    tokens = maps[0].weights.shape[-1]
    rolled = torch.eye(tokens).expand(maps[0].weights.shape[0], -1, -1)
    for each in maps:
        rolled = (each.weights.float().mean(dim=1) + torch.eye(tokens)) / 2 @ rolled
    return rolled


def attention_distances(maps: LayerMaps) -> Tensor:
    """How far each head looks: the mean distance of query and key, weighted by attention, prefix tokens left out.

    Distances are shares of the image's diagonal, so that layers and models on different grids compare.

    Args:
        maps: Of a layer.

    Returns:
        (heads,), in [0, 1].
    """
    prefix = maps.num_prefix_tokens
    weights = maps.weights[..., prefix:, prefix:].double()
    places, key_places = (_centres(grid) for grid in (maps.feat_size, maps.key_size))
    distances = torch.cdist(places, key_places) / torch.tensor([1.0, 1.0]).double().norm()
    means: Tensor = (weights * distances).sum(dim=-1) / weights.sum(dim=-1).clamp_min(1e-12)
    return means.mean(dim=(0, 2))


def average_query_map(maps: LayerMaps) -> Tensor:
    """The map that the mean query of all images and places gives against a static key: where a head looks anyway.

    Logits are linear in the query and the key is the same for all, so it is the softmax of the mean logarithm of the
    maps.

    Args:
        maps: Of a layer with a static key.

    Returns:
        (heads, keys).

    Raises:
        StaticKeyError: A map has zeros, of which no logit can be told.
    """
    rows = maps.weights[:, :, maps.num_prefix_tokens :].double()
    if not (rows > 0).all():
        raise StaticKeyError(
            "the map of an average query is not known where attention is masked or too small to tell"
        )
    return rows.log().mean(dim=(0, 2)).softmax(dim=-1)


def static_key_rows(model: nn.Module) -> dict[str, tuple[Tensor, StaticKeyAttention]]:
    """The rows of each static key of a model, (heads, P + H*W, ...), and its mixer, by module name."""
    found: Mapping[str, nn.Module] = dict(token_mixers(model))
    return {
        name: (mixer.key_rows(name=mixer.key_names[0]).detach(), mixer)
        for name, mixer in found.items()
        if isinstance(mixer, StaticKeyAttention) and getattr(mixer, mixer.key_names[0]) is not None
    }


def key_similarity(key: Tensor) -> Tensor:
    """How alike the rows of a static key are: the cosine of their differences to the mean row.

    Attention does not see what all rows have in common.

    Args:
        key: (heads, rows, ...).

    Returns:
        (heads, rows, rows), in [-1, 1].
    """
    rows = key.detach().flatten(2).double().cpu()
    rows = torch.nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True), dim=-1)
    return (rows @ rows.mT).clamp(-1, 1)


def _centres(grid: Size2) -> Tensor:
    """Centres of the cells of a grid over the unit square, (H*W, 2)."""
    axes = [(torch.arange(extent, dtype=torch.float64) + 0.5) / extent for extent in grid]
    return torch.cartesian_prod(*axes)
