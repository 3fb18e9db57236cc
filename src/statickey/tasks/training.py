"""Training the network of any task under Lightning."""

import math
import time
from typing import Any

import lightning as L
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..data import mix_seed
from ..errors import DivergedError, OutputError, StaticKeyError
from .diverged import DivergedFolder, Step
from .recipe import Recipe
from .task import Task

_FUSED = ("adam", "adamw", "sgd")
_CHECK_EVERY = 50
"""Steps between looks at the loss on an accelerator, which waits for every look."""


class TrainingModule(L.LightningModule):
    """A timm optimizer, linear warm-up, cosine decay, cool-down, and an averaged copy of the weights.

    Random draws inside the model (dropout, drop path) restart from (seed, epoch) at each epoch, so a run
    resumed at an epoch boundary repeats the uninterrupted one.

    Args:
        model: The network.
        task: What it learns.
        recipe: How to train it, its learning rate filled in.
        data: What the validation metric must know of the data.
        seed: Seed of the draws inside the model.
        run_ids: Identities of the run's circumstances, today's first; a checkpoint of others is refused.
        diverged: Keeps the step at which the loss is not finite; None keeps nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        data: Any,
        *,
        seed: int = 0,
        run_ids: tuple[str, ...] = ("",),
        diverged: DivergedFolder | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.recipe = recipe
        self.ema = ModelEmaV3(model, decay=self.recipe.ema_decay, use_warmup=True)
        self.ema.requires_grad_(False)
        self.seed = seed
        self.run_ids = run_ids
        self.diverged = diverged
        self._step: Step | None = None
        self.metric = task.validation_metric(data)
        self.curve: list[dict[str, float]] = []
        """One row per finished epoch; part of the checkpoint."""
        self._epoch_start = self._seconds = self._waited = self._idle_since = 0.0
        self._loss_sums: dict[str, Tensor] = {}
        self._images = 0
        self._averaged_steps = 0

    def configure_model(self) -> None:
        """Under a sharded strategy, share out the network and its average, block by block."""
        if self.device_mesh is not None:
            for model in (self.model, self.ema.module):
                _shard(model, self.device_mesh["data_parallel"])

    def on_train_epoch_start(self) -> None:
        """Restart the model's draws and the epoch's counters."""
        torch.manual_seed(mix_seed(self.seed, self.current_epoch, -1 - self.global_rank))
        self._loss_sums, self._images = {}, 0
        self._waited = 0.0
        self._epoch_start = self._idle_since = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count how long the loader was waited for."""
        self._waited += time.perf_counter() - self._idle_since

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the task's losses on one batch.

        Raises:
            DivergedError: It is not finite, on this process or another.
        """
        rng_state = torch.get_rng_state()
        losses = self.task.losses(self.model, batch, self.recipe)
        seen = {name: value.detach() for name, value in losses.items()}
        self._step = Step(self.current_epoch + 1, batch_idx + 1, batch, rng_state, seen)
        first, *others = losses.values()
        loss = sum(others, start=first)
        size = len(batch[0])
        for name, value in losses.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0) + value.detach().float() * size
        self._images += size
        if self.device.type == "cpu" or batch_idx % _CHECK_EVERY == 0:
            where = f"at epoch {self.current_epoch + 1}, step {batch_idx + 1}"
            self._stop_all_unless(loss.detach().isfinite(), f"loss is {loss.item()} {where}")
        return loss

    def _stop_all_unless(self, finite: Tensor, problem: str) -> None:
        """Raise on every process if one met a number that is not finite: alone, it would leave the others waiting.

        Raises:
            DivergedError: This process or another did.
        """
        if self.trainer.strategy.reduce((~finite).float(), reduce_op="sum"):
            seen = f"{problem} on another process" if finite else problem
            kept = self._keep_step(bool(finite))
            raise DivergedError(
                f"{seen} (seed {self.seed}); use another --out with a lower --lr (now {self.recipe.lr:g}) "
                f"or more --warmup-epochs{kept}"
            )

    def _keep_step(self, finite: bool) -> str:
        """Write the last step for replay; where it is, as the end of a message."""
        state = self.trainer.strategy.lightning_module_state_dict()  # shards are gathered, by all processes together
        if self.diverged is None or self._step is None:
            return ""
        said = self.diverged.keep(
            self._step,
            finite,
            model=self.model,
            weights={k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")},
            recipe=self.recipe,
            seed=self.seed,
            precision=str(self.trainer.precision),
            rank=self.global_rank,
        )
        return f"; {said}"

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the average follow each optimizer step; the clock stops with the last batch, before validation."""
        if self.global_step != self._averaged_steps:
            self.ema.update(self.model, step=self.global_step)
            self._averaged_steps = self.global_step
        if self.trainer.is_last_batch:
            next(iter(self._loss_sums.values())).item()  # waits for an accelerator
        self._idle_since = time.perf_counter()
        self._seconds = self._idle_since - self._epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The metric of the plain weights."""
        self.metric.update(*self.task.outputs(self.model, batch))

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier epoch or a sanity check counted."""
        self.metric.reset()

    def on_train_epoch_end(self) -> None:
        """Add the finished epoch to the curve; runs before the epoch's checkpoint is written.

        Raises:
            DivergedError: A weight is not finite, which the loss of the last step could not show.
        """
        broken = next((name for name, p in self.model.named_parameters() if not p.isfinite().all()), None)
        finite = torch.tensor(broken is None, device=self.device)
        self._stop_all_unless(finite, f"{broken or 'a weight'} is not finite after epoch {self.current_epoch + 1}")
        counted = torch.tensor(float(self._images), device=self.device)
        sums = self.trainer.strategy.reduce(torch.stack([*self._loss_sums.values(), counted]), reduce_op="sum")
        *totals, images = sums.tolist()
        parts = dict(zip(self._loss_sums, (total / max(images, 1) for total in totals), strict=True))
        metric = self.task.metric
        row = {
            "epoch": self.current_epoch + 1,
            "train_loss": sum(parts.values()),
            **({f"train_{name}": value for name, value in parts.items()} if len(parts) > 1 else {}),
            f"holdout_{metric.name}": (100 if metric.unit == "%" else 1) * self.metric.compute().item(),
            "lr": self.trainer.optimizers[0].param_groups[-1]["lr"],
            "images_per_second": images / max(self._seconds, 1e-9),
            "loader_images_per_second": images / max(self._waited, 1e-9),
            "seconds": self._seconds,
        }
        self.curve.append(row)
        for logger in self.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "epoch"}, step=self.current_epoch + 1)

    def configure_optimizers(self) -> Any:
        """A timm optimizer and a schedule per step.

        Raises:
            StaticKeyError: The optimizer refuses its arguments.
        """
        recipe = self.recipe
        # Lightning cannot clip gradients for a fused optimizer under mixed precision
        fused = recipe.opt in _FUSED and "mixed" not in str(self.trainer.precision)
        try:
            optimizer = create_optimizer_v2(
                self.model,
                opt=recipe.opt,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                layer_decay=recipe.layer_decay,
                **({"fused": True} if fused else {}),
            )
        except (ValueError, AssertionError, TypeError) as error:
            raise StaticKeyError(f"opt={recipe.opt!r} is not available: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        recipe, peak = self.recipe, self.recipe.lr
        assert peak is not None
        per_epoch = int(self.trainer.estimated_stepping_batches) / recipe.total_epochs
        warmup = recipe.warmup_epochs * per_epoch
        if step < warmup:
            low = recipe.warmup_lr / peak
            return low + (1 - low) * (step + 1) / (warmup + 1)
        low = recipe.min_lr / peak
        progress = min((step - warmup) / max(recipe.epochs * per_epoch - warmup, 1), 1.0)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the curve with the weights."""
        checkpoint["curve"] = self.curve
        checkpoint["run_id"] = self.run_ids[0]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the curve up again.

        Raises:
            OutputError: The checkpoint is of a run in other circumstances.
        """
        if checkpoint.get("run_id") not in self.run_ids:
            raise OutputError(
                f"the checkpoint is of another configuration or other data ({checkpoint.get('run_id')}, now "
                f"{self.run_ids[0]}); choose another --out, or delete its *.ckpt to start this run anew"
            )
        self.curve = list(checkpoint["curve"])
        self._averaged_steps = int(checkpoint["global_step"])


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share a network's tensors out: each of timm's ``blocks`` is gathered when its turn comes, the rest once."""
    for module in list(model.modules()):
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
