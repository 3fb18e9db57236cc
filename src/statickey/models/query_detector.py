"""A detector whose queries each find one object, without suppression of overlaps: RT-DETRv2 on any network."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..convert import forked_random
from ..errors import StaticKeyError
from .pyramid import Pyramid
from .region_heads import in_float32
from .segmenters import without_batch_norms

QUERY_STRIDES = (8, 16, 32)
"""Strides of the maps that queries look at."""
_WIDE = 256
"""Channels from which on the decoder is as deep, and has as many queries, as for photographs."""
_DETECTIONS = 100
_LOSSES = ("loss_vfl", "loss_bbox", "loss_giou")


class QueryDetector(nn.Module):
    """Images, of any sizes, to losses in training, and to detections in evaluation.

    Images come normalised. Each is stretched to one square, as RT-DETR's own are, so that none is padded, and boxes
    are brought back to the image's own size. No layer mixes images: BatchNorm is replaced by GroupNorm. What stands
    on the pyramid is that of Hugging Face's transformers, with its losses; the decoder and all boxes stay in float32
    under mixed precision. Those losses are divided by the objects of a batch, so processes and parts of a batch
    count as batches of their own.

    The noise of the boxes and classes that it learns to clean is drawn from the ``seed`` of a batch's first target,
    and from nothing else.

    Args:
        pyramid: The network, with maps at ``QUERY_STRIDES``.
        num_classes: Classes of objects.
        channels: Width of encoder and decoder, a multiple of 4; from 256 on six layers and 300 queries decode, below
            three and 100.
        side: Side in pixels of the square, which is rounded up to a multiple of 32.

    Raises:
        StaticKeyError: The width is no such number, or transformers is not installed.

    Source:
        Zhao et al., arXiv 2304.08069; Lv et al., arXiv 2407.17140.
    """

    def __init__(self, pyramid: Pyramid, num_classes: int, *, channels: int, side: int) -> None:
        super().__init__()
        if channels % 4:
            raise StaticKeyError(f"channels={channels} must be a multiple of 4 for rt_detr_v2")
        self.pyramid = pyramid
        coarsest = QUERY_STRIDES[-1]
        self.side = coarsest * math.ceil(side / coarsest)
        self.detr = _rt_detr(pyramid.channels, num_classes, channels, self.side)

    def forward(self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Any]] | None = None) -> Any:
        """Losses by name, in training; in evaluation a dict of each image.

        Args:
            images: Normalised, each (C, H, W).
            targets: Of each image ``boxes`` (n, 4), corners in pixels; ``labels`` (n,) from 0; and a ``seed``,
                without which torch's global state decides. Masks are left alone.

        Returns:
            The losses of classes, corners and overlaps, each summed over layers and over objects and noise; or of
            each image ``boxes`` (m, 4), ``labels`` (m,) and ``scores`` (m,), best first.

        Raises:
            StaticKeyError: It is in training and has no targets.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        squares = torch.stack([_stretched(image, self.side) for image in images])
        model = self.detr
        maps = zip(model.encoder_input_proj, self.pyramid(squares), strict=True)
        encoded = [in_float32(each) for each in model.encoder([project(x) for project, x in maps]).last_hidden_state]
        with torch.autocast(squares.device.type, enabled=False):
            if not self.training:
                return _found(model(None, inputs_embeds=encoded[0], encoder_outputs=(encoded,)), sizes)
            if targets is None:
                raise StaticKeyError("a detector in training needs targets; call eval() to detect")
            labels = [_relative(target, size) for target, size in zip(targets, sizes, strict=True)]
            with _draws_of(targets, squares):
                said = model(None, inputs_embeds=encoded[0], encoder_outputs=(encoded,), labels=labels)
            return self._losses(said, labels)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        of_encoder = getattr(self.detr, "no_weight_decay", set)  # where its encoder was converted
        return {
            *(f"pyramid.{name}" for name in self.pyramid.no_weight_decay()),
            *(f"detr.{name}" for name in of_encoder()),
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layer of a parameter by its name, as timm's layer decay asks; all else is above the body."""
        layers = {f"pyramid.{name}": layer for name, layer in self.pyramid.layers(coarse=coarse).items()}
        return lambda name: layers.get(name, math.inf)

    def _losses(self, said: Any, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

        logits, boxes = said.intermediate_logits, said.intermediate_reference_points
        if not any(len(own["boxes"]) for own in labels):  # which its matcher cannot take
            return self._losses_without_objects(said)
        config = self.detr.config
        _, parts, _ = RTDetrForObjectDetectionLoss(
            logits[:, -1],
            labels,
            logits.device,
            boxes[:, -1],
            config,
            logits,
            boxes,
            enc_topk_logits=said.enc_topk_logits,
            enc_topk_bboxes=said.enc_topk_bboxes,
            denoising_meta_values=said.denoising_meta_values,
        )
        return {kind: torch.stack([v for k, v in parts.items() if k.startswith(kind)]).sum() for kind in _LOSSES}

    def _losses_without_objects(self, said: Any) -> dict[str, Tensor]:
        """Every query of every layer says nothing; all parameters have a part, as with several processes."""
        config = self.detr.config
        logits = torch.cat([said.enc_topk_logits[:, None], said.intermediate_logits], 1)
        weight = config.focal_loss_alpha * logits.detach().sigmoid() ** config.focal_loss_gamma
        none = 0 * (said.intermediate_reference_points.sum() + said.enc_topk_bboxes.sum())
        none = none + 0 * self.detr.denoising_class_embed.weight.sum()
        classes = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), weight, reduction="sum")
        return dict(zip(_LOSSES, (classes, none, none), strict=True))


def check_transformers() -> None:
    """Refuse to build what needs transformers without it.

    Raises:
        StaticKeyError: It is not installed.
    """
    if find_spec("transformers") is None:
        raise StaticKeyError("arch='rt_detr_v2' needs one more package: pip install 'statickey[hf]'")


def _rt_detr(map_channels: Sequence[int], num_classes: int, channels: int, side: int) -> Any:
    """What stands on the maps: encoder, decoder and heads, no image mixed with another."""
    check_transformers()
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    wide = channels >= _WIDE
    heads = next(n for n in range(max(channels // 32, 1), 0, -1) if channels % n == 0)
    tokens = sum((side // stride) ** 2 for stride in QUERY_STRIDES)
    stand_in = RTDetrResNetConfig(  # a body of the right widths, which is dropped
        embedding_size=2,
        hidden_sizes=[2, *map_channels],
        depths=[1] * 4,
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrV2Config(
        backbone_config=stand_in,
        num_labels=num_classes,
        image_size=side,  # which convert gives keys of the encoder their grid by
        d_model=channels,
        encoder_hidden_dim=channels,
        encoder_in_channels=list(map_channels),
        encoder_ffn_dim=4 * channels,
        encoder_attention_heads=heads,
        decoder_in_channels=[channels] * len(map_channels),
        decoder_ffn_dim=4 * channels,
        decoder_attention_heads=heads,
        decoder_layers=6 if wide else 3,
        num_queries=min(300 if wide else 100, tokens),
        initializer_range=(3 * channels)
        ** -0.5,  # as torch's own layers of this width start; 0.01 learns more slowly
        tie_word_embeddings=False,  # each layer's heads once, in the decoder
        attn_implementation="eager",  # which counters of multiply-accumulates see into
    )
    model = without_batch_norms(RTDetrV2ForObjectDetection(config).model)
    model.backbone = nn.Identity()
    return model


def _stretched(image: Tensor, side: int) -> Tensor:
    if image.shape[-2:] == (side, side):
        return image
    return F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]


def _relative(target: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """Labels and boxes as transformers takes them: centres and sides as shares of the image's."""
    height, width = size
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh")
    return {"class_labels": target["labels"], "boxes": boxes / boxes.new_tensor([width, height, width, height])}


@contextmanager
def _draws_of(targets: Sequence[Mapping[str, Any]], like: Tensor) -> Iterator[None]:
    """Random draws from the targets' seeds, where they have them."""
    if any("seed" not in target for target in targets):
        yield
        return
    with forked_random(like):
        torch.manual_seed(int(targets[0]["seed"]))
        yield


def _found(said: Any, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    logits, boxes = said.intermediate_logits[:, -1], said.intermediate_reference_points[:, -1]
    num_classes = logits.shape[-1]
    scores, places = logits.sigmoid().flatten(1).topk(min(_DETECTIONS, logits[0].numel()))
    corners = box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1)
    return [
        {
            "boxes": corners[i, places[i] // num_classes] * corners.new_tensor([width, height, width, height]),
            "labels": places[i] % num_classes,
            "scores": scores[i],
        }
        for i, (height, width) in enumerate(sizes)
    ]
