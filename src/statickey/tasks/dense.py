"""What detection and segmentation share: recipes, networks on a pyramid, and their cards."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from .._checks import check_choice, check_count, check_positive
from .._typing import OffGrid
from ..data import OnBadSample, open_image, to_mode
from ..errors import StaticKeyError
from .recipe import Recipe
from .task import Task
from .weights import ModelCard, without_weights

KEYS_FOR = 224
"""Pixels a side, at most, that keys are built for where nothing is said: those of a classifier to start from."""
SMALL = 256
"""Pixels along an image or a crop under which narrower and quicker heads do."""
_GREATEST_SCALE = 100


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """How to train on images with marks: what every recipe has, and what stands here.

    Args:
        data: ``scenes``, digits on a canvas, or a folder; see the documentation for its layouts.
        model: As in every recipe; the network needs maps at strides 4, 8, 16 and 32, or be a vision transformer.
        weights: As in every recipe; those of a classifier fill the backbone.
        on_bad_sample: Refuse data with a sample that cannot be used, or skip such samples.
        img_size: Bring the shorter side of all images to this many pixels; default as stored.
        train_size: Side in pixels that keys and position embeddings are built for; default 224, or less where images
            or crops are smaller.
        off_grid: What static keys do on maps of another grid: ``pool`` averages values over theirs, ``window`` tiles
            the map, ``resample`` attends to all tokens, whose cost is the square of the image's pixels. What
            ``mixer`` or ``model_args`` say of it goes before.
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
    train_size: int | None = None
    off_grid: OffGrid = "pool"
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
        sizes = {name: getattr(self, name) for name in ("img_size", "train_size")}
        check_positive(**{name: size for name, size in sizes.items() if size is not None})
        check_choice(off_grid=(self.off_grid, get_args(OffGrid)))
        check_count(frozen_stages=self.frozen_stages)
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= _GREATEST_SCALE:
            raise StaticKeyError(
                f"scale={list(self.scale)} must be two positive factors, the smaller first, {_GREATEST_SCALE} at most"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise StaticKeyError(f"{name}={list(getattr(self, name))} must be three numbers, one per channel")
        if min(self.std) <= 0:
            raise StaticKeyError(f"std={list(self.std)} must be positive numbers")


class DenseTask(Task):
    """A task whose network stands on a pyramid of feature maps and takes images of any size."""

    recipe_class: ClassVar[type[DenseRecipe]]
    fixed_size: ClassVar[bool] = False
    pictured: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]]
    """The settings of a recipe, beside the network's, that decide what is built; a card keeps them."""

    @abstractmethod
    def network(self, name: str, mixer: str | None, settings: Any, **common: Any) -> nn.Module:
        """A detector or segmenter with fresh weights.

        Args:
            name: Of the network it stands on.
            mixer: As in ``build_model``.
            settings: A recipe, of which ``settings`` decide.
            common: Further arguments of ``build_model``: sizes, seed and what is given to the network.
        """

    def build(self, recipe: Any, data: Any, mixer: str | None, seed: int) -> nn.Module:
        """The network for some data, its first stages frozen where the recipe says so."""
        recipe = self.settled(recipe, data)
        model: Any = self.network(
            recipe.model,
            mixer,
            recipe,
            img_size=recipe.train_size,
            num_classes=len(data.class_names),
            model_args=recipe.model_args,
            fp32_logits=recipe.fp32_logits,
            off_grid=recipe.off_grid,
            seed=seed,
        )
        model.pyramid.freeze(recipe.frozen_stages)
        return model  # type: ignore[no-any-return]

    def rebuild(self, card: ModelCard, img_size: int | None = None) -> nn.Module:
        """The network of a card, for images whose shorter side is brought to ``img_size``, if that is given."""
        settings = self._settings_of(card.task_args)
        if img_size is not None:
            settings = self.resized(settings, img_size)
        return self.network(
            card.architecture,
            card.mixer,
            settings,
            img_size=card.img_size,
            num_classes=len(card.class_names),
            model_args=without_weights(card.model_args),
            fp32_logits=card.fp32_logits,
            off_grid=settings.off_grid,
            seed=0,
        )

    def resized(self, recipe: Any, img_size: int) -> Any:
        """The recipe for images of another size."""
        return replace(recipe, img_size=img_size)

    def card(self, recipe: Any, data: Any, module: Any, mixer: str | None) -> ModelCard:
        """Architecture, what stands on it, classes and normalisation."""
        recipe = self.settled(recipe, data)
        return ModelCard(
            architecture=recipe.model,
            mixer=mixer,
            model_args=recipe.model_args,
            img_size=recipe.train_size,
            in_chans=data.in_chans,
            class_names=data.class_names,
            mean=recipe.mean,
            std=recipe.std,
            fp32_logits=recipe.fp32_logits,
            task_args={name: getattr(recipe, name) for name in self.settings},
        )

    def _settings_of(self, task_args: Mapping[str, Any]) -> Any:
        for name in sorted(task_args.keys() ^ set(self.settings)):
            problem = "is no setting of" if name in task_args else "is missing for"
            raise StaticKeyError(f"{name} {problem} task {self.name!r}")
        return self.recipe_class(**task_args)


class DensePredictor:
    """A trained network of such a task at work on image files, one by one: each has its own size.

    Args:
        model: The network.
        card: How its images were prepared.
        top_k: Answers per image.
    """

    batch_size: ClassVar[int] = 1

    def __init__(self, model: nn.Module, card: ModelCard, *, top_k: int) -> None:
        check_positive(top_k=top_k)
        self.model: Any = model
        self.card, self.top_k = card, top_k
        device = next(model.parameters()).device
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (card.mean, card.std))

    def read(self, path: Path) -> Tensor:
        """Pixels (3, H, W) in uint8."""
        with open_image(path) as file:
            pixels: Tensor = pil_to_tensor(to_mode(file, "RGB"))
        return pixels
