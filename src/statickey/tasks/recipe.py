"""What decides a run: a ``Recipe`` is what it learns from and how, a ``Machine`` is what it runs on."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from timm.optim import list_optimizers

from .._checks import check_mapping, check_name, check_positive, check_rate, check_types
from .._files import regular
from ..errors import OutputError, StaticKeyError
from ..models import WEIGHTS_FILE
from .start import start_files

_PLACES = ("data", "data_dir")
"""Where the data lie; in the identity of a run they count by their content."""
_MOST_PROCESSES = 1024
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task's recipe has: data, network, optimisation and precision.

    Args:
        data: What to learn from; the task's own recipe says in which forms.
        data_dir: Where torchvision and Hugging Face keep their downloads.
        limit: Use this many training images, drawn once at random.
        holdout: Share of the training images held out for the learning curves.
        model: Any name of timm's registry, this package's included.
        model_args: Further constructor arguments of the network, such as depth, drop_path_rate or pretrained.
        weights: Weights to start from: a file (safetensors or a timm checkpoint), the folder of a finished run, or
            that of a comparison, from which each mixer takes its own. All that fits is taken.
        epochs: Passes over the training images, warm-up included, cool-down not.
        batch_size: Images per optimizer step, over all processes.
        grad_accum_steps: Parts a batch is computed in, one after the other.
        opt: Name of a timm optimizer, such as adamw, adam, lamb or sgd.
        lr: Peak learning rate; default the task's own.
        weight_decay: Weight decay; biases, norms, position embeddings and keys have none.
        layer_decay: Factor on the learning rate from each layer to the one below it.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate the warm-up starts from.
        min_lr: Learning rate at the end of the cosine.
        cooldown_epochs: Further epochs at ``min_lr``.
        clip_grad: Largest gradient norm; 0 for no limit.
        ema_decay: Decay of the averaged weights, reached through a warm-up.
        precision: 32-true, bf16-mixed or 16-mixed; auto is bf16-mixed on GPUs that have it, else 32-true.
        fp32_logits: Take attention logits and softmax in float32 whatever the precision (slower).
    """

    data: str = "digits"
    data_dir: str | None = None
    limit: int | None = None
    holdout: float = 0.1
    model: str = "small_vit"
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    epochs: int = 14
    batch_size: int = 64
    grad_accum_steps: int = 1
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    warmup_epochs: float = 1.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown_epochs: int = 0
    clip_grad: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"
    fp32_logits: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        hints = get_type_hints(type(self))
        for option in fields(self):  # 1 and 1.0 are one number, and one identity
            value = getattr(self, option.name)
            if isinstance(value, int) and not isinstance(value, bool) and hints[option.name] in (float, float | None):
                object.__setattr__(self, option.name, float(value))
        check_mapping("model_args", self.model_args)
        check_name("opt", self.opt, list_optimizers())
        check_positive(epochs=self.epochs, batch_size=self.batch_size, grad_accum_steps=self.grad_accum_steps)
        if self.limit is not None:
            check_positive(limit=self.limit)
        if self.precision not in PRECISIONS:
            raise StaticKeyError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.warmup_epochs > self.epochs:
            raise StaticKeyError(f"warmup_epochs={self.warmup_epochs} must not exceed epochs={self.epochs}")
        if self.lr is not None and not self.lr > 0:
            raise StaticKeyError(f"lr={self.lr} must be positive")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise StaticKeyError(f"layer_decay={self.layer_decay} must be in (0, 1]")
        check_rate(ema_decay=self.ema_decay)
        if not 0 < self.holdout < 1:
            raise StaticKeyError(
                f"holdout={self.holdout} must be in (0, 1): the learning curves need held-out images"
            )
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "clip_grad"):
            if getattr(self, name) < 0:
                raise StaticKeyError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch_size % self.grad_accum_steps:
            raise StaticKeyError(
                f"grad_accum_steps={self.grad_accum_steps} does not divide batch_size={self.batch_size}"
            )
        for name in ("warmup_lr", "min_lr"):
            if self.lr is not None and getattr(self, name) > self.lr:
                raise StaticKeyError(f"{name}={getattr(self, name)} must not exceed the peak, lr={self.lr}")

    @property
    def total_epochs(self) -> int:
        """Epochs with the cool-down."""
        return self.epochs + self.cooldown_epochs

    def on(self, machine: "Machine") -> "Recipe":
        """The recipe with its precision settled for a machine."""
        if self.precision != "auto":
            return self
        on_gpu = machine.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return replace(self, precision="bf16-mixed" if has_bf16 else "32-true")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What every field stands at where nothing is said."""
        return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}

    def protocol(self) -> dict[str, Any]:
        """The fields that decide a run's result; data count by their content."""
        return {k: v for k, v in self.to_dict().items() if k not in _PLACES}


_OPTIONS_OF_0_1 = (
    *("data", "data_dir", "img_size", "limit", "on_bad_image", "holdout", "stream", "model", "model_args", "weights"),
    *("epochs", "batch_size", "grad_accum_steps", "opt", "lr", "weight_decay", "layer_decay", "warmup_epochs"),
    *("warmup_lr", "min_lr", "cooldown_epochs", "clip_grad", "ema_decay", "label_smoothing", "crop_padding", "flip"),
    *("auto_augment", "random_erasing", "mixup", "cutmix", "mean", "std", "precision", "fp32_logits"),
)


def identities(
    recipe: Recipe,
    task: str,
    data_fingerprint: str,
    others: Mapping[str, Any],
    fingerprint_of_0_1: str | None = None,
) -> tuple[str, ...]:
    """What tells a run's circumstances from others: its recipe, the content of its data, and what else counts.

    Only what differs from the defaults enters, so that a new option leaves older runs their identity.

    Args:
        recipe: Its recipe; weights to start from count by their content.
        task: Name of what it learns.
        data_fingerprint: Of the data it sees.
        others: What else decides its result; values of None do not count.
        fingerprint_of_0_1: The data's fingerprint as version 0.1 made it, where that was another.

    Returns:
        Its identity, and the one that version 0.1 gave it by all options it had, where it could make such a run.
    """
    values, defaults = recipe.protocol(), recipe.defaults()
    changed = {k: v for k, v in values.items() if v != defaults[k]}
    if recipe.weights is not None:
        contents = [_content(path) for path in start_files(recipe.weights).values()]
        changed["weights"] = contents[0] if len(contents) == 1 else contents
    loaded = [recipe.model_args.get("checkpoint_path")]
    if recipe.model.startswith("local-dir:") and recipe.model_args.get("pretrained"):
        loaded.append(Path(recipe.model.removeprefix("local-dir:")) / WEIGHTS_FILE)
    read = [_content(Path(place)) for place in loaded if place is not None and Path(place).is_file()]
    if read:
        changed["loaded"] = read
    now = _digest([changed | {k: v for k, v in others.items() if v is not None}, task, data_fingerprint])
    if task != "classify" or not changed.keys() <= {*_OPTIONS_OF_0_1, "loaded"}:
        return (now,)
    known = {k: v for k, v in values.items() if k in _OPTIONS_OF_0_1}
    return now, _digest([known | dict(others), fingerprint_of_0_1 or data_fingerprint])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _content(path: Path) -> str:
    try:
        with regular(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OutputError(
            f"no weights file {str(path)!r} ({error.strerror}); give a .safetensors file or a timm checkpoint"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run uses of the machine; its result does not depend on it, but for rounding.

    Dropout and drop path are drawn by each process for its own part of a batch: with them, the number of devices
    and of accumulation steps changes what is drawn, not how it is distributed.

    Args:
        accelerator: Lightning's accelerator: auto, cpu, gpu, mps, ...
        devices: Devices per machine.
        num_nodes: Machines; under torchrun or Slurm they find each other.
        strategy: ``ddp``, which ``auto`` is on several devices, or ``fsdp``, which shares weights, gradients,
            averages and optimizer state out among them (torch's ``fully_shard``).
        num_workers: Loader processes per device; images in memory need none.
        compile: Compile the network with torch.compile.
        channels_last: Keep the weights of convolutions channels-last, which their results follow.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    num_workers: int = 0
    compile: bool = False
    channels_last: bool = False

    @property
    def processes(self) -> int:
        """How many take part."""
        return self.devices * self.num_nodes

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(devices=self.devices, num_nodes=self.num_nodes)
        if self.strategy not in ("auto", "ddp", "fsdp"):
            raise StaticKeyError(f"strategy={self.strategy!r} must be 'auto', 'ddp' or 'fsdp'")
        if self.strategy == "fsdp" and self.channels_last:
            raise StaticKeyError("strategy='fsdp' keeps weights contiguous; leave out channels_last")
        if self.num_workers < 0:
            raise StaticKeyError(f"num_workers={self.num_workers} must not be negative")
        for name in ("devices", "num_workers"):
            if getattr(self, name) > _MOST_PROCESSES:
                raise StaticKeyError(
                    f"{name}={getattr(self, name)} would start so many processes; at most {_MOST_PROCESSES:,}"
                )


def difference(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], besides: Collection[str] = ()
) -> str:
    """Which settings differ, in one line; empty where none does.

    Args:
        before: A stored configuration.
        now: Today's.
        defaults: What an option stands at that is missing in one of them, being newer or older than it.
        besides: Options that may differ.
    """
    changed = []
    for name in dict.fromkeys([*before, *now]):
        there, here = (values.get(name, defaults.get(name, "absent")) for values in (before, now))
        if there != here and name not in besides:
            changed.append(f"{name}: {there} there, {here} here")
    return "; ".join(changed)
