"""Learning what a conversion lost: a network with static keys follows the one it was made of."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import as_mixers, feature_loss, key_parameters, layer_loss
from ..data import ImageDataModule
from ..errors import StaticKeyError
from ..models import CONFIG_FILE, WEIGHTS_FILE, load_exactly
from .classification import Classification, ClassificationRecipe, Data
from .published import published_model
from .recipe import Recipe
from .weights import ModelCard

Match = Literal["layers", "features", "logits", "labels"]
"""What of the network it was made of a repaired one is made to give, or the labels."""


@dataclass(frozen=True, kw_only=True)
class RepairRecipe(ClassificationRecipe):
    """How to repair a converted classifier: as a classifier is trained, and what stands here.

    One run matches one thing; the next may start from it (``student``), as layers, then features, then logits.

    Args:
        student: Folder of the converted network, of ``statickey convert`` or of an earlier repair.
        teacher: What was converted: the folder of a run, or a pretrained model's name, as timm has it.
        match: ``layers`` trains the keys alone, each layer's output on the teacher's input matched to the teacher's;
            the others train all weights: the last ``features`` or the ``logits`` matched to the teacher's, or the
            ``labels`` given.
        lr: Peak learning rate; default 1e-2 for keys, 1e-3 for all weights.
    """

    student: str = ""
    teacher: str = ""
    match: Match = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = Recipe.defaults()
        for name in ("model", "model_args", "weights"):
            if getattr(self, name) != defaults[name]:
                raise StaticKeyError(
                    f"{name}={getattr(self, name)!r}: a repair has the student's network and weights; leave it out"
                )

    def need(self) -> None:
        """Refuse a recipe without its two networks.

        Raises:
            StaticKeyError: One is not named.
        """
        for name in ("student", "teacher"):
            if not getattr(self, name):
                raise StaticKeyError(f"a repair needs --{name}, the folder of a network; see statickey train --help")


class Repair(Classification):
    """A converted classifier follows the one it was made of; accuracy is its score."""

    name: ClassVar[str] = "repair"
    recipe_class: ClassVar[type[Recipe]] = RepairRecipe

    def read_data(self, recipe: Any) -> Data:
        """As a classifier's, brought to the student's size."""
        recipe.need()
        card = _card(recipe.student)
        data = super().read_data(replace(recipe, img_size=card.img_size))
        if len(data.class_names) != len(card.class_names) or data.in_chans != card.in_chans:
            raise StaticKeyError(
                f"{recipe.data} has {len(data.class_names)} classes and {data.in_chans} channels, the student "
                f"{len(card.class_names)} and {card.in_chans}; give the data it is for"
            )
        return data

    def data_module(self, recipe: Any, data: Data, seed: int, num_workers: int = 0) -> ImageDataModule:
        """As a classifier's, normalised as the student's were."""
        card = _card(recipe.student)
        return super().data_module(replace(recipe, mean=card.mean, std=card.std), data, seed, num_workers)

    def settled(self, recipe: Any, data: Data) -> Any:
        """With the rate of keys or of all weights."""
        lr = (1e-2 if recipe.match == "layers" else 1e-3) if recipe.lr is None else recipe.lr
        return super().settled(replace(recipe, lr=lr), data)

    def build(self, recipe: Any, data: Data, mixer: str | None, seed: int) -> nn.Module:
        """The student, with what is not trained frozen."""
        if mixer is not None:
            raise StaticKeyError(f"mixer={mixer!r}: a repair has the student's mixers; leave it out")
        recipe.need()
        model = _network(recipe.student)
        keys = key_parameters(model)
        if not keys:
            raise StaticKeyError(f"student={recipe.student!r} has no static key; give a converted network")
        if recipe.match == "layers":
            model.requires_grad_(False)
            for key in keys:
                key.requires_grad_(True)
        return model

    def card(self, recipe: Any, data: Data, module: ImageDataModule, mixer: str | None) -> ModelCard:
        """The student's."""
        return _card(recipe.student)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor], recipe: Any) -> dict[str, Tensor]:
        """The one asked for."""
        images, _ = batch
        if recipe.match == "labels":
            return super().losses(model, batch, recipe)
        teacher = _teacher(recipe.teacher, images.shape[-1]).to(images.device)
        if recipe.match == "layers":
            return {"layers": layer_loss(model, teacher, images)}
        if recipe.match == "logits":
            with torch.no_grad():
                wanted = teacher(images).float().log_softmax(1)
            said = model(images).float().log_softmax(1)
            return {"logits": F.kl_div(said, wanted, reduction="batchmean", log_target=True)}
        return {"features": feature_loss(model, teacher, images)}


def _card(folder: str) -> ModelCard:
    return ModelCard.read(Path(folder) / CONFIG_FILE)


def _network(folder: str, img_size: int | None = None) -> nn.Module:
    """A classifier with its weights, for images of its size or another; ``OutputError`` where there is none."""
    model = _card(folder).build(img_size)
    load_exactly(model, Path(folder) / WEIGHTS_FILE)
    return model


def _teacher(source: str, img_size: int) -> Any:
    """The network that is followed, frozen. Every step asks for it; it is read once, and when its file changed."""
    weights = Path(source) / WEIGHTS_FILE
    return _read_teacher(source, img_size, weights.stat().st_mtime_ns if weights.is_file() else None)


@lru_cache(maxsize=1)
def _read_teacher(source: str, img_size: int, changed: int | None) -> Any:
    model = _network(source, img_size) if Path(source).exists() else published_model(source, img_size)[0]
    return as_mixers(model).eval().requires_grad_(False)
