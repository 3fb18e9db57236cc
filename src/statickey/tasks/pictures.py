"""Pictures of what a network says of held-out images, beside the curves of its training."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from ..data import BatchPlan
from .board import explained_board
from .run import Run

_IMAGES = 4
_TIMES = 10
"""TensorBoard shows ten pictures of an image."""
_OBJECTS = 20
"""The surest of a detector, on each."""


def is_due(epoch: int, epochs: int) -> bool:
    """Whether pictures come after an epoch, counted from 1: ten times a run, evenly spread, the last included."""
    return epoch * _TIMES // epochs > (epoch - 1) * _TIMES // epochs


class HeldOutPictures(L.Callback):
    """Gives TensorBoard the first held-out images with what the network says of them, ten times a run.

    Weights do not depend on it: validation has the network in evaluation, and nothing is drawn from a generator.
    Under a sharded strategy, where one process alone cannot use the network, there are no pictures.

    Args:
        run: What is trained.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw where it is time and somebody may look."""
        run, epoch = self._run, trainer.current_epoch + 1
        boards = [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        alone = trainer.is_global_zero and pl_module.device_mesh is None
        if not (boards and alone and is_due(epoch, run.recipe.total_epochs)):
            return
        module: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        card = run.task.card(run.recipe, run.data, module, run.mixer)
        predictor = run.task.predictor(model, card, img_size=None, top_k=_OBJECTS)
        images, _ = module.val_images[BatchPlan(torch.arange(min(_IMAGES, len(module.val_images))), 0)]
        for number, image in enumerate(images, start=1):
            (answer,) = predictor.predict(predictor.prepare([image]))
            for board in boards:
                figure = predictor.picture(image, answer, f"held-out image {number}, epoch {epoch}")
                with explained_board(board):
                    board.experiment.add_figure(f"held-out/{number}", figure, epoch)
