"""Trained networks on disk: safetensors with a JSON beside them, as timm and the Hugging Face hub keep them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from .._files import write_atomic, write_json
from ..errors import OutputError, StaticKeyError
from ..models import SMALL_VIT, build_model, load_exactly, small_vit_sizes, timm_args
from .checkpoint import SUFFIX

CONFIG_FILE = "config.json"
WEIGHTS_FILES = {"last": "model.safetensors", "ema": "model_ema.safetensors"}


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

    def build(self, img_size: int | None = None) -> nn.Module:
        """The network with fresh weights, for its own or another image size."""
        return build_model(
            self.architecture,
            self.mixer,
            img_size=self.img_size if img_size is None else img_size,
            num_classes=len(self.class_names),
            in_chans=self.in_chans,
            model_args=self._plain_args(),
        )

    def to_json(self) -> dict[str, Any]:
        """In timm's layout, with what timm does not know under ``statickey``."""
        size = (self.in_chans, self.img_size, self.img_size)
        return {
            "architecture": self.architecture,
            "num_classes": len(self.class_names),
            "model_args": timm_args(self.architecture, self.mixer, self.img_size, self._plain_args()),
            "label_names": list(self.class_names),
            "pretrained_cfg": {
                "input_size": list(size),
                "num_classes": len(self.class_names),
                "mean": list(self.mean),
                "std": list(self.std),
            },
            "statickey": {"mixer": self.mixer, "model_args": self.model_args, "streamed": self.streamed},
        }

    def _plain_args(self) -> dict[str, Any]:
        sizes = small_vit_sizes(self.img_size) if self.architecture == SMALL_VIT else {}
        return sizes | {k: v for k, v in self.model_args.items() if k != "pretrained"}

    @classmethod
    def read(cls, path: Path) -> "ModelCard":
        """Read a ``config.json``.

        Raises:
            OutputError: It is not one of this program.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            own, cfg = value["statickey"], value["pretrained_cfg"]
            return cls(
                architecture=value["architecture"],
                mixer=own["mixer"],
                model_args=own["model_args"],
                img_size=cfg["input_size"][1],
                in_chans=cfg["input_size"][0],
                class_names=tuple(value["label_names"]),
                mean=tuple(cfg["mean"]),
                std=tuple(cfg["std"]),
                streamed=own["streamed"],
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise OutputError(f"{path} does not describe a network of this program ({error!r})") from error


def write_model(folder: Path, which: str, model: nn.Module, card: ModelCard) -> None:
    """Write one set of weights, and the JSON beside them."""
    weights = safetensors.torch.save({k: v.contiguous().cpu() for k, v in model.state_dict().items()})
    write_atomic(folder / WEIGHTS_FILES[which], lambda file: file.write(weights))
    write_json(folder / CONFIG_FILE, card.to_json())


def load_model(source: str | Path, *, img_size: int | None = None, ema: bool = False) -> tuple[nn.Module, ModelCard]:
    """A trained network and how it was made.

    Args:
        source: Folder of a run, or a weights file with its ``config.json`` beside it.
        img_size: Build the network for this size; keys and position embeddings are resampled.
        ema: The averaged weights, where ``source`` is a folder.

    Returns:
        The network in evaluation mode, and its card.

    Raises:
        OutputError: There is no trained network, or it cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise OutputError(f"there is no {source}; give the folder of a finished run, or a weights file")
    folder = path if path.is_dir() else path.parent
    weights = path / WEIGHTS_FILES["ema" if ema else "last"] if path.is_dir() else path
    if ema and weights.name != WEIGHTS_FILES["ema"]:
        raise OutputError(f"{source} is one file, not the averaged weights; give its folder, or leave out --ema")
    if not weights.is_file():
        if any(path.glob(f"*{SUFFIX}")):
            raise OutputError(f"{source} holds an interrupted run; the same command that began it finishes it")
        raise OutputError(f"{source} holds no {weights.name}; give the folder of a finished run")
    if not (folder / CONFIG_FILE).is_file():
        raise OutputError(f"{weights} has no {CONFIG_FILE} beside it; give the folder of a finished run")
    card = ModelCard.read(folder / CONFIG_FILE)
    try:
        model = card.build(img_size)
    except StaticKeyError as error:
        raise OutputError(f"cannot build the network of {folder}: {error}") from error
    load_exactly(model, weights)
    return model.eval(), card
