"""The one training engine: from a run to a trained, scored and saved network."""

import logging
import signal
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn

from .._environment import environment
from .._files import write_atomic, write_json
from ..data import PlannedDataModule
from ..errors import StaticKeyError
from ..layers import AttentionMixer
from ..models import count_macs
from .checkpoint import SUFFIX, AtomicCheckpointIO, newest_whole
from .diverged import DivergedFolder
from .recipe import Machine, Recipe
from .run import PREDICTIONS_FILE, Run, mixer_source
from .scoring import explained_peers, explained_workers, score
from .training import TrainingModule
from .weights import ModelCard, write_model


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
        options = {"devices": machine.devices, "strategy": machine.strategy, "precision": recipe.precision}
        chosen = [f"{name}={value!r}" for name, value in options.items() if value not in (1, "auto", "32-true")]
        wanted = " with ".join([f"accelerator={machine.accelerator!r}", *([", ".join(chosen)] if chosen else [])])
        raise StaticKeyError(f"{wanted} is not available here: {reason}") from error


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
        DivergedError: The loss is not finite; the last good checkpoint stays, and ``replay`` takes the step again.
        OutputError: A file cannot be written, or no checkpoint can be read.
        DataError: An image cannot be read, or a loader worker died.
        StaticKeyError: Another process of the run ended.
        KeyboardInterrupt: Ctrl-C; the run can be taken up again.
    """
    start = time.perf_counter()
    model, module = run.new_model(), run.data_module()
    recipe = run.task.settled(run.recipe, run.data)
    if recipe.lr is None:
        raise StaticKeyError(f"task {run.task.name!r} knows no default for lr; give one")
    diverged = DivergedFolder(run.path / "diverged", _card(run, module))
    training = TrainingModule(model, run.task, recipe, run.data, seed=run.seed, run_ids=run.ids, diverged=diverged)
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
    with _interruptible(), explained_workers(), explained_peers():
        trainer.fit(training, module, ckpt_path=resume, weights_only=True)
        return _finish(run, trainer, training, module, start)


def _finish(
    run: Run, trainer: L.Trainer, training: TrainingModule, module: PlannedDataModule, start: float
) -> dict[str, Any] | None:
    """Score the last and the averaged weights on all processes; the first writes the run's files, the result last."""
    task, metric, first = run.task, run.task.metric, trainer.is_global_zero
    state: dict[str, Any] = trainer.strategy.lightning_module_state_dict()
    if run.machine.strategy == "fsdp":  # whole tensors are on the first process alone
        state = trainer.strategy.broadcast(state if first else {})
    model = task.build(run.recipe, run.data, run.mixer, run.seed)
    macs = count_macs(model, task.input_size(run.recipe, run.data))
    loader = module.scoring_dataloader(run.score_on)
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    scores: dict[str, float] = {}
    arrays: dict[str, Any] = {}
    for which, prefix in (("last", "model."), ("ema", "ema.module.")):
        model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        evidence = score(task, model.to(device), module, loader, precision)
        mark = "" if which == "last" else f"{which}_"
        scores[f"{mark}{metric.name}"] = evidence.value()
        arrays |= {f"{mark}{name}": array for name, array in evidence.arrays().items()}
        if first:
            write_model(run.path, which, model, _card(run, module))
    if not first:
        return None
    curve, given = training.curve, run.recipe.to_dict()
    result = {
        "task": task.name,
        "mixer": run.mixer,
        "mixer_source": mixer_source(run.mixer),
        "seed": run.seed,
        **scores,
        "scored_on": run.score_on,
        "scored_images": evidence.num_images,
        "params": sum(p.numel() for p in model.parameters()),
        "macs": macs,
        "lr": training.recipe.lr,
        **{k: v for k, v in training.recipe.to_dict().items() if v != given[k]},
        "images_per_second": statistics.median(row["images_per_second"] for row in curve),
        "loader_images_per_second": statistics.median(row["loader_images_per_second"] for row in curve),
        "train_seconds": sum(row["seconds"] for row in curve),
        "wall_seconds_this_session": time.perf_counter() - start,
        "backend": sorted({m.backend for m in model.modules() if isinstance(m, AttentionMixer)}),
        "config_hash": run.ids[0],
        "data_fingerprint": run.data.fingerprint(),
        "data": run.recipe.data,
        "data_dir": run.recipe.data_dir,
        "config": run.recipe.protocol(),
        "environment": environment(device.type)
        | {"precision": precision, "processes": trainer.world_size, "compiled": run.machine.compile},
        "curve": curve,
    }
    write_atomic(run.path / PREDICTIONS_FILE, lambda f: np.savez_compressed(f, **arrays))
    write_json(run.result, result)
    for checkpoint in run.path.glob(f"*{SUFFIX}"):
        checkpoint.unlink()
    return result


def _card(run: Run, module: PlannedDataModule) -> ModelCard:
    return replace(run.task.card(run.recipe, run.data, module, run.mixer), task=run.task.name)


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
