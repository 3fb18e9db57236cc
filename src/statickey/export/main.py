"""``export``: a trained network in files for other programs, each run and compared before it is kept."""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from .._checks import check_arguments, check_count, check_folder, check_positive
from .._files import check_writable, explained_write, write_json
from ..errors import OutputError, StaticKeyError
from ..tasks import Classification, Display, Segmentation, images_for, network_of
from .formats import FILES, Run, Subject, write_hub, write_onnx, write_torch
from .int8 import write_int8
from .measure import Loss, difference, logits_of, loss_of_agreement, loss_of_score, milliseconds

Format = Literal["onnx", "int8", "torch", "hub"]
OPSETS = (18, 23)
"""The oldest that torch's exporter writes, and the first with one operator for attention."""
AT_MOST = 1e-3
"""The largest difference of a logit, as a share of the largest logit, that still counts as the same network."""
_NUM_IMAGES = {True: 64, False: 4}
"""Unless told otherwise, by whether the task has one size of image; those of others are large."""
_REPORT = "export.json"
_DETECTORS = (
    "classifiers and segmenters are exported, not detectors: torchvision's branch on what they find, which "
    "torch.export refuses, and RT-DETRv2 has operators that ONNX lacks"
)


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
    compiled_milliseconds: float | None
    """The network's under ``torch.compile``, where that was asked for."""
    loss: Loss | None
    """Of int8."""


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
    num_images: int | None = None,
    max_drop: float = 0.5,
    compiled: bool = False,
    seed: int = 0,
    console: Console | None = None,
) -> list[Artefact]:
    """Write a trained classifier or segmenter for other programs, as ONNX, torch.export's format or a hub's folder.

    Each file is run on the CPU and compared with the network before it is kept. Batches may have any size, images
    have one; keys are resampled to it before, not in the graph.

    Args:
        source: Folder of a run or of a converted network, or a pretrained model's name, as timm has it.
        out: Folder of the files.
        formats: ``onnx``, run by onnxruntime; ``int8``, the same with convolutions, linear layers and products with
            static keys in 8 bits; ``torch``, by ``torch.export.load``; ``hub``, safetensors with timm's
            ``config.json`` and a model card. int8 and hub are for classifiers.
        opset: Of ONNX, 18 to 23; from 23 on, attention is one operator. int8 has 21 at most.
        img_size: Side of the images in pixels; default the network's own, of a segmenter the one its keys are for.
        ema: The averaged weights.
        data: Images to compare on, a folder or what ``train`` takes; default those of the run.
        data_dir: Where torchvision keeps its downloads.
        num_images: Images to compare and calibrate on, default 64, of a segmenter 4; of a folder's, int8 is measured
            on a quarter of them.
        max_drop: Points of the score that int8 may lose on the test images. Of a folder's images, which have no
            labels, the share in percent that it may say another class of.
        compiled: Time the network under ``torch.compile`` too, which takes a minute.
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
    if num_images is not None:
        check_positive(num_images=num_images)
    if not 0 <= max_drop <= 100:
        raise StaticKeyError(f"max_drop={max_drop} must be points, from 0 to 100")
    if not formats or len(set(formats)) < len(formats):
        raise StaticKeyError(f"formats={list(formats)} must name at least one of {', '.join(FILES)}, each once")
    if {"onnx", "int8"} & set(formats):
        _check_onnx(opset)
    folder = Path(out)
    for name in (name for format in formats for name in FILES[format]):
        if (folder / name).exists():
            raise OutputError(f"{out} holds a {name} already; choose another --out")
        check_writable(out=folder / name)
    display = Display(console)
    model, card, task = network_of(
        source,
        img_size=img_size,
        ema=ema,
        tasks=(Classification, Segmentation),
        otherwise=_DETECTORS,
    )
    only = [format for format in formats if format in ("int8", "hub") and not isinstance(task, Classification)]
    if only:
        raise StaticKeyError(f"{source} is of task {task.name}; --formats {' '.join(only)}: classifiers only")
    with display.busy("reading images"):
        number = _NUM_IMAGES[task.fixed_size] if num_images is None else num_images
        where: dict[str, Any] = {"data": data, "data_dir": data_dir, "num_images": number, "seed": seed}
        images, scored = images_for(task, model, card, source, split="test", **where)
    held_back = 0 if scored is not None else -(-len(images) // 4)
    if "int8" in formats and held_back == len(images):
        raise StaticKeyError(f"int8 is calibrated on an image and measured on another; {source} got {len(images)}")
    with display.busy("running the network"):
        wanted = logits_of(model, images)
        eager = milliseconds(model, images[:1])
        faster = milliseconds(_compiled(model, images[:1]), images[:1]) if compiled else None
    resized = img_size is not None and isinstance(task, Segmentation)
    subject = Subject(source, _for_size(model, card.img_size) if resized else model, card, images)
    made: list[Artefact] = []
    for format in formats:
        first = FILES[format][0]
        with display.busy(f"writing and running {first}"), _kept(folder, FILES[format]) as place:
            loss = None
            if format == "int8":
                fewer = replace(subject, images=images[: len(images) - held_back])
                run = write_int8(place, fewer, opset)
                said = logits_of(run, images)
                if scored is None:
                    loss = loss_of_agreement(said[-held_back:], wanted[-held_back:])
                else:
                    loss = loss_of_score(run, model, scored)
                _check_loss(first, loss, max_drop)
            else:
                run = _write(format, place, subject, opset)
                said = logits_of(run, images)
                _check_same(first, said, wanted)
            size, time = (place / first).stat().st_size / 1e6, milliseconds(run, images[:1])
        made.append(Artefact(format, first, size, difference(said, wanted), time, eager, faster, loss))
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


def _check_same(file: str, said: Tensor, wanted: Tensor) -> None:
    found = difference(said, wanted)
    if not found <= AT_MOST:
        raise StaticKeyError(
            f"{file} is {found:.1e} from the network on {len(said)} images (at most {AT_MOST:g}) and was not kept"
        )


def _check_loss(file: str, loss: Loss, max_drop: float) -> None:
    if not loss.points <= max_drop:
        raise StaticKeyError(
            f"{file} lost {loss.points:.2f} points on {loss.images} (at most {max_drop:g}) and was not kept; "
            "calibrate on more --num-images, or allow it with --max-drop"
        )


def _for_size(model: nn.Module, img_size: int) -> nn.Module:
    """A segmenter that has resampled, before it is traced, what it would resample in the graph."""
    sized: Any = copy.deepcopy(model)
    if hasattr(sized.pyramid.body, "set_input_size"):
        sized.pyramid.body.set_input_size((img_size, img_size))
    return sized  # type: ignore[no-any-return]


def _compiled(model: nn.Module, image: Tensor) -> Run:
    """The network under ``torch.compile``, compiled for this size.

    Raises:
        StaticKeyError: There is no compiler that works.
    """
    run: Run = torch.compile(model)
    try:
        logits_of(run, image)
    except Exception as error:  # of many kinds, as the compiler's ways to fail
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise StaticKeyError(f"torch.compile fails here ({reason}); leave out --compiled") from error
    return run


def _write(format: Format, place: Path, subject: Subject, opset: int) -> Run:
    if format == "onnx":
        return write_onnx(place, subject, opset)
    return write_torch(place, subject) if format == "torch" else write_hub(place, subject)


@contextmanager
def _kept(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A place to write files beside their own, where they come to if nothing is raised.

    Raises:
        StaticKeyError: An exporter, or what runs its file, cannot do it.
    """
    with explained_write(folder / names[0]):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        try:
            yield Path(temporary)
        except (StaticKeyError, OSError):
            raise
        except Exception as error:  # of many libraries
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StaticKeyError(
                f"{names[0]} cannot be made ({reason}); try another of --formats or --opset"
            ) from error
        with explained_write(folder / names[0]):
            for name in names:
                (Path(temporary) / name).replace(folder / name)


def _table(made: Sequence[Artefact], num_images: int) -> Table:
    caption = [
        f"difference: largest of a logit, as a share of the largest, on {num_images} images; ms: one image on the "
        f"CPU ({torch.get_num_threads()} threads), median"
    ]
    faster = made[0].compiled_milliseconds
    losses = [each.loss for each in made if each.loss is not None]
    columns = ["file", "MB", "difference", "ms", "network's ms", *["compiled ms"] * (faster is not None)]
    for loss in losses:
        if loss.score is None:
            caption.append(f"lost: share that is taken for another class, of {loss.images}")
        else:
            caption.append(f"lost: points of {loss.network_score:.2f} %, on {loss.images}")
    table = Table(*columns, *["lost"] * bool(losses), caption="\n".join(caption))
    for each in made:
        cells = [each.file, f"{each.megabytes:.1f}", f"{each.difference:.1e}", f"{each.milliseconds:.2f}"]
        cells += [f"{each.network_milliseconds:.2f}", *([] if faster is None else [f"{faster:.2f}"])]
        cells += ["" if each.loss is None else f"{each.loss.points:.2f}"] if losses else []
        table.add_row(*cells)
    return table
