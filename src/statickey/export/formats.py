"""A network in one file or folder of each format, and a function that runs what was written."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_text
from ..models import CONFIG_FILE, WEIGHTS_FILE
from ..tasks import ModelCard, load_model, write_model
from .page import model_page

FILES = {
    "onnx": ("model.onnx",),
    "int8": ("model_int8.onnx",),
    "torch": ("model.pt2",),
    "hub": (WEIGHTS_FILE, CONFIG_FILE, "README.md"),
}
"""What each format is made of; the first holds the weights."""
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """What is exported."""

    source: str
    model: nn.Module
    """From images (B, C, S, S) to logits, in evaluation mode."""
    card: ModelCard
    """Its, with S as ``img_size``."""
    images: Tensor
    """Real ones, (N, C, S, S)."""


def write_onnx(place: Path, subject: Subject, opset: int) -> Run:
    """Write an ONNX file of any batch size, with the card in its metadata."""
    path = place / FILES["onnx"][0]
    onnx_program(subject.model, subject, opset).save(str(path))
    return onnx_session(path)


def write_torch(place: Path, subject: Subject) -> Run:
    """Write torch.export's program for any batch size, with the card beside it."""
    batch, shapes = _example(subject.images)
    path = place / FILES["torch"][0]
    with torch.no_grad():
        program = torch.export.export(_Named(subject.model).eval(), (batch,), dynamic_shapes=shapes)
    extra = {"statickey.json": json.dumps(subject.card.to_json())}
    torch.export.save(program, path, extra_files=extra)
    run: Any = torch.export.load(path).module()
    return lambda x: run(x)


def write_hub(place: Path, subject: Subject) -> Run:
    """Write weights, configuration and a page."""
    write_model(place, "last", subject.model, subject.card)
    write_text(place / FILES["hub"][2], model_page(subject.source, subject.card.completed(subject.model)))
    again, _ = load_model(place)
    return again


def onnx_program(model: nn.Module, subject: Subject, opset: int) -> Any:
    """A network as torch's ``ONNXProgram``, input ``images``, output ``logits``.

    Args:
        model: The subject's, or another way to compute it.
        subject: Its images and card.
        opset: Of ONNX.
    """
    batch, shapes = _example(subject.images)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program: Any = torch.onnx.export(
            _Named(model).eval(),
            (batch,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    program.model.metadata_props["statickey"] = json.dumps(subject.card.to_json())
    return program


def onnx_session(path: Path) -> Run:
    """Run an ONNX file on the CPU, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _example(images: Tensor) -> tuple[Tensor, Any]:
    """Two images, for one would be taken for a constant, and that their number is free."""
    batch = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    return batch, {"x": {0: torch.export.Dim("batch")}}


class _Named(nn.Module):
    """The network with a name for its input that does not depend on it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)
