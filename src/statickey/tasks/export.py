"""``export``: a trained classifier in files for other programs, each run and compared before it is kept."""

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .._checks import check_arguments, check_count, check_folder, check_positive
from .._files import check_writable, explained_write, write_json, write_text
from ..errors import OutputError, StaticKeyError
from ..models import CONFIG_FILE, WEIGHTS_FILE
from .classification import Classification
from .display import Display
from .loading import load_model
from .published import published_model
from .registry import task_named
from .run import read_result
from .samples import images_for
from .start import RESULT_FILE
from .weights import ModelCard, write_model

Format = Literal["onnx", "torch", "hub"]
FILES = {"onnx": ("model.onnx",), "torch": ("model.pt2",), "hub": (WEIGHTS_FILE, CONFIG_FILE, "README.md")}
"""What each format is made of; the first holds the weights."""
OPSETS = (18, 23)
"""The oldest that torch's exporter writes, and the first with one operator for attention."""
AT_MOST = 1e-3
"""The largest difference of a logit, as a share of the largest logit, that still counts as the same network."""
_SECONDS = 0.2
"""To time a network for, at least."""
_REPORT = "export.json"
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Artefact:
    """What was written, and how it compares with the network it was made of."""

    format: str
    file: str
    megabytes: float
    difference: float
    """The largest of a logit on the images, as a share of the largest logit."""
    milliseconds: float
    """For one image, alone in its batch; median."""
    network_milliseconds: float
    """The network's."""


def export_run(
    source: str,
    *,
    out: str,
    formats: Sequence[Format] = ("onnx",),
    opset: int = 23,
    img_size: int | None = None,
    ema: bool = False,
    data: str | None = None,
    data_dir: str | None = None,
    num_images: int = 16,
    seed: int = 0,
    console: Console | None = None,
) -> list[Artefact]:
    """Write a trained classifier for other programs: ONNX, torch.export's format, or a folder as the hub has them.

    Each file is run on the CPU and compared with the network before it is kept. Batches may have any size, images
    have one; keys are resampled to it before, not in the graph.

    Args:
        source: Folder of a run or of a converted network, or a pretrained model's name, as timm has it.
        out: Folder of the files.
        formats: ``onnx``, run by onnxruntime; ``torch``, by ``torch.export.load``; ``hub``, safetensors with timm's
            ``config.json`` and a model card.
        opset: Of ONNX, 18 to 23; from 23 on, attention is one operator.
        img_size: Side of the images in pixels; default the network's own.
        ema: The averaged weights.
        data: Images to compare on, a folder or what ``train`` takes; default the training images of the run.
        data_dir: Where torchvision keeps its downloads.
        num_images: Images to compare on.
        seed: Of which images are taken.
        console: Where to print; default the terminal.

    Returns:
        What was written, which is in ``export.json`` too.

    Raises:
        StaticKeyError: There is no such network, the format is not for it, or a file is not the same function, and is
            not kept.
    """
    check_arguments(export_run, locals())
    check_folder(out=out)
    check_positive(num_images=num_images)
    if not formats or len(set(formats)) < len(formats):
        raise StaticKeyError(f"formats={list(formats)} must name at least one of {', '.join(FILES)}, each once")
    if "onnx" in formats:
        _check_onnx(opset)
    folder = Path(out)
    for name in (name for format in formats for name in FILES[format]):
        if (folder / name).exists():
            raise OutputError(f"{out} holds a {name} already; choose another --out")
        check_writable(out=folder / name)
    display = Display(console)
    published = not Path(source).exists()
    model, card = published_model(source, img_size) if published else load_model(source, img_size=img_size, ema=ema)
    card = card if img_size is None else replace(card, img_size=img_size)
    task = task_named(card.task)
    if not isinstance(task, Classification):
        raise StaticKeyError(f"{source} is of task {task.name}; classifiers are exported, as yet nothing else")
    with display.busy("reading images"):
        where: dict[str, Any] = {"data": data, "data_dir": data_dir, "num_images": num_images, "seed": seed}
        images, _ = images_for(task, model, card, source, **where)
    made = []
    for format in formats:
        with display.busy(f"writing and running {FILES[format][0]}"):
            made.append(_made(format, folder, model, card, images, opset, source))
    write_json(folder / _REPORT, [asdict(each) for each in made])
    display.console.print(_table(made, len(images)))
    display.say(f"results: {escape(out)}")
    return made


def _check_onnx(opset: int) -> None:
    check_count(opset=opset)
    first, last = OPSETS
    if not first <= opset <= last:
        raise StaticKeyError(f"opset={opset} must be from {first} to {last}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise StaticKeyError(f"ONNX needs {', '.join(missing)}: pip install 'statickey[export]'")


def _made(
    format: Format, folder: Path, model: nn.Module, card: ModelCard, images: Tensor, opset: int, source: str
) -> Artefact:
    """Write beside the place, run, compare, and move into place."""
    with explained_write(folder / FILES[format][0]):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        place = Path(temporary)
        run = {"onnx": _onnx, "torch": _torch, "hub": _hub}[format](place, model, card, images, opset, source)
        difference = _difference(model, run, images)
        first = place / FILES[format][0]
        if not difference <= AT_MOST:
            raise StaticKeyError(
                f"{first.name} is {difference:.1e} from the network on {len(images)} images (at most {AT_MOST:g}) "
                "and was not kept"
            )
        theirs, ours = (_milliseconds(each, images[:1]) for each in (run, model))
        megabytes = first.stat().st_size / 1e6
        with explained_write(folder / first.name):
            for name in FILES[format]:
                (place / name).replace(folder / name)
    return Artefact(format, first.name, megabytes, difference, theirs, ours)


@torch.no_grad()
def _difference(model: nn.Module, run: Run, images: Tensor) -> float:
    """The largest of a logit, as a share of the largest; two batches of other sizes than it was traced with."""
    wanted = model(images)
    said = torch.cat([run(part) for part in (images[:1], images[1:]) if len(part)])
    return float((said - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def _milliseconds(run: Run, image: Tensor) -> float:
    """Median time of a call without gradients."""
    timer = Timer(
        "run(image)", globals={"run": torch.no_grad()(run), "image": image}, num_threads=torch.get_num_threads()
    )
    return 1e3 * float(timer.blocked_autorange(min_run_time=_SECONDS).median)


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


def _onnx(place: Path, model: nn.Module, card: ModelCard, images: Tensor, opset: int, source: str) -> Run:
    import onnxruntime

    batch, shapes = _example(images)
    path = str(place / FILES["onnx"][0])
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
        program.model.metadata_props["statickey"] = json.dumps(card.to_json())
        program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _torch(place: Path, model: nn.Module, card: ModelCard, images: Tensor, opset: int, source: str) -> Run:
    batch, shapes = _example(images)
    path = place / FILES["torch"][0]
    with torch.no_grad():
        program = torch.export.export(_Named(model).eval(), (batch,), dynamic_shapes=shapes)
    extra = {"statickey.json": json.dumps(card.to_json())}
    torch.export.save(program, path, extra_files=extra)
    run: Any = torch.export.load(path).module()
    return lambda x: run(x)


def _hub(place: Path, model: nn.Module, card: ModelCard, images: Tensor, opset: int, source: str) -> Run:
    write_model(place, "last", model, card)
    write_text(place / FILES["hub"][2], _model_card(source, card.completed(model)))
    again, _ = load_model(place)
    return again


def _model_card(source: str, card: ModelCard) -> str:
    """A page for the hub: what it is, how to load it, and what it scored."""
    where = Path(source) / RESULT_FILE
    result = read_result(Path(source)) if where.is_file() else None
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "statickey"],
    }
    name = card.architecture if card.mixer is None else f"{card.architecture} with {card.mixer}"
    lines = [f"# {name}", "", f"{len(card.class_names)} classes, images of {card.img_size} pixels.", ""]
    if result is not None:
        data, score = Path(result["data"]).name, round(result["accuracy"], 2)
        metric = {"type": "accuracy", "value": score}
        found = {
            "task": {"type": "image-classification"},
            "dataset": {"name": data, "type": data},
            "metrics": [metric],
        }
        head["model-index"] = [{"name": name, "results": [found]}]
        split = result.get("score_on", "test")
        lines += [
            f"Accuracy on {result['scored_images']} {split} images of {data}: {score} %, after "
            f"{len(result['curve'])} epochs, seed {result['seed']}.",
            "",
        ]
    lines += [
        "```python",
        "import statickey",
        "",
        'model, card = statickey.tasks.load_model("FOLDER")  # needs pip install "statickey[train]"',
        "```",
        "",
        f"Images are RGB in 0 to 1 with mean {list(card.mean)} and standard deviation {list(card.std)} taken out."
        if card.in_chans == 3
        else f"Images have {card.in_chans} channels in 0 to 1 with mean {list(card.mean)} and standard deviation "
        f"{list(card.std)} taken out.",
        "",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join(lines)


def _table(made: Sequence[Artefact], num_images: int) -> Table:
    caption = (
        f"difference: largest of a logit, as a share of the largest, on {num_images} images; ms: one image on the "
        f"CPU ({torch.get_num_threads()} threads), median"
    )
    table = Table("file", "MB", "difference", "ms", "network's ms", caption=caption)
    for each in made:
        ms = (f"{each.milliseconds:.2f}", f"{each.network_milliseconds:.2f}")
        table.add_row(each.file, f"{each.megabytes:.1f}", f"{each.difference:.1e}", *ms)
    return table
