"""How mixers in models of transformers are told the grid of their tokens, at each call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._typing import Size2
from ..errors import StaticKeyError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], Arguments | None]


def before(module: nn.Module, hook: Hook) -> None:
    """Call a hook before a module's forward, once however often this is asked for."""
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def tell_tower(tower: Any) -> None:
    """For towers that pass on what they are given: the grid of the images."""
    before(tower, _pass_grid)


def tell_tower_of_patches(tower: Any) -> None:
    """The same for towers that are given patches: one grid (H, W), or one for each image where they differ."""
    before(tower, _pass_grids)


def tell_layers(tower: Any) -> None:
    """For towers that pass nothing on to their layers, which would pass it on themselves."""
    before(tower, _note_grid)
    for layer in tower.encoder.layer:
        before(layer, _pass_noted)


def tell_maps(tower: Any) -> None:
    """For encoders that flatten maps in layers of their own."""
    for layer in tower.aifi:
        before(layer, _pass_map)


def tell_encoder(tower: Any) -> None:
    """For encoders of tokens that their model flattens from a map, after the projection ``input_projection``."""
    before(tower.encoder, _PassNotedMap(_noted_projection(tower)))


def tell_embeddings(tower: Any) -> None:
    """The same for encoders whose layers take nothing but position embeddings: the grid is noted on those."""
    before(tower.encoder, _NoteMapInLayers(_noted_projection(tower)))
    for layer in tower.encoder.layers:
        before(layer, _mark_embeddings)


def _noted_projection(tower: Any) -> nn.Module:
    projection: nn.Module = tower.input_projection
    before(tower, _forget_map)
    if _note_map not in projection._forward_hooks.values():
        projection.register_forward_hook(_note_map)
    return projection


def check_image_size(tower: Any) -> None:
    """For towers that fix the order of tokens to the image size of their config."""
    before(tower, _check_image)


def tell_nothing(tower: Any) -> None:
    """For towers whose layers know the grid, or have one of their own."""


def _pass_grid(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    grid = _image_grid(tower, args, kwargs)
    return args, kwargs if grid is None else kwargs | {"feat_size": grid}


def _image_grid(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Size2 | None:
    images = args[0] if args else kwargs.get("pixel_values")
    if images is None:  # the host says so
        return None
    height, width = pair(tower.config.patch_size)
    return images.shape[-2] // height, images.shape[-1] // width


def _pass_grids(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    shapes = args[2] if len(args) > 2 else kwargs["spatial_shapes"]
    num_patches = (args[0] if args else kwargs["pixel_values"]).shape[1]
    grids = tuple((height, width) for height, width in shapes.tolist())
    same = len(set(grids)) == 1 and grids[0][0] * grids[0][1] == num_patches
    return args, kwargs | {"feat_size": grids[0] if same else grids}


def _note_grid(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    noted: dict[str, Any] = {"feat_size": _image_grid(tower, args, kwargs)}
    if kwargs.get("output_attentions"):
        noted["output_attentions"] = True
    for layer in tower.encoder.layer:
        layer.noted = noted


def _pass_noted(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return args, layer.__dict__.pop("noted", {}) | kwargs


def _pass_map(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    maps = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"feat_size": tuple(maps.shape[-2:])}


def _note_map(projection: Any, args: tuple[Any, ...], output: Tensor) -> None:
    projection.feat_size = tuple(output.shape[-2:])


def _forget_map(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tower.input_projection.__dict__.pop("feat_size", None)  # a call that was given what the encoder makes left it


@dataclass(frozen=True)
class _PassNotedMap:
    """Hook before an encoder: the grid of the map that a projection has just made, used once."""

    projection: nn.Module

    def __call__(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return args, {"feat_size": self.projection.__dict__.pop("feat_size", None)} | kwargs


@dataclass(frozen=True)
class _NoteMapInLayers:
    """Hook before an encoder: the same, left for its layers."""

    projection: nn.Module

    def __call__(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feat_size = self.projection.__dict__.pop("feat_size", None)
        for layer in encoder.layers:
            layer.noted = feat_size


def _mark_embeddings(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    embeddings, feat_size = kwargs.get("object_queries"), layer.__dict__.pop("noted", None)
    if embeddings is not None:
        embeddings.feat_size = feat_size


def _check_image(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    images = args[0] if args else kwargs.get("pixel_values")
    wanted = pair(tower.config.image_size)
    if images is not None and tuple(images.shape[-2:]) != wanted:
        raise StaticKeyError(
            f"{type(tower).__name__} orders its tokens for images of {wanted}, got {tuple(images.shape[-2:])}; build "
            "it with this image_size"
        )


def pair(size: Any) -> Size2:
    """A side, or (height, width), as (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
