"""What rules for hosts of many kinds share: places, what is read of the modules there, keys that follow the input."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import get_model_input_config
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from .._checks import check_img_size
from .._typing import Size2
from ..errors import FeatSizeError, UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, StaticKeyHost, find_rule, register_host_rule
from .windows import BiasedMixer


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module of a host that attends, or the mixer there now, and the tokens it works on.

    Args:
        module: The module.
        feat_size: The grid (H, W) of its tokens.
        num_prefix_tokens: Class tokens before the grid.
        windows: How often it runs per image.
    """

    module: nn.Module
    feat_size: Size2
    num_prefix_tokens: int = 0
    windows: int = 1

    @property
    def tokens(self) -> dict[str, Any]:
        """The fields of a ``Site`` that say what it works on."""
        return {
            "feat_size": self.feat_size,
            "num_prefix_tokens": self.num_prefix_tokens,
            "windows": self.windows,
        }


Places = Callable[[Any], dict[str, Place]]
Readers = Mapping[type[nn.Module], Callable[[Any, Place], Site]]


@dataclass(frozen=True, kw_only=True)
class PlacedRule(HostRule):
    """A rule made of places; see ``register_placed_rule``."""

    places: Places


class PlacedMixer(BiasedMixer):
    """A mixer of a place, with the host's position bias, if any."""

    def parts(self) -> dict[str, Any]:
        """What it was made of beside the mixer, by argument, for the next mixer there."""
        return {"rel_pos": self.rel_pos}


class MapMixer(PlacedMixer):
    """A mixer called with tokens or maps alone; its bias, if any, is its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim), or a map, to the same."""
        return self.mixer(x, attn_mask=None if self.rel_pos is None else self.rel_pos.get_bias())


class FollowingHost(StaticKeyHost):
    """A host whose keys follow its own ``set_input_size``."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Rebuild the host, position biases and keys for another input; see timm's ``set_input_size``."""
        super().set_input_size(*args, **kwargs)  # type: ignore[misc]
        follow_places(self)


class MapHost(StaticKeyHost):
    """A host of maps of any size, for which timm has no ``set_input_size``."""

    def set_input_size(self, img_size: Size2 | int | None = None, patch_size: None = None) -> None:
        """Rebuild the keys for another input; the host itself needs nothing.

        Args:
            img_size: (height, width) in pixels, or one side of a square.
            patch_size: There is none to change; must be None.

        Raises:
            FeatSizeError: A patch size is given, or the image is too small.
        """
        if patch_size is not None:
            raise FeatSizeError(f"patch_size={patch_size!r}: {type(self).__name__} has a fixed stride; leave it out")
        if img_size is not None:
            update_model_input_size(self, check_img_size(img_size))
            follow_places(self)


def follow_places(model: nn.Module) -> None:
    """Bring every mixer of a converted host, and its bias, to the grid that the host now has there."""
    rule = find_rule(model)
    assert isinstance(rule, PlacedRule)
    for place in rule.places(model).values():
        if isinstance(place.module, BiasedMixer):
            place.module.set_window_size(place.feat_size)
        elif isinstance(place.module, TokenMixer):
            place.module.set_input_size(place.feat_size)


def register_placed_rule(
    host: type[nn.Module],
    places: Places,
    readers: Readers,
    mixin: type[StaticKeyHost] = StaticKeyHost,
    finish: Callable[[Any], None] | None = None,
) -> None:
    """Register a rule that reads the site of each place by the class of the module there.

    Args:
        host: The class of models.
        places: Lists the places of a model by module name, in order of depth; those of a converted one too.
        readers: By class of module, what a mixer takes over of it.
        mixin: What the model's class gains.
        finish: Called with the model after the swap.
    """
    sites = partial(_read_sites, places, readers)
    register_host_rule(PlacedRule(host=host, sites=sites, mixin=mixin, finish=finish, places=places))


def _read_sites(places: Places, readers: Readers, model: nn.Module) -> dict[str, Site]:
    sites = {}
    for name, place in places(model).items():
        module = place.module
        if isinstance(module, BiasedMixer):
            parts = module.parts() if isinstance(module, PlacedMixer) else {"rel_pos": module.rel_pos}
            wrap = partial(type(module), **parts)
            needs_map = module.rel_pos is not None
            sites[name] = Site.of_mixer(module.mixer, wrap=wrap, needs_map=needs_map, windows=place.windows)
        elif isinstance(module, TokenMixer):
            sites[name] = Site.of_mixer(module, windows=place.windows)
        elif type(module) in readers:
            sites[name] = readers[type(module)](module, place)
        else:
            supported = ", ".join(cls.__name__ for cls in readers)
            raise UnsupportedHostError(f"{name} is a {type(module).__name__}; supported: {supported}")
    return sites


def biased(wrapper: Callable[..., nn.Module], rel_pos: nn.Module | None, **parts: Any) -> dict[str, Any]:
    """The fields of a site whose mixer stands in a wrapper, with copies of the host's position bias and parts."""
    return {"wrap": partial(wrapper, rel_pos=deepcopy(rel_pos), **deepcopy(parts)), "needs_map": rel_pos is not None}


def parts_first(tensor: Tensor, num_heads: int, *widths: int) -> Tensor:
    """Rows that are head by head, each of parts of some widths, as all heads' first parts, then the second, ..."""
    parts = tensor.reshape(num_heads, -1, *tensor.shape[1:]).split_with_sizes(widths, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def selected_norm(norm: Any, select: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a batch norm whose channels are selected or put in another order."""
    copied = deepcopy(norm)
    for name, tensor in norm.state_dict().items():
        if tensor.ndim:
            chosen = select(tensor.clone())
            old = getattr(copied, name)
            kept = isinstance(old, nn.Parameter)
            setattr(copied, name, nn.Parameter(chosen, requires_grad=old.requires_grad) if kept else chosen)
    return copied  # type: ignore[no-any-return]


def map_grid(model: nn.Module, reduction: int) -> Size2:
    """The grid (H, W) of a map at some stride, on the input size that a model was built or resized for."""
    _, height, width = get_model_input_config(model)["input_size"]
    return -(-height // reduction), -(-width // reduction)
