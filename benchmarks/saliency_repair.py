"""A DINOv2 whose heads are all static, repaired for some minutes; ``convert.py saliency --repair MINUTES`` runs it.

First the keys alone, each layer's output matched to the teacher's, then all weights, the tokens behind each block and
the last ones matched; on images without labels. What takes long is kept: run again, it goes on where it was, its
time counted.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import saliency  # needs onnx
import statickey
from statickey._files import write_atomic
from statickey.convert import as_mixers, key_parameters, layer_loss, relative_error
from statickey.convert.calibration.reading import change
from statickey.data import mix_seed

SEEN, UNSEEN = 50, 11
"""Images of a folder that keys are fitted on; those behind them that measure all and train nothing."""
BATCH = 8
SAVE_EVERY = 120.0
"""Seconds."""


@dataclass(frozen=True)
class Stage:
    """What is matched, for which share of the minutes, and at which peak rates."""

    name: Literal["keys", "features"]
    share: float
    key_lr: float
    lr: float | None
    """Of all else; None leaves it as it is."""


STAGES = (Stage("keys", 0.1, 1e-2, None), Stage("features", 0.9, 3e-3, 3e-4))
WARMUP = 0.05
"""Share of a stage in which rates rise; then they fall as a cosine."""


def repair_study(folders: Sequence[str], elsewhere: Sequence[str], minutes: float, out: Path) -> None:
    """Convert all heads, repair, and print rows: at the start, after the keys, after all weights.

    Args:
        folders: Images; the first 50 of each fit keys, the next 11 measure, all but these 11 repair.
        elsewhere: Folders whose first 11 images each measure too, if any.
        minutes: For the repair.
        out: Folder of what is kept.
    """
    teacher = saliency.load(saliency.graph_file())
    student = saliency.load(saliency.graph_file())
    tests = {"unseen": torch.cat([saliency.images(folder, UNSEEN, skip=SEEN) for folder in folders])}
    if elsewhere:
        tests["elsewhere"] = torch.cat([saliency.images(folder, UNSEEN) for folder in elsewhere])
    _convert(student, folders, out / "converted.safetensors")
    measured = {name: saliency_of(teacher, images) for name, images in tests.items()}
    as_mixers(teacher.requires_grad_(False))

    def show(stage: str, about: str) -> None:
        for name, images in tests.items():
            correlation, moved = compared(measured[name], saliency_of(student.eval(), images))
            print(f"| {stage} | {name} | {correlation:.3f} | {moved:.3f} | {about} |", flush=True)

    paths = [path for folder in folders for path in _but_unseen(saliency.files(folder))]
    print(f"{len(paths)} images to repair on, {torch.get_num_threads()} threads")
    print("| repaired | images | correlation | change of tokens | |")
    show("none", "")
    source = _views(paths)
    for number, stage in enumerate(STAGES):
        file = out / f"{number + 1}-{stage.name}.pt"
        steps = Matching(student, teacher, stage, stage.share * minutes * 60, file).run(source)
        show(stage.name, f"{steps} steps of {BATCH}")
    statickey.save_converted(student, out / "repaired.safetensors")


def _convert(student: saliency.Saliency, folders: Sequence[str], file: Path) -> None:
    """All heads static, by ``kl``: fitted, or as fitted before."""
    if file.is_file():
        statickey.load_converted(student, file)
        return
    seen = torch.cat([saliency.images(folder, SEEN) for folder in folders])
    seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))]
    asked = statickey.Calibration([seen], num_images=len(seen), criterion="kl")
    report = statickey.convert(student, "ska", calibration=asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    statickey.save_converted(student, file, report)


class Matching:
    """One stage of a repair; where its file has a state, it goes on from that.

    Args:
        student: Its ``backbone`` is trained.
        teacher: Its ``backbone`` is followed.
        stage: What is matched.
        seconds: How long it trains; rates follow the clock.
        file: Of the state.
    """

    def __init__(
        self, student: saliency.Saliency, teacher: saliency.Saliency, stage: Stage, seconds: float, file: Path
    ) -> None:
        self.student, self.teacher = student.backbone, teacher.backbone
        self.stage, self.budget, self.file = stage, seconds, file
        keys = key_parameters(self.student)
        own = {id(key) for key in keys}
        others = [p for p in self.student.parameters() if id(p) not in own] if stage.lr is not None else []
        student.requires_grad_(False)
        for parameter in [*keys, *others]:
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": keys, "peak": stage.key_lr}, {"params": others, "peak": stage.lr}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        self.step, self.elapsed = 0, 0.0

    def run(self, views: Callable[[int], Tensor]) -> int:
        """Train until the time is over.

        Args:
            views: Images (BATCH, C, H, W) by seed.

        Returns:
            The number of steps.
        """
        if self.file.is_file():
            state = torch.load(self.file, weights_only=True)
            self.student.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = state["step"], state["elapsed"]
        loss_of = layer_loss if self.stage.name == "keys" else _token_loss
        saved, losses = self.elapsed, list[float]()
        while self.elapsed < self.budget:
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(self.elapsed / self.budget)
            images = views(mix_seed(len(self.stage.name), self.step))
            with torch.autocast("cpu", torch.bfloat16):  # three times as fast where the processor knows it
                loss = loss_of(self.student, self.teacher, images)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss.item())
            self.step += 1
            self.elapsed += time.perf_counter() - start
            if self.elapsed - saved > SAVE_EVERY or self.elapsed >= self.budget:
                print(
                    f"{self.stage.name}: {self.elapsed:.0f} s, step {self.step}, loss {np.mean(losses):.4f}",
                    flush=True,
                )
                saved, losses = self.elapsed, []
                self._save()
        return self.step

    def _save(self) -> None:
        state = {"model": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "elapsed": self.elapsed}
        write_atomic(self.file, lambda file: torch.save(state, file))


def _token_loss(student: Any, teacher: Any, images: Tensor) -> Tensor:
    """Error of the last tokens, and the mean error of those behind the blocks, normed as the last are."""

    def tokens(model: Any) -> list[Tensor]:
        last, behind = model.forward_intermediates(images, output_fmt="NLC", norm=True)
        return [last, *behind]

    with torch.no_grad():
        wanted = tokens(teacher)
    last, *behind = map(relative_error, tokens(student), wanted)
    return last + torch.stack(behind).mean()


def _rate(progress: float) -> float:
    """Share of the peak."""
    if progress < WARMUP:
        return (progress + 0.01) / (WARMUP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def _but_unseen(paths: list[Path]) -> list[Path]:
    return paths[:SEEN] + paths[SEEN + UNSEEN :]


def _views(paths: Sequence[Path]) -> Callable[[int], Tensor]:
    """Random views of random images: whole, padded to a square as in the test, or a crop; mirrored or not."""
    side = saliency.SIDE
    shrink = v2.Resize(None, max_size=2 * side)
    images = [shrink(decode_image(str(path), ImageReadMode.RGB)) for path in paths]
    whole = v2.Compose([v2.Resize(None, max_size=side), v2.CenterCrop(side)])
    view = v2.Compose(
        [
            v2.RandomChoice([whole, v2.RandomResizedCrop(side, (0.3, 1.0))]),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(saliency.MEAN, saliency.STD),
        ]
    )

    def batch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([view(images[pick]) for pick in torch.randint(len(images), (BATCH,)).tolist()])

    return batch


@torch.no_grad()
def saliency_of(model: saliency.Saliency, images: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and tokens."""
    tokens = torch.cat([model.backbone(batch) for batch in images.split(16)])
    return torch.cat([model.maps(part) for part in tokens.split(16)]), tokens


def compared(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean correlation of maps, and change of tokens as a share of their size."""
    pairs = zip(before[0].flatten(1), after[0].flatten(1), strict=True)
    correlation = float(np.mean([np.corrcoef(old, new)[0, 1] for old, new in pairs]))
    return correlation, change([before[1]], [after[1]])
