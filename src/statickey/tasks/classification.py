"""Training and scoring an image classifier under Lightning."""

import math
import time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ..data import mix_seed
from ..errors import DivergedError, OutputError


class ClassificationTask(L.LightningModule):
    """AdamW, linear warm-up, cosine decay to zero, label smoothing, an averaged copy of the weights.

    Random draws inside the model (dropout, drop path) restart from (seed, epoch) at each epoch, so a run
    resumed at an epoch boundary repeats the uninterrupted one.

    Args:
        model: Images (B, C, H, W) to logits (B, num_classes).
        num_classes: Number of classes.
        seed: Seed of the draws inside the model.
        run_id: Identity of the run's circumstances; a checkpoint of other circumstances is refused.
        lr: Peak learning rate.
        weight_decay: Decoupled decay of weights; not of biases, norms, position embeddings and keys.
        warmup_epochs: Epochs of linear warm-up.
        label_smoothing: Mass moved from the label to all classes.
        ema_decay: Decay of the averaged weights, reached through a warm-up.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        seed: int = 0,
        run_id: str = "",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_epochs: float = 1.0,
        label_smoothing: float = 0.1,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema = ModelEmaV3(model, decay=ema_decay, use_warmup=True)
        self.ema.requires_grad_(False)
        self.seed = seed
        self.run_id = run_id
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.label_smoothing = label_smoothing
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.curve: list[dict[str, float]] = []
        """One row per finished epoch; part of the checkpoint."""
        self._epoch_start = 0.0
        self._seconds = 0.0
        self._images = 0
        self._loss_sum = 0.0

    def on_train_epoch_start(self) -> None:
        """Restart the model's draws and the epoch's counters."""
        torch.manual_seed(mix_seed(self.seed, self.current_epoch, -1))
        self._images, self._loss_sum = 0, 0.0
        self._epoch_start = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch.

        Raises:
            DivergedError: The loss is not finite.
        """
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                f"loss is {value} at epoch {self.current_epoch + 1}, step {batch_idx + 1} "
                f"(seed {self.seed}); use another --out with a lower --lr (now {self.lr:g}) or more --warmup-epochs"
            )
        self._images += len(labels)
        self._loss_sum += value * len(labels)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the average follow; the clock stops with the last batch, before validation."""
        self.ema.update(self.model, step=self.global_step)
        self._seconds = time.perf_counter() - self._epoch_start

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy of the plain weights."""
        images, labels = batch
        self.accuracy.update(self.model(images), labels)

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier epoch or a sanity check counted."""
        self.accuracy.reset()

    def on_train_epoch_end(self) -> None:
        """Add the finished epoch to the curve; runs before the epoch's checkpoint is written.

        Raises:
            DivergedError: A weight is not finite, which the loss of the last step could not show.
        """
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise DivergedError(
                    f"{name} is not finite after epoch {self.current_epoch + 1} (seed {self.seed}); "
                    f"use another --out with a lower --lr (now {self.lr:g})"
                )
        self.curve.append(
            {
                "epoch": self.current_epoch + 1,
                "train_loss": self._loss_sum / max(self._images, 1),
                "holdout_accuracy": 100 * self.accuracy.compute().item(),
                "images_per_second": self._images / max(self._seconds, 1e-9),
                "seconds": self._seconds,
            }
        )

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Predicted and true labels, (3, B): by the last weights, by the averaged ones, the truth."""
        images, labels = batch
        return torch.stack([self.model(images).argmax(1), self.ema.module(images).argmax(1), labels])

    def configure_optimizers(self) -> Any:
        """AdamW and a schedule per step."""
        exempt = getattr(self.model, "no_weight_decay", set)  # timm's models and converted ones name theirs
        groups = param_groups_weight_decay(self.model, self.weight_decay, no_weight_decay_list=tuple(exempt()))
        # Lightning cannot clip gradients for a fused optimizer under mixed precision
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_epochs * total / max(self.trainer.max_epochs or 1, 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the curve with the weights."""
        checkpoint["curve"] = self.curve
        checkpoint["run_id"] = self.run_id

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the curve up again.

        Raises:
            OutputError: The checkpoint is of a run in other circumstances.
        """
        if checkpoint.get("run_id") != self.run_id:
            raise OutputError(
                f"the checkpoint is of another configuration or other data ({checkpoint.get('run_id')}, now "
                f"{self.run_id}); choose another --out, or delete last.ckpt to start this run anew"
            )
        self.curve = list(checkpoint["curve"])
