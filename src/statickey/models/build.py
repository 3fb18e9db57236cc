"""Build a host by name and swap its attention, so that one seed gives one set of shared weights."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models._input import update_model_input_size
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._checks import check_name
from ..convert import convert, token_mixers
from ..errors import StaticKeyError
from ..layers import AttentionMixer
from .small_vit import small_vit

SMALL_VIT = "small_vit"
OUR_MODULES = ["static_key_former", "static_key_vit", "lsa_vit"]
"""Modules of this package's names in timm's registry."""
_NOT_MODEL_ARGS = {
    "num_classes": "it comes from the data",
    "in_chans": "it comes from the data",
    "img_size": "it is an option of its own",
}


def build_model(
    name: str,
    mixer: str | None,
    *,
    img_size: int,
    num_classes: int,
    in_chans: int = 3,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model with the given mixer in place of its attention.

    In a vision transformer that is every block; in a MetaFormer of this package, the stage its name stands for.

    Args:
        name: ``"small_vit"``, any timm vision transformer, or a name of this package (``"lsa_vit_small_patch4_32"``,
            ``"skaformer_nano"``), whose own mixer is replaced.
        mixer: A name in ``MIXERS``; None leaves the model as it is.
        img_size: Side of the square input in pixels.
        num_classes: Classes of the head.
        in_chans: Channels of the input.
        seed: All weights that mixers share are bit-identical at one seed.
        model_args: Further constructor arguments of the host. In ``mixers``, the names per stage of a MetaFormer of
            this package, ``"X"`` stands for the given mixer: ``{"mixers": ["sepconv", "sepconv", "X", "mhsa"]}``.

    Returns:
        The host with its attention swapped.

    Raises:
        UnknownNameError: No such model or mixer.
        StaticKeyError: The host refuses its arguments, or cannot take the mixer.
    """
    check_name("model", name, [SMALL_VIT, *timm.list_models()])
    for taken, remedy in _NOT_MODEL_ARGS.items():
        if model_args is not None and taken in model_args:
            raise StaticKeyError(f"{taken}={model_args[taken]!r} in model_args: {remedy}; leave it out of model_args")
    torch.manual_seed(seed)
    args = _filled({} if model_args is None else dict(model_args), mixer) | _own_mixer(name, mixer, model_args)
    host: Any
    try:
        if name == SMALL_VIT:
            host = small_vit(img_size, num_classes=num_classes, in_chans=in_chans, **args)
        else:
            host = _timm_host(name, img_size, {"num_classes": num_classes, "in_chans": in_chans} | args)
    except StaticKeyError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise StaticKeyError(f"model {name!r} refuses img_size={img_size}, {args}: {error}") from error
    patch = getattr(getattr(host, "patch_embed", None), "patch_size", (1,))[0]
    if img_size % patch:
        raise StaticKeyError(
            f"the patch size {patch} of {name!r} does not divide img_size={img_size}; resize to "
            f"img_size={max(img_size // patch, 1) * patch}, or pass another patch_size in model_args"
        )
    if mixer is not None and not token_mixers(host):
        convert(host, mixer)
    return host  # type: ignore[no-any-return]


def timm_args(
    name: str, mixer: str | None, img_size: int, model_args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments with which ``timm.create_model`` builds a model of this package as ``build_model`` does."""
    args = {} if model_args is None else dict(model_args)
    sizes = {} if name in timm.list_models(module="metaformer") else {"img_size": img_size}
    return sizes | _filled(args, mixer) | _own_mixer(name, mixer, args)


def _timm_host(name: str, img_size: int, args: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, img_size=img_size, **args)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
    host = timm.create_model(name, **args)  # one that runs on any size, as timm's MetaFormers
    update_model_input_size(host, (img_size, img_size))
    return host


def _filled(args: dict[str, Any], mixer: str | None) -> dict[str, Any]:
    """The arguments with the place that is marked X in ``mixers`` taken by the mixer."""
    mixers = args.get("mixers")
    if mixer is None or not isinstance(mixers, list | tuple):
        return args
    if "X" not in mixers:
        raise StaticKeyError(f"mixers={list(mixers)} has no 'X' for {mixer!r} to stand in; mark its stage")
    return args | {"mixers": tuple(mixer if place == "X" else place for place in mixers)}


def _own_mixer(name: str, mixer: str | None, args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The argument that puts a mixer into a model of this package, unless its arguments say where it stands."""
    if mixer is None or (args is not None and "mixers" in args):
        return {}
    if name in timm.list_models(module="static_key_former"):
        return {"mixers": ("sepconv", mixer, "mhsa", "mhsa")}
    return {"mixer": mixer} if timm.models.is_model_in_modules(name, OUR_MODULES) else {}


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass on one image.

    Counted on the unfused path: torch's counter sees nothing inside fused attention on the CPU.

    Args:
        model: Any module from images to outputs.
        input_size: (C, H, W).

    Returns:
        MACs; FLOPs are twice that.
    """
    backends = {module: module.backend for module in model.modules() if isinstance(module, AttentionMixer)}
    # torch's counter stumbles over parameters that are inputs of modules, as class tokens may be
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    try:
        for module in backends:
            module.backend = "math"
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, backend in backends.items():
            module.backend = backend
    return int(counter.get_total_flops()) // 2
