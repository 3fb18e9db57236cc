"""How far static maps are from a layer's own, head by head, on images no key was fitted on."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .fits import HeadKeys
from .reading import LayerCall


@dataclass(frozen=True)
class HeadErrors:
    """Errors of the heads of a layer, each (h,), float64.

    Args:
        explained: Share of the variance of logits, of a row about its mean, that the static ones have; negative where
            zero would be nearer.
        kl: Divergence of the static map from the head's own, in nats, mean over queries.
        output: Squared error of the head's output, as a share of its energy.
    """

    explained: Tensor
    kl: Tensor
    output: Tensor


@torch.no_grad()
def head_errors(calls: Iterable[LayerCall], keys: HeadKeys) -> HeadErrors:
    """Compare static keys of all heads of a layer with its own keys.

    Args:
        calls: What the layer attends with.
        keys: Static keys of all heads.
    """
    sums: list[Tensor] = []
    rows = 0
    for call in calls:
        own = call.query.double() @ call.key.double().mT
        static = keys.logits(call.query)
        maps, log_maps = call.maps_of(own)
        static_maps, static_log_maps = call.maps_of(static)
        value = call.value.double()
        out = maps @ value
        own = own - own.mean(-1, keepdim=True)
        static = static - static.mean(-1, keepdim=True)
        terms = (
            (own - static).square(),
            own.square(),
            torch.where(maps > 0, maps * (log_maps - static_log_maps), 0.0),
            (static_maps @ value - out).square(),
            out.square(),
        )
        sums.append(torch.stack([term.sum((0, 2, 3)) for term in terms]))
        rows += maps.shape[0] * maps.shape[2]
    missed, energy, divergence, error, size = torch.stack(sums).sum(0).cpu().unbind(0)
    tiny = torch.finfo(torch.float64).tiny
    return HeadErrors(1 - missed / energy.clamp_min(tiny), divergence / rows, error / size.clamp_min(tiny))
