"""The one training engine: from a recipe, a mixer and a seed to a trained, scored and saved network."""

import json
import logging
import signal
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from .._environment import environment
from .._files import write_atomic, write_json
from ..data import Augmentation, ImageData, ImageDataModule, StreamedImages, load_images, open_stream
from ..errors import DataError, OutputError, StaticKeyError
from ..layers import AttentionMixer
from ..models import build_model, count_macs, start_from
from .checkpoint import SUFFIX, AtomicCheckpointIO, newest_whole
from .classification import ClassificationTask
from .recipe import Machine, Recipe
from .weights import ModelCard, write_model

RESULT_FILE, PREDICTIONS_FILE = "run.json", "predictions.npz"
Data = ImageData | StreamedImages


@dataclass(frozen=True)
class Run:
    """One run: a recipe on a data set, with one mixer and seed, in a folder."""

    recipe: Recipe
    machine: Machine
    data: Data
    mixer: str | None
    seed: int
    path: Path
    run_id: str
    score_on: Literal["test", "holdout"] = "test"

    @property
    def result(self) -> Path:
        """Written last: where it exists, the run is finished."""
        return self.path / RESULT_FILE

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.is_file()

    def read_result(self) -> dict[str, Any]:
        """What a finished run wrote.

        Raises:
            OutputError: It cannot be read.
        """
        try:
            return dict(json.loads(self.result.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.result} is broken ({error}); delete {self.path} to repeat the run") from error

    def new_model(self) -> nn.Module:
        """The network with fresh weights, or those the recipe starts from."""
        model = new_model(self.recipe, self.data, self.mixer, self.seed)
        if self.recipe.weights is not None:
            start_from(model, self.recipe.weights)
        return model

    def card(self, module: ImageDataModule) -> ModelCard:
        """What goes beside the weights."""
        return ModelCard(
            architecture=self.recipe.model,
            mixer=self.mixer,
            model_args=self.recipe.model_args,
            img_size=self.data.img_size,
            in_chans=self.data.in_chans,
            class_names=self.data.class_names,
            mean=tuple(module.mean.flatten().tolist()),
            std=tuple(module.std.flatten().tolist()),
            streamed=self.recipe.stream,
        )

    def data_module(self) -> ImageDataModule:
        """The run's batches."""
        return data_module(self.recipe, self.data, self.seed, self.machine.num_workers)


def read_data(recipe: Recipe) -> Data:
    """The images of a recipe, in memory or ready to stream.

    Raises:
        DataError: They are missing, inconsistent or unreadable.
    """
    data_dir = None if recipe.data_dir is None else Path(recipe.data_dir)
    if recipe.stream:
        data: Data = open_stream(
            recipe.data, data_dir=data_dir, img_size=recipe.img_size, on_bad_image=recipe.on_bad_image
        )
    else:
        data = load_images(
            recipe.data,
            data_dir=data_dir,
            img_size=recipe.img_size,
            limit=recipe.limit,
            on_bad_image=recipe.on_bad_image,
        )
    if len(data.class_names) < 2:
        raise DataError(f"{recipe.data} has the one class {data.class_names}; a classifier needs two")
    return data


def new_model(recipe: Recipe, data: Data, mixer: str | None, seed: int) -> nn.Module:
    """The network of a recipe for some data, with fresh weights."""
    model = build_model(
        recipe.model,
        mixer,
        img_size=data.img_size,
        num_classes=len(data.class_names),
        in_chans=data.in_chans,
        seed=seed,
        model_args=recipe.model_args,
    )
    if recipe.fp32_logits:
        for module in model.modules():
            if isinstance(module, AttentionMixer):
                module.backend = "math"
    return model


def data_module(recipe: Recipe, data: Data, seed: int, num_workers: int = 0) -> ImageDataModule:
    """The batches of a recipe."""
    return ImageDataModule(
        data,
        Augmentation(**{field.name: getattr(recipe, field.name) for field in fields(Augmentation)}),
        batch_size=recipe.batch_size,
        seed=seed,
        holdout=recipe.holdout,
        grad_accum_steps=recipe.grad_accum_steps,
        mean=recipe.mean,
        std=recipe.std,
        num_workers=num_workers,
    )


def new_trainer(
    recipe: Recipe, machine: Machine, callbacks: Sequence[L.Callback] = (), loggers: Sequence[Any] = ()
) -> L.Trainer:
    """The trainer of one run.

    Raises:
        StaticKeyError: Lightning refuses the accelerator, the strategy or the precision on this machine.
    """
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.ERROR)  # its notes on devices and offers
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            return L.Trainer(
                max_epochs=recipe.total_epochs,
                accelerator=machine.accelerator,
                devices=machine.devices,
                num_nodes=machine.num_nodes,
                strategy=_strategy(machine),
                precision=recipe.on(machine).precision,  # type: ignore[arg-type]
                accumulate_grad_batches=recipe.grad_accum_steps,
                gradient_clip_val=recipe.clip_grad if recipe.clip_grad > 0 else None,
                callbacks=list(callbacks),
                plugins=[AtomicCheckpointIO()],
                logger=list(loggers),
                log_every_n_steps=1,
                enable_checkpointing=bool(callbacks),
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,  # the data module's samplers know their rank
            )
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        reason = str(error).splitlines()[0]
        raise StaticKeyError(
            f"accelerator={machine.accelerator!r} with devices={machine.devices}, strategy={machine.strategy!r} "
            f"and precision={recipe.precision!r} is not to be had here: {reason}"
        ) from error


def _strategy(machine: Machine) -> str | Strategy:
    """Lightning's strategy: by name, or the sharded one with all processes in one group."""
    if machine.strategy == "fsdp":
        # whole tensors in the checkpoint: it resumes on any number of processes
        return ModelParallelStrategy(machine.processes, 1, save_distributed_checkpoint=False)
    # by name, for in a notebook Lightning would fork, and the results would stay in the child
    return "ddp" if machine.processes > 1 else machine.strategy


def train_run(run: Run, callbacks: Sequence[L.Callback] = (), loggers: Sequence[Any] = ()) -> dict[str, Any] | None:
    """Train, score and save one run, taking up an interrupted one at its last finished epoch.

    Args:
        run: The run; its folder is this process's to write.
        callbacks: Further callbacks, such as a progress bar.
        loggers: Lightning's loggers.

    Returns:
        What is in the run's ``run.json``; None on all processes but the first.

    Raises:
        DivergedError: The loss is not finite; the last good checkpoint stays.
        OutputError: A file cannot be written, or no checkpoint can be read.
        DataError: An image cannot be read, or a loader worker died.
        KeyboardInterrupt: Ctrl-C; the run can be taken up again.
    """
    start = time.perf_counter()
    model, module = run.new_model(), run.data_module()
    recipe = run.recipe.with_lr(run.data.img_size)
    task = ClassificationTask(model, recipe, num_classes=len(run.data.class_names), seed=run.seed, run_id=run.run_id)
    if run.machine.channels_last:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
    if run.machine.compile:
        model.compile()
    keep_two = ModelCheckpoint(
        dirpath=run.path,
        filename="epoch{epoch:05d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=2,
        enable_version_counter=False,  # a broken file of an epoch is written anew
        save_on_train_epoch_end=True,
    )
    trainer = new_trainer(recipe, run.machine, [*callbacks, keep_two], loggers)
    if trainer.is_global_zero and run.path.is_dir():
        for leftover in run.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
    resume, broken = newest_whole(run.path)
    for reason in broken:
        warnings.warn(f"{reason}; going on from {resume}", stacklevel=2)
    with _interruptible(), explained_workers():
        trainer.fit(task, module, ckpt_path=resume, weights_only=True)
        state = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return None
        return _finish(run, trainer, task, module, state, start)


def _finish(
    run: Run,
    trainer: L.Trainer,
    task: ClassificationTask,
    module: ImageDataModule,
    state: dict[str, Any],
    start: float,
) -> dict[str, Any]:
    """Score the last and the averaged weights, and write the run's files; the result last."""
    model = new_model(run.recipe, run.data, run.mixer, run.seed)
    macs = count_macs(model, (run.data.in_chans, run.data.img_size, run.data.img_size))
    loader = module.test_dataloader() if run.score_on == "test" else module.holdout_dataloader()
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    predicted: dict[str, Any] = {}
    for name, prefix in (("last", "model."), ("ema", "ema.module.")):
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        model.load_state_dict(weights)
        logits, truth = score(model.to(device), module, loader, precision)
        predicted[name] = logits.argmax(1).numpy()
        write_model(run.path, name, model, run.card(module))
    labels = predicted["truth"] = truth.numpy()
    result = {
        "mixer": run.mixer,
        "seed": run.seed,
        "accuracy": float(100 * (predicted["last"] == labels).mean()),
        "ema_accuracy": float(100 * (predicted["ema"] == labels).mean()),
        "scored_on": run.score_on,
        "scored_images": len(labels),
        "params": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "lr": task.recipe.lr,
        "images_per_second": statistics.median(row["images_per_second"] for row in task.curve),
        "loader_images_per_second": statistics.median(row["loader_images_per_second"] for row in task.curve),
        "train_seconds": sum(row["seconds"] for row in task.curve),
        "wall_seconds_this_session": time.perf_counter() - start,
        "backend": sorted({m.backend for m in model.modules() if isinstance(m, AttentionMixer)}),
        "crop_padding": module.crop_padding,
        "flip": module.flip,
        "config_hash": run.run_id,
        "data": run.recipe.data,
        "data_dir": run.recipe.data_dir,
        "config": run.recipe.protocol(),
        "environment": environment(device.type)
        | {"precision": precision, "processes": trainer.world_size, "compiled": run.machine.compile},
        "curve": task.curve,
    }
    write_atomic(run.path / PREDICTIONS_FILE, lambda f: np.savez_compressed(f, **predicted))
    write_json(run.result, result)
    for checkpoint in run.path.glob(f"*{SUFFIX}"):
        checkpoint.unlink()
    return result


@torch.inference_mode()
def score(
    model: nn.Module, module: ImageDataModule, loader: Any, precision: str = "32-true"
) -> tuple[Tensor, Tensor]:
    """Logits of a network for all images of a loader.

    Args:
        model: Images to logits; it is left in evaluation mode.
        module: Normalises the images.
        loader: Yields uint8 images and labels.
        precision: Lightning's precision; mixed ones score under autocast.

    Returns:
        Logits (N, num_classes) in float32 and labels (N,), both on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    logits, labels = [], []
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for images, truth in loader:
            out = model(module.normalize(images.to(device, non_blocking=True)))
            logits.append(out.float().cpu())
            labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


@contextmanager
def explained_workers() -> Iterator[None]:
    """Say in one line what befell a loader worker.

    Raises:
        DataError: A worker met a bad image, or died.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught"):  # as torch passes on what a worker raised
            raise
        raise DataError(" ".join(str(error).rpartition("DataError: ")[2].split())) from error
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        if "DataLoader worker" not in reason:
            raise
        raise DataError(
            f"{reason}; out of memory? use fewer --num-workers, the same command goes on where it stopped"
        ) from error


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
