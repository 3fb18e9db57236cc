"""What decides a run: ``Recipe`` is what it learns from and how, ``Machine`` is what it runs on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from timm.optim import list_optimizers

from .._checks import check_mapping, check_name, check_positive, check_rate
from ..data import OnBadImage
from ..errors import StaticKeyError

_NOT_PART_OF_A_RUN = ("data", "data_dir")  # data count by their content


PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Data, network, optimisation and augmentation of a run: all but its mixer and seed.

    Args:
        data: ``digits``, a torchvision name (``cifar10``, ...), ``hf:NAME`` of the Hugging Face hub, or a folder:
            of images (train/CLASS/*.jpg, val/CLASS/*.jpg), of parquet files or of webdataset shards.
        data_dir: Where torchvision keeps its downloads.
        img_size: Bring all images to this many pixels; default as stored.
        limit: Use this many training images, drawn once at random.
        on_bad_image: Refuse data with an unreadable image, or skip such images.
        holdout: Share of the training images held out for the learning curves.
        stream: Decode images in loader workers as they are needed, with timm's transforms, rather than keep all
            in memory.
        model: ``small_vit``, or any name of timm's registry, this package's included.
        model_args: Further constructor arguments of the network, such as depth, drop_path_rate or pretrained.
        weights: Weights to start from (safetensors or a timm checkpoint): all that fits is taken.
        epochs: Passes over the training images, warm-up included, cool-down not.
        batch_size: Images per optimizer step, over all processes.
        grad_accum_steps: Parts a batch is computed in, one after the other.
        opt: Name of a timm optimizer, such as adamw, adam, lamb or sgd.
        lr: Peak learning rate; default 3e-3 for images up to 16 pixels, else 1e-3, each tuned for mhsa with adamw.
        weight_decay: Weight decay; biases, norms, position embeddings and keys have none.
        layer_decay: Factor on the learning rate from each layer to the one below it.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate the warm-up starts from.
        min_lr: Learning rate at the end of the cosine.
        cooldown_epochs: Further epochs at ``min_lr``.
        clip_grad: Largest gradient norm; 0 for no limit.
        ema_decay: Decay of the averaged weights, reached through a warm-up.
        label_smoothing: Mass moved from the label to all classes.
        crop_padding: Padding of the random crop in pixels; default an eighth of the image, none for digits.
        flip: Mirror images at random; default yes, except for digits.
        auto_augment: RandAugment in timm's words, such as rand-m9-n2-mstd0.5, different for every image.
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        mean: Normalisation per channel; default that of the training images, of ImageNet when streaming.
        std: As ``mean``.
        precision: 32-true, bf16-mixed or 16-mixed; auto is bf16-mixed on GPUs that have it, else 32-true.
        fp32_logits: Take attention logits and softmax in float32 whatever the precision (slower).
    """

    data: str = "digits"
    data_dir: str | None = None
    img_size: int | None = None
    limit: int | None = None
    on_bad_image: OnBadImage = "fail"
    holdout: float = 0.1
    stream: bool = False
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
    label_smoothing: float = 0.1
    crop_padding: int | None = None
    flip: bool | None = None
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    precision: str = "auto"
    fp32_logits: bool = False

    def __post_init__(self) -> None:
        check_mapping("model_args", self.model_args)
        check_name("opt", self.opt, list_optimizers())
        check_positive(epochs=self.epochs, batch_size=self.batch_size, grad_accum_steps=self.grad_accum_steps)
        for name in ("img_size", "limit"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if self.precision not in PRECISIONS:
            raise StaticKeyError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.warmup_epochs > self.epochs:
            raise StaticKeyError(f"warmup_epochs={self.warmup_epochs} must not exceed epochs={self.epochs}")
        if self.stream and self.crop_padding is not None:
            raise StaticKeyError(
                f"crop_padding={self.crop_padding} is for images in memory; streamed ones are cropped at random scale"
            )
        if self.lr is not None and not self.lr > 0:
            raise StaticKeyError(f"lr={self.lr} must be positive")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise StaticKeyError(f"layer_decay={self.layer_decay} must be in (0, 1]")
        check_rate(label_smoothing=self.label_smoothing, ema_decay=self.ema_decay)
        if not 0 <= self.random_erasing <= 1:
            raise StaticKeyError(f"random_erasing={self.random_erasing} must be in [0, 1]")
        if not 0 < self.holdout < 1:
            raise StaticKeyError(
                f"holdout={self.holdout} must be in (0, 1): the learning curves need held-out images"
            )
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise StaticKeyError(f"{name}={value} must not be negative")
        if self.batch_size % self.grad_accum_steps:
            raise StaticKeyError(
                f"grad_accum_steps={self.grad_accum_steps} does not divide batch_size={self.batch_size}"
            )
        if self.limit is not None and self.stream:
            raise StaticKeyError(f"limit={self.limit} is for images in memory; leave out --stream or --limit")
        for name in ("mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

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

    def with_lr(self, img_size: int) -> "Recipe":
        """The recipe with its peak learning rate filled in: as given, or what mhsa trains best with."""
        return self if self.lr is not None else replace(self, lr=3e-3 if img_size <= 16 else 1e-3)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, in order."""
        values = asdict(self)
        return values | {name: values[name] and list(values[name]) for name in ("mean", "std")}

    def protocol(self) -> dict[str, Any]:
        """The fields that decide a run's result; data count by their content."""
        return {k: v for k, v in self.to_dict().items() if k not in _NOT_PART_OF_A_RUN}

    def hash(self, data_fingerprint: str, **others: Any) -> str:
        """Identity of a run's circumstances: the protocol, the data it saw and anything else that counts."""
        text = json.dumps([self.protocol() | others, data_fingerprint], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_NOT_NEGATIVE = (
    *("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "clip_grad"),
    *("crop_padding", "mixup", "cutmix"),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run uses of the machine; its result does not depend on it, but for rounding.

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
        check_positive(devices=self.devices, num_nodes=self.num_nodes)
        if self.strategy not in ("auto", "ddp", "fsdp"):
            raise StaticKeyError(f"strategy={self.strategy!r} must be 'auto', 'ddp' or 'fsdp'")
        if self.strategy == "fsdp" and self.channels_last:
            raise StaticKeyError("strategy='fsdp' keeps weights contiguous; leave out channels_last")
        if self.num_workers < 0:
            raise StaticKeyError(f"num_workers={self.num_workers} must not be negative")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings differ, in one line."""
    names = [*before, *(name for name in now if name not in before)]
    changed = [n for n in names if before.get(n, "absent") != now.get(n, "absent")]
    return "; ".join(f"{n}: {before.get(n, 'absent')} there, {now.get(n, 'absent')} here" for n in changed)
