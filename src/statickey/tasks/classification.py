"""Learning which class an image is of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from .._checks import check_positive
from ..data import (
    Augmentation,
    ImageData,
    ImageDataModule,
    OnBadImage,
    StreamedImages,
    load_images,
    open_stream,
    settled_augmentation,
)
from ..errors import DataError, StaticKeyError
from ..models import build_model
from .accuracy import ACCURACY, Accuracy
from .classification_report import ClassificationScores, Classifier
from .recipe import Recipe
from .task import Arrays, Evidence, Metric, ScoreOn, Task
from .weights import ModelCard

Data = ImageData | StreamedImages


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Augmentation, Recipe):
    """How to train an image classifier: what every recipe has, the augmentation, and what stands here.

    Args:
        data: ``digits``, a torchvision name (``cifar10``, ...), ``hf:NAME`` of the Hugging Face hub, or a folder:
            of images (train/CLASS/*.jpg, val/CLASS/*.jpg), of parquet files or of webdataset shards.
        on_bad_image: Refuse data with an unreadable image, or skip such images.
        lr: Peak learning rate; default 3e-3 for images up to 16 pixels, else 1e-3, each tuned for mhsa with adamw.
        img_size: Bring all images to this many pixels; default as stored.
        stream: Decode images in loader workers as they are needed, with timm's transforms, rather than keep all
            in memory.
        mean: Normalisation per channel; default that of the training images, of ImageNet when streaming.
        std: As ``mean``.
    """

    on_bad_image: OnBadImage = "fail"
    img_size: int | None = None
    stream: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        Recipe.__post_init__(self)
        Augmentation.__post_init__(self)
        if self.img_size is not None:
            check_positive(img_size=self.img_size)
        if self.std is not None and min(self.std, default=0) <= 0:
            raise StaticKeyError(f"std={self.std} must be positive numbers, one per channel")
        if self.stream and self.crop_padding is not None:
            raise StaticKeyError(
                f"crop_padding={self.crop_padding} is for images in memory; streamed ones are cropped at random scale"
            )
        if self.stream and self.limit is not None:
            raise StaticKeyError(f"limit={self.limit} is for images in memory; leave out --stream or --limit")


class Classification(Task):
    """Cross-entropy, and top-1 accuracy."""

    name: ClassVar[str] = "classify"
    metric: ClassVar[Metric] = ACCURACY
    recipe_class: ClassVar[type[Recipe]] = ClassificationRecipe

    def read_data(self, recipe: ClassificationRecipe) -> Data:
        """Images in memory, or ready to stream."""
        data_dir = None if recipe.data_dir is None else Path(recipe.data_dir)
        common: dict[str, Any] = {
            "data_dir": data_dir,
            "img_size": recipe.img_size,
            "on_bad_image": recipe.on_bad_image,
        }
        data: Data = (
            open_stream(recipe.data, **common)
            if recipe.stream
            else load_images(recipe.data, limit=recipe.limit, **common)
        )
        if len(data.class_names) < 2:
            raise DataError(f"{recipe.data} has the one class {data.class_names}; a classifier needs two")
        return data

    def data_module(
        self, recipe: ClassificationRecipe, data: Data, seed: int, num_workers: int = 0
    ) -> ImageDataModule:
        """Batches of images (B, C, H, W) and labels, (B,), or (B, num_classes) once mixed."""
        return ImageDataModule(
            data,
            augmentation=recipe,
            batch_size=recipe.batch_size,
            seed=seed,
            holdout=recipe.holdout,
            grad_accum_steps=recipe.grad_accum_steps,
            mean=recipe.mean,
            std=recipe.std,
            num_workers=num_workers,
        )

    def settled(self, recipe: ClassificationRecipe, data: Data) -> ClassificationRecipe:
        """The recipe with the augmentation these images stand, and the rate mhsa trains best with at their size."""
        lr = (3e-3 if data.img_size <= 16 else 1e-3) if recipe.lr is None else recipe.lr
        return replace(settled_augmentation(recipe, data), lr=lr)

    def build(self, recipe: ClassificationRecipe, data: Data, mixer: str | None, seed: int) -> nn.Module:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return build_model(
            recipe.model,
            mixer,
            img_size=data.img_size,
            num_classes=len(data.class_names),
            in_chans=data.in_chans,
            seed=seed,
            model_args=recipe.model_args,
            fp32_logits=recipe.fp32_logits,
        )

    def input_size(self, recipe: ClassificationRecipe, data: Data) -> tuple[int, int, int]:
        """The images' own size."""
        return data.in_chans, data.img_size, data.img_size

    def card(self, recipe: ClassificationRecipe, data: Data, module: ImageDataModule, mixer: str | None) -> ModelCard:
        """Architecture, classes and normalisation."""
        return ModelCard(
            architecture=recipe.model,
            mixer=mixer,
            model_args=recipe.model_args,
            img_size=data.img_size,
            in_chans=data.in_chans,
            class_names=data.class_names,
            mean=tuple(module.mean.flatten().tolist()),
            std=tuple(module.std.flatten().tolist()),
            streamed=recipe.stream,
            fp32_logits=recipe.fp32_logits,
        )

    def examples(
        self, data: ImageData, module: ImageDataModule, split: ScoreOn, number: int
    ) -> tuple[list[Tensor], Tensor, list[str]]:
        """The first image of each of the first classes."""
        part = data.test if split == "test" else module.val_part
        picks = [int((part.labels == label).nonzero()[0]) for label in torch.unique(part.labels)][:number]
        captions = [data.class_names[int(part.labels[pick])] for pick in picks]
        return list(part.images[picks]), module.normalize(part.images[picks]), captions

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], recipe: ClassificationRecipe
    ) -> dict[str, Tensor]:
        """Cross-entropy; mixed labels come smoothed."""
        images, labels = batch
        smoothing = recipe.label_smoothing if labels.ndim == 1 else 0.0
        return {"cross_entropy": F.cross_entropy(model(images), labels, label_smoothing=smoothing)}

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, num_classes) in float32, and labels (B,)."""
        images, labels = batch
        return model(images).float(), labels

    def validation_metric(self, data: Data) -> MulticlassAccuracy:
        """Top-1 accuracy over all images."""
        return MulticlassAccuracy(len(data.class_names), average="micro")

    def evidence(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Accuracy:
        """The class said and the true one of each image."""
        return Accuracy(torch.cat(list(outputs)).argmax(1).numpy(), torch.cat(list(targets)).numpy())

    def evidence_from(self, arrays: Arrays) -> Evidence:
        """From ``predicted`` and ``truth``; version 0.1 called the former ``last``."""
        return Accuracy(arrays["predicted"] if "predicted" in arrays else arrays["last"], arrays["truth"])

    def evaluation(self, class_names: Sequence[str]) -> ClassificationScores:
        """Accuracies, calibration, and what is taken for what."""
        return ClassificationScores(tuple(class_names))

    def predictor(self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int) -> Classifier:
        """The likeliest classes of an image."""
        return Classifier(model, card, img_size=img_size, top_k=top_k)
