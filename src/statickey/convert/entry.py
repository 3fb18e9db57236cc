"""``convert``: swap attention, with fresh keys or with keys fitted on images."""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import nn

from ..errors import StaticKeyError
from .calibration.calibrate import Calibrator
from .calibration.report import CalibrationReport
from .calibration.settings import Calibration
from .swap import ConversionReport, Layers
from .swap import convert as swap


@overload
def convert(
    model: nn.Module,
    mixer: str,
    *,
    layers: Layers = ...,
    keep_weights: bool = ...,
    mixer_args: Mapping[str, Any] | None = ...,
    calibration: None = ...,
) -> ConversionReport: ...


@overload
def convert(model: nn.Module, mixer: str, *, layers: Layers = ..., calibration: Any) -> CalibrationReport: ...


def convert(
    model: nn.Module,
    mixer: str,
    *,
    layers: Layers = "all",
    keep_weights: bool = True,
    mixer_args: Mapping[str, Any] | None = None,
    calibration: Any = None,
) -> ConversionReport:
    """Replace the attention of a model by a mixer, in place.

    Hosts: timm's VisionTransformer (ViT, DeiT), MetaFormer, Swin and Swin-V2 (a key per window position, position
    bias kept), CaiT (patch blocks; talking heads kept), BEiT (position bias kept), Eva (EVA-02, DINOv3, PE and ViTs
    with rotary position embedding: a static key is turned by the place of its row, at each call), the encoders of
    DeepSeek's and Qwen3's ViT, NaFlexVit (batches of images of one size), and thirty more of timm's, from MaxViT to
    PVT-v2 (``docs/convertible.md``); torchvision's VisionTransformer and SwinTransformer; the vision towers of
    Hugging Face's transformers that ``statickey.convert.hugging_face_towers.FAMILIES`` names, and models with one;
    and what ``register_host_rule`` adds. Norms of queries, gates, layer scale, drop path and register tokens stay;
    where heads share keys and values in groups, each gets its own. The model's class gains what mixers need: keys
    in ``no_weight_decay``, resampling in ``set_input_size``, for MetaFormers also ``group_matcher``.

    Saved, it is loaded as it was made: build the host, convert it likewise, then load its weights. For a folder of
    timm's ``save_for_hf``: ``timm.create_model("local-dir:FOLDER")``, without ``pretrained``, ``convert``,
    ``timm.models.load_checkpoint(model, "FOLDER/model.safetensors")``. ``save_converted`` and ``load_converted`` keep
    the conversion beside the weights. Models of transformers are loaded by
    ``statickey.convert.hugging_face.from_pretrained``.

    The mixers' own parameters are drawn under a forked random state, each place from a seed of its own. So
    models built and converted at one seed share every other weight, bit for bit, whichever mixers they got.

    Args:
        model: A model of a known kind, or what wraps one: features of timm that keep the model, transformers'
            ``TimmBackbone``, a segmenter, ``DataParallel``, ``torch.compile``. The model inside is converted in
            place, and names are those in what was given.
        mixer: A name in ``MIXERS``.
        layers: ``"all"`` attention modules, those with a static key only if no other is left; or indices into
            all of them, in order of depth, negative ones from the end; or one or more module names or patterns
            (``"stages.1.*"``), which may also name convolutional token mixers of a MetaFormer.
        keep_weights: Carry over the query, value and output projections. Where a static key stands already, its
            rows too, if the new mixer has a key of that name and shape (ska to and from fcska, a mixer to itself; on
            its own grid, rows or function); cska shares none with the others. Self-attention cannot come back so:
            the projection of its keys is gone.
        mixer_args: Further constructor arguments of the mixer, such as ``kernel_size`` or ``head_dim``.
        calibration: Images of the kind the model works on, a loader or a ``Calibration`` that says more: keys are
            fitted so that each head attends as it did, and heads that need keys of the input may keep them. For
            mixer ``"ska"``; the layers that are made are ``ska`` or ``partly_static``.

    Returns:
        Which modules were replaced, their grids, parameters and MACs; with a calibration also what it found. On any
        error or interruption the model is unchanged.

    Raises:
        UnknownNameError: No mixer of that name.
        UnsupportedHostError: The model, or one of its modules, is of a kind this cannot swap; or it wraps several
            models, or one whose parameters it has noted.
        StaticKeyError: ``layers`` names nothing, or the mixer refuses its arguments; or images are too few, not
            finite or do not fit, or no head stays within ``max_drop``.
    """
    if calibration is None:
        return swap(model, mixer, layers=layers, keep_weights=keep_weights, mixer_args=mixer_args)
    if mixer != "ska":
        raise StaticKeyError(f"calibration fits the keys of mixer 'ska', not of {mixer!r}; leave it out")
    if mixer_args or not keep_weights:
        raise StaticKeyError(
            "calibration keeps the host's weights and heads: leave out mixer_args and keep_weights; set_key_size and "
            "set_off_grid change a converted model"
        )
    asked = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    with torch.inference_mode(False):  # what is made under it could not be trained
        return Calibrator(model, layers, asked).run()
