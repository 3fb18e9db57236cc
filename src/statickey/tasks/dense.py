"""What the recipes of detection and segmentation share."""

from dataclasses import dataclass
from importlib.util import find_spec

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .._checks import check_count, check_positive
from ..data import OnBadSample
from ..errors import StaticKeyError
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """How to train on images with marks: what every recipe has, and what stands here.

    Args:
        data: ``scenes``, digits on a canvas, or a folder; see the documentation for its layouts.
        model: As in every recipe; the network needs maps at strides 4, 8, 16 and 32, or be a vision transformer.
        weights: Weights to start from: of a classifier, which fill the backbone, or of a network of this task.
        on_bad_sample: Refuse data with a sample that cannot be used, or skip such samples.
        img_size: Bring the shorter side of all images to this many pixels; default as stored.
        scale: Range of the random factor on the sides of training images.
        flip: Mirror half of the training images; default where the data stand it.
        mean: Normalisation per channel; default that of ImageNet.
        std: As ``mean``.
        frozen_stages: Train neither the stem nor this many first stages of the backbone; 0 trains all.
    """

    data: str = "scenes"
    model: str = "skaformer_nano"
    on_bad_sample: OnBadSample = "fail"
    img_size: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool | None = None
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    frozen_stages: int = 0

    def __post_init__(self) -> None:
        if not (find_spec("segmentation_models_pytorch") and find_spec("faster_coco_eval")):
            raise StaticKeyError("detection and segmentation need more packages: pip install 'statickey[dense]'")
        for name in ("scale", "mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        if self.img_size is not None:
            check_positive(img_size=self.img_size)
        check_count(frozen_stages=self.frozen_stages)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise StaticKeyError(f"scale={list(self.scale)} must be two positive factors, the smaller first")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise StaticKeyError(f"{name}={list(getattr(self, name))} must be three numbers, one per channel")
        if min(self.std) <= 0:
            raise StaticKeyError(f"std={list(self.std)} must be positive numbers")
