"""Build a host by name and swap its attention, so that one seed gives one set of shared weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._input import update_model_input_size
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._checks import check_mapping, check_model_args, check_positive
from .._files import one_line
from ..convert import convert, token_mixers
from ..errors import StaticKeyError
from ..layers import AttentionMixer
from .checkpoint import check_finite
from .names import HUB_REMEDY, look_up
from .swaps import Swap
from .weights import read_weights, start_from

_OUR_MODULES = ["static_key_former", "static_key_vit", "lsa_vit", "small_vit"]
"""Modules of this package's names in timm's registry."""
PRETRAINED_ARGS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of ``timm.create_model`` that say where weights come from, not what the model is."""
_NOT_MODEL_ARGS = {
    "num_classes": "it comes from the data",
    "in_chans": "it comes from the data",
    "img_size": "it is an option of its own",
}


def build_model(
    name: str,
    mixer: str | Swap | None,
    *,
    img_size: int,
    num_classes: int,
    in_chans: int = 3,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    fp32_logits: bool = False,
) -> nn.Module:
    """Build a model with the given mixer in place of its attention.

    In a vision transformer that is every block, or the layers that a swap names; in a MetaFormer of this package, the
    stage its name stands for.

    Args:
        name: What ``timm.create_model`` takes: a vision transformer of timm's, optionally with a tag
            (``"vit_tiny_patch16_224.augreg_in21k"``), a name of this package (``"small_vit"``,
            ``"skaformer_nano"``), whose own mixer is replaced, ``"hf-hub:OWNER/NAME"``, or ``"local-dir:FOLDER"``,
            where the folder may be a finished run. The last two bring arguments of their own, under those given.
        mixer: A name in ``MIXERS``, or a ``Swap`` or its text, which adds arguments and layers, or texts with ``;``
            between them, one swap after another; None leaves the model as it is.
        img_size: Side of the square input in pixels.
        num_classes: Classes of the head.
        in_chans: Channels of the input.
        seed: All weights that mixers share are bit-identical at one seed.
        model_args: Further constructor arguments of the host. In ``mixers``, the names per stage of a MetaFormer of
            this package, ``"X"`` stands for the given mixer: ``{"mixers": ["sepconv", "sepconv", "X", "mhsa"]}``.
            ``{"pretrained": True}`` loads what is published, or of a run all that fits.
        fp32_logits: Take attention logits and softmax in float32 whatever the precision (slower).

    Returns:
        The host with its attention swapped.

    Raises:
        UnknownNameError: No such model, tag or mixer.
        StaticKeyError: The host refuses its arguments, cannot take the mixer or does not fit into memory, or its
            weights cannot be fetched.
    """
    check_positive(img_size=img_size, num_classes=num_classes, in_chans=in_chans)
    given = check_mapping("model_args", model_args)
    for taken, remedy in _NOT_MODEL_ARGS.items():
        if taken in given:
            raise StaticKeyError(f"{taken}={given[taken]!r} in model_args: {remedy}; leave it out of model_args")
    check_model_args(given)
    found = look_up(name)
    text = found.run_mixer if mixer is None else mixer
    swaps = [] if text is None else Swap.parse_all(text)
    swap = swaps[0] if swaps else None
    placed = _placed(found.architecture, None if mixer is None else swap, given)
    args = given | placed
    to_convert = None if placed else swap
    of_run = found.run_weights if args.get("pretrained") else None
    if of_run is not None:
        del args["pretrained"]
    checkpoint = args.get("checkpoint_path")
    if checkpoint is not None and Path(checkpoint).suffix not in (".npz", ".npy"):
        read_weights(checkpoint)  # refuses what timm stumbles over
    sizes = {"num_classes": num_classes, "in_chans": in_chans}
    _check_memory(
        name,
        to_convert,
        mixer is not None,
        img_size,
        sizes | {k: v for k, v in args.items() if k not in PRETRAINED_ARGS},
    )
    torch.manual_seed(seed)
    model: Any = _build(name, to_convert, mixer is not None, img_size, sizes | args)
    if placed:
        model.mixer_text = str(swap)
    for further in swaps[1:]:
        convert(model, further.mixer, layers=further.layers, mixer_args=further.mixer_args)
        model.mixer_text += f";{further}"
    if of_run is not None:
        start_from(model, of_run)
    if checkpoint is not None:
        try:
            check_finite(model, model.state_dict())
        except StaticKeyError as error:
            raise StaticKeyError(f"{checkpoint}: {error}") from error
    for module in model.modules() if fp32_logits else ():
        if isinstance(module, AttentionMixer):
            module.backend = "math"
    return model  # type: ignore[no-any-return]


def _build(name: str, swap: Swap | None, asked: bool, img_size: int, args: dict[str, Any]) -> nn.Module:
    """Build a host and convert it; a swap that nobody asked for is a saved run's, whose host may hold it already."""
    host: Any
    try:
        host = _timm_host(name, img_size, args)
    except StaticKeyError:
        raise
    except Exception as error:  # hosts check their arguments in ways of their own, and so does the hub's transport
        if isinstance(error, OSError) and args.get("pretrained"):
            raise StaticKeyError(
                f"cannot get the weights of model {name!r}: {one_line(error)}; {HUB_REMEDY}"
            ) from error
        raise StaticKeyError(f"model {name!r} refuses img_size={img_size}, {args}: {one_line(error)}") from error
    patch = getattr(getattr(host, "patch_embed", None), "patch_size", (1,))[0]
    if img_size % patch:
        raise StaticKeyError(
            f"the patch size {patch} of {name!r} does not divide img_size={img_size}; resize to "
            f"img_size={max(img_size // patch, 1) * patch}, or pass another patch_size in model_args"
        )
    host.mixer_text = None  # what its arguments do not say, and a card must
    if swap is not None and (asked or not token_mixers(host)):
        host.mixer_text = str(swap)
        convert(host, swap.mixer, layers=swap.layers, mixer_args=swap.mixer_args)
    return host  # type: ignore[no-any-return]


def _check_memory(name: str, swap: Swap | None, asked: bool, img_size: int, args: dict[str, Any]) -> None:
    """Refuse a model that is larger than the machine's memory, before it fills it."""
    try:
        with torch.device("meta"):
            model = _build(name, swap, asked, img_size, args)
    except StaticKeyError as error:
        if "meta" in str(error.__cause__):  # a host that computes while it is built
            return
        raise
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    if size > memory:
        raise StaticKeyError(
            f"model {name!r} with img_size={img_size}, {args} takes {size / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f}; choose a smaller one"
        )


def timm_args(
    name: str, mixer: str | None, img_size: int, model_args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments with which ``timm.create_model`` builds a model of this package as ``build_model`` does."""
    args = {} if model_args is None else dict(model_args)
    sizes = {} if name in timm.list_models(module="metaformer") else {"img_size": img_size}
    return sizes | args | _placed(name, None if mixer is None else Swap.parse_all(mixer)[0], args)


def _timm_host(name: str, img_size: int, args: dict[str, Any]) -> Any:
    try:
        return timm.create_model(name, img_size=img_size, **args)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
    host = timm.create_model(name, **args)  # one that runs on any size, as timm's MetaFormers
    update_model_input_size(host, (img_size, img_size))
    return host


def _placed(name: str, swap: Swap | None, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that put a mixer into a model of this package; none for others, which are converted.

    Raises:
        StaticKeyError: The arguments name no place for it, or the model has no choice of layers.
    """
    stages = args.get("mixers")
    if swap is None or not (is_ours(name) or isinstance(stages, list | tuple)):
        return {}
    if swap.layers != "all":
        if name == "small_vit":
            return {}
        raise StaticKeyError(
            f"mixer {str(swap)!r} names layers, but {name!r} has its mixer in all of them; leave them out, set "
            "mixers= per stage in model_args, or take a name of timm's"
        )
    if stages is None and name not in timm.list_models(module="static_key_former"):
        own = check_mapping("mixer_args", args.get("mixer_args")) | dict(swap.mixer_args)
        return {"mixer": swap.mixer} | ({"mixer_args": own} if own else {})
    stages = ("sepconv", "X", "mhsa", "mhsa") if stages is None else stages
    if "X" not in stages:
        raise StaticKeyError(f"mixers={list(stages)} has no 'X' for {swap.mixer!r} to stand in; mark its stage")
    found: dict[str, Any] = {"mixers": tuple(swap.mixer if place == "X" else place for place in stages)}
    if swap.mixer_args:
        by_mixer = check_mapping("mixer_args", args.get("mixer_args"))
        own = check_mapping(f"mixer_args of {swap.mixer}", by_mixer.get(swap.mixer)) | dict(swap.mixer_args)
        found["mixer_args"] = by_mixer | {swap.mixer: own}
    return found


def is_ours(name: str) -> bool:
    """Whether a name of timm's registry is one of this package, which takes its mixer as an argument."""
    return bool(timm.models.is_model_in_modules(name, _OUR_MODULES))


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
