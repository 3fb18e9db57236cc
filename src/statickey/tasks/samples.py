"""Images of the kind that a trained network is for, as it takes them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop

from ..data import image_files
from ..errors import DataError
from .evaluate import check_classes, recipe_of
from .run import read_result
from .scoring import score
from .start import RESULT_FILE
from .task import Evidence, ScoreOn, Task
from .weights import ModelCard

Scored = Callable[[nn.Module], Evidence]


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
    split: ScoreOn = "holdout",
) -> tuple[Tensor, Scored | None]:
    """Images for a trained classifier or segmenter, drawn by a seed and prepared as it takes them, (N, C, S, S).

    Args:
        task: Its task.
        model: It.
        card: How its images were prepared; S is its ``img_size``, to which a segmenter's images are cut.
        source: Where it comes from; the folder of a run says what it was trained on.
        data: A folder of images, or data as ``train`` takes them; default the run's.
        data_dir: Where torchvision keeps its downloads.
        num_images: N, or fewer where there are no more.
        seed: Of which are taken.
        split: Images to score a classifier on.

    Returns:
        The images, and what scores a network on the others, where they have labels.

    Raises:
        DataError: There are none.
    """
    if data is not None and Path(data).is_dir() and not any(Path(data).glob("*.parquet")):
        return _from_files(task, model, card, Path(data), num_images, seed), None
    return _from_run(task, source, card, data, data_dir, num_images, seed, split)


def _from_files(task: Task, model: nn.Module, card: ModelCard, folder: Path, num_images: int, seed: int) -> Tensor:
    """Images of a folder, as the network takes them."""
    files = image_files(folder)
    predictor = task.predictor(model, card, img_size=None, top_k=1)
    taken = [files[index] for index in _drawn(len(files), num_images, seed)]
    if not taken:
        raise DataError(f"{folder} holds no image; give a folder with images of the kind the network is for")
    pixels = [predictor.read(path) for path in taken]
    if not task.fixed_size:
        pixels = [center_crop(each, [card.img_size, card.img_size]) for each in pixels]
    images: Tensor = predictor.prepare(pixels)
    return images


def _from_run(
    task: Task,
    source: str,
    card: ModelCard,
    data: str | None,
    data_dir: str | None,
    num_images: int,
    seed: int,
    split: ScoreOn,
) -> tuple[Tensor, Scored | None]:
    """Training images of a run, or of other data that ``train`` takes, and what scores on the others."""
    place = Path(source) if Path(source).is_dir() else Path(source).parent
    result = read_result(place) if (place / RESULT_FILE).is_file() else None
    if result is None and data is None:
        raise DataError(f"{source} does not say what it was trained on; give --data, a folder of images")
    recipe = recipe_of(task, source, card, result, data, data_dir, split)
    read: Any
    if not task.fixed_size:
        recipe = replace(recipe, crop_size=card.img_size)
        read = task.read_data(recipe)
        images = task.examples(read, task.data_module(recipe, read, 0), "holdout", num_images)[1]
        return images, None
    recipe = replace(recipe, img_size=card.img_size)
    if recipe.stream:
        raise DataError(f"{source} streamed its images; give --data, a folder of images")
    read = task.read_data(recipe)
    module: Any = task.data_module(recipe, read, 0 if result is None else result["seed"])
    part = module.train_part.images
    images = module.normalize(part[_drawn(len(part), num_images, seed)])

    def scored(model: nn.Module) -> Evidence:
        check_classes(card, read.class_names, recipe.data)
        return score(task, model, module, module.scoring_dataloader(split))

    return images, scored


def _drawn(total: int, wanted: int, seed: int) -> list[int]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())
