"""How far what was written is from the network, how fast it is, and what it lost."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..tasks import Evidence, counted
from .formats import Run

Scored = Callable[[nn.Module], Evidence]
_BATCH = 8
_SECONDS = 0.2
"""To time a network for, at least."""


@dataclass(frozen=True)
class Loss:
    """What int8 costs."""

    points: float
    """Of the score; without labels, the share in percent of the images that it says another class of, which is no
    less."""
    images: str
    """What it was measured on."""
    score: float | None
    network_score: float | None


@torch.no_grad()
def logits_of(run: Run, images: Tensor) -> Tensor:
    """What a function says of images, in batches, the first of another size than it was traced with."""
    return torch.cat([run(part) for part in (images[:1], *torch.split(images[1:], _BATCH)) if len(part)])


def difference(said: Tensor, wanted: Tensor) -> float:
    """The largest of a logit, as a share of the largest."""
    return float((said - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


def milliseconds(run: Run, image: Tensor) -> float:
    """Median time of a call without gradients."""
    timer = Timer(
        "run(image)", globals={"run": torch.no_grad()(run), "image": image}, num_threads=torch.get_num_threads()
    )
    return 1e3 * float(timer.blocked_autorange(min_run_time=_SECONDS).median)


def loss_of_score(run: Run, network: nn.Module, scored: Scored) -> Loss:
    """Points that a function of images loses against the network, on the images that ``scored`` scores on."""
    theirs, ours = scored(_Network(run)), scored(network)
    points = ours.value() - theirs.value()
    return Loss(points, counted(ours.num_images, "test image"), theirs.value(), ours.value())


def loss_of_agreement(said: Tensor, wanted: Tensor) -> Loss:
    """The share of the images, by their logits, (N, num_classes), that are taken for another class."""
    points = 100 * float((said.argmax(1) != wanted.argmax(1)).float().mean())
    return Loss(points, counted(len(said), "image") + " without labels", None, None)


class _Network(nn.Module):
    """A function of images as a network, which can be scored."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.place = nn.Parameter(torch.empty(0))  # says that it is on the CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)
