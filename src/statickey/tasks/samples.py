"""Images of the kind that a trained classifier is for, as it takes them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import image_files
from ..errors import DataError
from .evaluate import recipe_of
from .run import read_result
from .scoring import score
from .start import RESULT_FILE
from .task import Task
from .weights import ModelCard

Score = Callable[[nn.Module], float]


def images_for(
    task: Task,
    model: nn.Module,
    card: ModelCard,
    source: str,
    *,
    data: str | None,
    data_dir: str | None,
    num_images: int,
    seed: int,
) -> tuple[Tensor, Score | None]:
    """Images for a trained classifier, drawn by a seed and prepared as it takes them, (N, C, H, W).

    Args:
        task: Its task.
        model: It.
        card: How its images were prepared.
        source: Where it comes from; the folder of a run says what it was trained on.
        data: A folder of images, or data as ``train`` takes them; default the run's.
        data_dir: Where torchvision keeps its downloads.
        num_images: N, or fewer where there are no more.
        seed: Of which are taken.

    Returns:
        The images, and its score on those held out of them, where they have labels.

    Raises:
        DataError: There are none.
    """
    if data is not None and Path(data).is_dir() and not any(Path(data).glob("*.parquet")):
        return _from_files(task, model, card, Path(data), num_images, seed), None
    return _from_run(task, source, card, data, data_dir, num_images, seed)


def _from_files(task: Task, model: nn.Module, card: ModelCard, folder: Path, num_images: int, seed: int) -> Tensor:
    """Images of a folder, as the network takes them."""
    files = image_files(folder)
    predictor = task.predictor(model, card, img_size=None, top_k=1)
    taken = [files[index] for index in _drawn(len(files), num_images, seed)]
    if not taken:
        raise DataError(f"{folder} holds no image; give a folder with images of the kind the network is for")
    images: Tensor = predictor.prepare([predictor.read(path) for path in taken])
    return images


def _from_run(
    task: Task, source: str, card: ModelCard, data: str | None, data_dir: str | None, num_images: int, seed: int
) -> tuple[Tensor, Score]:
    """Training images of a run, or of other data that ``train`` takes, and the score on those held out of them."""
    place = Path(source) if Path(source).is_dir() else Path(source).parent
    result = read_result(place) if (place / RESULT_FILE).is_file() else None
    if result is None and data is None:
        raise DataError(f"{source} does not say what it was trained on; give --data, a folder of images")
    recipe = recipe_of(task, source, card, result, data, data_dir, "holdout")
    recipe = replace(recipe, img_size=card.img_size)
    if recipe.stream:
        raise DataError(f"{source} streamed its images; give --data, a folder of images")
    module: Any = task.data_module(recipe, task.read_data(recipe), 0 if result is None else result["seed"])
    part = module.train_part.images
    images = module.normalize(part[_drawn(len(part), num_images, seed)])
    return images, partial(_score, task, module)


def _score(task: Task, module: Any, model: nn.Module) -> float:
    return score(task, model, module, module.scoring_dataloader("holdout")).value()


def _drawn(total: int, wanted: int, seed: int) -> list[int]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())
