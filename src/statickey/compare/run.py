"""One run: one mixer, one seed, from fresh weights to predictions on disk."""

import signal
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import safetensors.torch
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from .._files import write_atomic, write_json
from ..data import ImageData, ImageDataModule
from ..errors import StaticKeyError
from ..layers import AttentionMixer
from ..models import build_model, count_macs
from ..tasks import AtomicCheckpointIO, ClassificationTask
from .config import CompareConfig
from .display import RunProgress
from .environment import environment

RESULT_FILE, CHECKPOINT_FILE = "run.json", "last.ckpt"
PREDICTIONS_FILE, WEIGHTS_FILE = "predictions.npz", "model.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Where one run's files lie."""

    root: Path
    mixer: str
    seed: int

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.root / "runs" / f"{self.mixer}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """Written last: where it exists, the run is finished."""
        return self.path / RESULT_FILE

    @property
    def checkpoint(self) -> Path:
        """The state after the last finished epoch of an unfinished run."""
        return self.path / CHECKPOINT_FILE


def new_model(config: CompareConfig, data: ImageData, mixer: str, seed: int) -> torch.nn.Module:
    """The network of one run, with fresh weights."""
    return build_model(
        config.model,
        mixer,
        img_size=data.img_size,
        num_classes=len(data.class_names),
        in_chans=data.in_chans,
        seed=seed,
        model_args=config.model_args,
    )


def data_module(config: CompareConfig, data: ImageData, seed: int) -> ImageDataModule:
    """The batches of one run."""
    return ImageDataModule(
        data,
        batch_size=config.batch_size,
        seed=seed,
        holdout=config.holdout,
        crop_padding=config.crop_padding,
        flip=config.flip,
    )


def new_trainer(config: CompareConfig, callbacks: list[L.Callback]) -> L.Trainer:
    """The trainer of one run.

    Raises:
        StaticKeyError: Lightning refuses the accelerator or the precision on this machine.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return L.Trainer(
                max_epochs=config.epochs,
                accelerator=config.accelerator,
                devices=1,
                precision=config.precision,  # type: ignore[arg-type]
                gradient_clip_val=config.clip_grad if config.clip_grad > 0 else None,
                callbacks=callbacks,
                plugins=[AtomicCheckpointIO()],
                logger=False,
                enable_checkpointing=bool(callbacks),
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = str(error).splitlines()[0]
        raise StaticKeyError(
            f"accelerator={config.accelerator!r} with precision={config.precision!r} is not to be had here: {reason}"
        ) from error


def train_run(
    config: CompareConfig, data: ImageData, folder: RunFolder, config_hash: str, progress: RunProgress
) -> dict[str, Any]:
    """Train, score and save one run, taking up an interrupted one at its last finished epoch.

    Returns:
        What is in the run's JSON.

    Raises:
        DivergedError: The loss is not finite; the last good checkpoint stays.
        OutputError: A file cannot be written, or the checkpoint cannot be read.
        KeyboardInterrupt: Ctrl-C; the run can be taken up again.
    """
    model = new_model(config, data, folder.mixer, folder.seed)
    macs = count_macs(model, (data.in_chans, data.img_size, data.img_size))
    module = data_module(config, data, folder.seed)
    task = ClassificationTask(
        model,
        num_classes=len(data.class_names),
        seed=folder.seed,
        run_id=config_hash,
        lr=config.learning_rate(data.img_size),
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
    )
    keep_last = ModelCheckpoint(
        dirpath=folder.path,
        filename=folder.checkpoint.stem,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    start = time.perf_counter()
    trainer = new_trainer(config, [progress, keep_last])
    resume = folder.checkpoint if folder.checkpoint.is_file() else None
    scored = module.test_dataloader() if config.score_on == "test" else module.val_dataloader()
    with _interruptible():
        trainer.fit(task, module, ckpt_path=resume, weights_only=True)
        predicted: Any = trainer.predict(task, scored)
    last, averaged, truth = torch.cat(predicted, dim=1).cpu().numpy()
    result = {
        "mixer": folder.mixer,
        "seed": folder.seed,
        "accuracy": float(100 * (last == truth).mean()),
        "ema_accuracy": float(100 * (averaged == truth).mean()),
        "scored_on": config.score_on,
        "scored_images": len(truth),
        "params": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "lr": task.lr,
        "images_per_second": statistics.median(row["images_per_second"] for row in task.curve),
        "train_seconds": sum(row["seconds"] for row in task.curve),
        "wall_seconds_this_session": time.perf_counter() - start,
        "backend": sorted({m.backend for m in model.modules() if isinstance(m, AttentionMixer)}),
        "crop_padding": module.crop_padding,
        "flip": module.flip,
        "config_hash": config_hash,
        "config": config.protocol(),
        "environment": environment(trainer.strategy.root_device.type),
        "curve": task.curve,
    }
    predictions = {"last": last, "ema": averaged, "truth": truth}
    write_atomic(folder.path / PREDICTIONS_FILE, lambda f: np.savez_compressed(f, **predictions))
    weights = safetensors.torch.save({k: v.contiguous().cpu() for k, v in model.state_dict().items()})
    write_atomic(folder.path / WEIGHTS_FILE, lambda f: f.write(weights))
    write_json(folder.result, result)
    folder.checkpoint.unlink(missing_ok=True)
    return result


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with an exit and a muted signal; callers expect the interrupt itself."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
