"""What a task is: all that training, scoring and comparing must know of what is learned."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torchmetrics
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from ..data import DataSet, PlannedDataModule
from .recipe import Recipe
from .weights import ModelCard

Arrays = Mapping[str, NDArray[Any]]
ScoreOn = Literal["test", "holdout"]


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by, and how tables and figures print it."""

    name: str
    """In files: ``accuracy``, and from it ``ema_accuracy`` and ``holdout_accuracy``."""
    label: str
    """In tables and figures."""
    unit: str = "%"
    higher_is_better: bool = True

    def text(self, value: float) -> str:
        """The number with its unit."""
        return f"{value:.2f} {self.unit}".rstrip()


class Evidence(Protocol):
    """What a score is made of, image by image, so that it can be taken for any weights of the images."""

    @property
    def num_images(self) -> int:
        """N."""

    def value(self, image_weights: NDArray[np.float64] | None = None) -> float:
        """The task's metric over the images, each counted as often as its weight, (N,), says; default once."""

    def arrays(self) -> Arrays:
        """All of it as arrays whose first axes run over the images or parts of them, in the order of the images.

        Those of several batches and processes are put one behind the other, and the task makes evidence of them
        again: so where images have several parts, the arrays hold how many each has, not which image a part is of.
        """


class Evaluation(Protocol):
    """What ``evaluate`` says of a network on some images, which come batch by batch."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take a batch's ``outputs``."""

    def to_json(self) -> dict[str, Any]:
        """The numbers, as plain values, the number of ``images`` among them."""

    def rows(self) -> dict[str, str]:
        """The numbers worth a line on the terminal, by what they are."""

    def per_class(self) -> list[dict[str, Any]]:
        """One row a class, one at least, as plain values."""

    def figures(self) -> dict[str, Figure]:
        """Pictures, by the stem of their file's name."""

    def results(self, data: Any) -> Any:
        """What was said of each image of some data, for other programs to read as JSON; None where none do."""


@dataclass(frozen=True)
class Answer:
    """What a network says of one image."""

    row: dict[str, Any]
    """In plain values."""
    detail: Any = None
    """What pictures need beside it."""


class Predictor(Protocol):
    """A trained network at work on image files."""

    batch_size: ClassVar[int]
    """Files read at once."""

    def read(self, path: Path) -> Tensor:
        """Pixels (C, H, W) in uint8; raises one of ``statickey.data.UNREADABLE``."""

    def prepare(self, pixels: Sequence[Tensor]) -> Any:
        """What the network takes of these images, on its device."""

    def predict(self, images: Any) -> list[Answer]:
        """What it says of each image."""

    def picture(self, pixels: Tensor, answer: Answer, title: str) -> Figure:
        """What it says, on the image."""

    def mask(self, answer: Answer) -> Image.Image:
        """The class of every pixel.

        Raises:
            StaticKeyError: The task has no such thing.
        """

    def title(self, row: Mapping[str, Any]) -> str:
        """One of these in a few words, for a picture."""

    def csv(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[dict[str, Any]]]:
        """The columns and rows of a CSV file."""

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        """The first rows, for the terminal."""


class Task(ABC):
    """A kind of learning: its data, its network, its losses and its score.

    The engine knows runs, folders, checkpoints, processes and display; all it must know of labels is asked here.
    A batch is whatever ``data_module`` yields, its first entry the images.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    recipe_class: ClassVar[type[Recipe]]
    fixed_size: ClassVar[bool] = True
    """Whether all images of a network are brought to the one size of its card."""
    pictured: ClassVar[bool] = False
    """Whether training shows what is said of held-out images, drawn on them, beside its curves."""

    @abstractmethod
    def read_data(self, recipe: Any) -> DataSet:
        """The data of a recipe.

        Raises:
            DataError: They are missing, inconsistent or unreadable.
        """

    @abstractmethod
    def data_module(self, recipe: Any, data: Any, seed: int, num_workers: int = 0) -> PlannedDataModule:
        """The batches of a recipe."""

    def settled(self, recipe: Any, data: Any) -> Any:
        """The recipe with the defaults that depend on the data filled in; training needs a learning rate.

        ``train`` and ``compare`` call it before they write anything, so it may refuse what does not fit the data.
        """
        return recipe

    def rebuild(self, card: ModelCard, img_size: int | None = None) -> nn.Module:
        """The network that a card describes, with fresh weights, for its own or another image size."""
        return card.build(img_size)

    @abstractmethod
    def build(self, recipe: Any, data: Any, mixer: str | None, seed: int) -> nn.Module:
        """The network for some data, with fresh weights; ``mixer`` as in ``build_model``."""

    @abstractmethod
    def input_size(self, recipe: Any, data: Any) -> tuple[int, int, int]:
        """(C, H, W) of the image that multiply-accumulates are counted on."""

    @abstractmethod
    def card(self, recipe: Any, data: Any, module: Any, mixer: str | None) -> ModelCard:
        """How to build the network again, for beside its weights."""

    @abstractmethod
    def examples(self, data: Any, module: Any, split: ScoreOn, number: int) -> tuple[list[Tensor], Any, list[str]]:
        """A few images to draw a network's attention on.

        Returns:
            Their pixels (C, H, W) in uint8, the same as the network takes them, and a caption each.
        """

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, recipe: Any) -> dict[str, Tensor]:
        """The losses of a training batch, scalars, by the same names each time; their sum is what is minimised."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """What a network in evaluation says of a batch, and the truth, as the metric takes them."""

    @abstractmethod
    def validation_metric(self, data: Any) -> torchmetrics.Metric:
        """The metric of the learning curve; it computes one number, between 0 and 1 where the unit is %."""

    @abstractmethod
    def evidence(self, outputs: Sequence[Any], targets: Sequence[Any]) -> Evidence:
        """What the score is made of, from the ``outputs`` of at least one batch."""

    @abstractmethod
    def evidence_from(self, arrays: Arrays) -> Evidence:
        """Evidence from its arrays, as they are stored; raises KeyError where one is missing."""

    @abstractmethod
    def evaluation(self, class_names: Sequence[str]) -> Evaluation:
        """What ``evaluate`` prints and writes, before the first batch."""

    @abstractmethod
    def predictor(self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int) -> Predictor:
        """A trained network at work on files; ``top_k`` answers an image."""
