"""Trained networks on disk: safetensors with a JSON beside them, as timm and the Hugging Face hub keep them."""

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from .._files import regular, write_atomic, write_json
from ..errors import OutputError
from ..models import CONFIG_FILE, PRETRAINED_ARGS, WEIGHTS_FILE, build_model, timm_args

WEIGHTS_FILES = {"last": WEIGHTS_FILE, "ema": "model_ema.safetensors"}
_SIZES = ("patch_size", "embed_dim")
"""Arguments that may follow the image size where they are not given; a trained network keeps its own."""


@dataclass(frozen=True)
class ModelCard:
    """How to build a trained network again, and what its numbers mean."""

    architecture: str
    mixer: str | None
    model_args: dict[str, Any]
    img_size: int
    in_chans: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    streamed: bool = False
    fp32_logits: bool = False
    task: str = "classify"
    task_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the task must know besides, to build the network."""

    def build(self, img_size: int | None = None) -> nn.Module:
        """The network with fresh weights, for its own or another image size."""
        return build_model(
            self.architecture,
            self.mixer,
            img_size=self.img_size if img_size is None else img_size,
            num_classes=len(self.class_names),
            in_chans=self.in_chans,
            model_args=without_weights(self.model_args),
            fp32_logits=self.fp32_logits,
        )

    def completed(self, model: nn.Module) -> "ModelCard":
        """This card for a model as it was built, wherever its name found it.

        A tag, the hub or a folder need not be there when the network is built again: the card has the architecture
        behind the name, the arguments and mixer saved there, and the sizes that followed the image size.
        """
        built: Any = getattr(getattr(model, "pyramid", None), "body", model)  # what a detector or segmenter stands on
        if not hasattr(built, "mixer_text"):  # not of build_model
            return self
        given = without_weights(self.model_args)
        architecture, mixer = built.pretrained_cfg["architecture"], built.mixer_text
        args = {k: v for k, v in built._model_args.items() if k not in ("num_classes", "in_chans", "img_size")}
        if mixer is not None:
            args = {k: v for k, v in args.items() if k not in ("mixer", "mixers", "mixer_args")}
        return replace(self, architecture=architecture, mixer=mixer, model_args=args | given)

    def to_json(self) -> dict[str, Any]:
        """In timm's layout, with what timm does not know under ``statickey``."""
        size = (self.in_chans, self.img_size, self.img_size)
        args = without_weights(self.model_args)
        return {
            "architecture": self.architecture,
            "num_classes": len(self.class_names),
            "model_args": timm_args(self.architecture, self.mixer, self.img_size, args),
            "label_names": list(self.class_names),
            "pretrained_cfg": {
                "input_size": list(size),
                "num_classes": len(self.class_names),
                "mean": list(self.mean),
                "std": list(self.std),
            },
            "statickey": {
                "mixer": self.mixer,
                "model_args": self.model_args,
                "streamed": self.streamed,
                "fp32_logits": self.fp32_logits,
                "task": self.task,
                "task_args": self.task_args,
            },
        }

    @classmethod
    def read(cls, path: Path) -> "ModelCard":
        """Read a ``config.json``.

        Raises:
            OutputError: It is not one of this program; the message names the field.
        """
        try:
            value = json.loads(regular(path).read_text(encoding="utf-8"))
            own, cfg = value["statickey"], value["pretrained_cfg"]
            sizes = {name: value["model_args"][name] for name in _SIZES if name in value["model_args"]}
            fields = {
                "architecture": value["architecture"],
                "mixer": own["mixer"],
                "model_args": own["model_args"],
                "input_size": cfg["input_size"],
                "label_names": value["label_names"],
                "mean": cfg["mean"],
                "std": cfg["std"],
                "streamed": own["streamed"],
                "fp32_logits": own.get("fp32_logits", False),  # version 0.1 said neither this
                "task": own.get("task", "classify"),  # nor this
                "task_args": own.get("task_args", {}),  # nor this
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OutputError(f"{path} does not describe a network of this program ({error!r})") from error
        for name, given in fields.items():
            if not _fits(name, given):
                raise OutputError(
                    f"{path} does not describe a network of this program ({name} is {reprlib.repr(given)}); give the "
                    "folder of a finished run"
                )
        channels, height, _ = fields.pop("input_size")
        for name in ("mean", "std"):
            if len(fields[name]) not in (1, channels):
                raise OutputError(f"{path}: {name} has {len(fields[name])} numbers for {channels} channels")
        return cls(
            architecture=fields["architecture"],
            mixer=fields["mixer"],
            model_args=sizes | fields["model_args"],
            img_size=height,
            in_chans=channels,
            class_names=tuple(fields["label_names"]),
            mean=tuple(fields["mean"]),
            std=tuple(fields["std"]),
            streamed=fields["streamed"],
            fp32_logits=fields["fp32_logits"],
            task=fields["task"],
            task_args=fields["task_args"],
        )


def _fits(name: str, field: Any) -> bool:
    """Whether a field of a card has the type and range it must have."""
    if name in ("streamed", "fp32_logits"):
        return isinstance(field, bool)
    if name in ("model_args", "task_args"):
        return isinstance(field, dict)
    if name in ("architecture", "mixer", "task"):
        return isinstance(field, str) or (name == "mixer" and field is None)
    if not isinstance(field, list) or not field:
        return False
    if name == "label_names":
        return all(isinstance(label, str) for label in field)
    if name == "input_size":
        whole = all(isinstance(extent, int) and not isinstance(extent, bool) and extent > 0 for extent in field)
        return whole and len(field) == 3 and field[1] == field[2]
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in field)
    return numbers and (name == "mean" or min(field) > 0)


def without_weights(model_args: dict[str, Any]) -> dict[str, Any]:
    """What a model is, without where its first weights came from."""
    return {name: value for name, value in model_args.items() if name not in PRETRAINED_ARGS}


def write_model(
    folder: Path, which: str, model: nn.Module, card: ModelCard, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write one set of weights, the model's own unless given, after the JSON beside them: where they are, all is."""
    state = model.state_dict() if weights is None else weights
    content = safetensors.torch.save({k: v.contiguous().cpu() for k, v in state.items()})
    write_json(folder / CONFIG_FILE, card.completed(model).to_json())
    write_atomic(folder / WEIGHTS_FILES[which], lambda file: file.write(content))
