"""Scenes of handwritten digits, drawn from a seed: small data for detection and segmentation, with no download."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .annotations import MapPictures, ObjectPictures, Objects, run_length_tools
from .images import read_digits

DIGITS = tuple("0123456789")
TRAIN_SCENES, TEST_SCENES = 400, 100
_SIDES = (80, 112)
_DIGITS_PER_SCENE = (2, 6)
_DIGIT_SIDES = (16, 32)
_INK = 104  # of 255: paler pixels of a digit belong to the background
_LEAST_VISIBLE = 0.75  # of a digit that others cover
_TRIES = 50


class Scene(NamedTuple):
    """What one drawing holds."""

    pixels: NDArray[np.uint8]
    """RGB, (H, W, 3)."""
    places: NDArray[np.uint8]
    """Place in ``labels``, counted from 1, of the digit that a pixel shows; 0 for the background, (H, W)."""
    labels: NDArray[np.int64]
    """Which digits they are, (n,)."""


class Scenes(ObjectPictures, MapPictures):
    """Digits in random colours and sizes, some partly covered, on a dark canvas of varying size.

    The drawing uses whole numbers and a generator whose stream is fixed, so that it is the same everywhere. Scenes
    are drawn when first asked for, and kept.

    Args:
        scans: Digits to draw, (N, 8, 8).
        labels: Which digits they are, (N,).
        count: Number of scenes.
        seed: What the drawing starts from; scenes of different seeds have nothing in common.
        name: What the scenes are called in messages.
    """

    def __init__(
        self, scans: NDArray[np.uint8], labels: NDArray[np.int64], count: int, *, seed: int, name: str
    ) -> None:
        self.scans, self.labels, self.count, self.seed, self.name = scans, labels, count, seed, name
        self._drawn: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self.count

    def scene(self, i: int) -> Scene:
        """Drawing ``i``."""
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        if i not in self._drawn:
            self._drawn[i] = _draw(np.random.RandomState([self.seed, i]), self.scans, self.labels)
        return self._drawn[i]

    def open(self, i: int) -> Image.Image:
        """Scene ``i``, between 80 and 112 pixels a side."""
        return Image.fromarray(self.scene(i).pixels)

    def describe(self, i: int) -> str:
        """Its number."""
        return f"{self.name} scene {i}"

    def key(self, i: int) -> str:
        """A hash of its pixels and of those of its digits."""
        scene = self.scene(i)
        digest = hashlib.sha256(repr((scene.places.shape, scene.labels.tolist())).encode())
        digest.update(scene.pixels.tobytes() + scene.places.tobytes())
        return digest.hexdigest()

    def image_id(self, i: int) -> int:
        """Its number."""
        return i

    def objects(self, i: int) -> Objects:
        """Digits with boxes tight around their visible parts."""
        mask = run_length_tools()

        scene = self.scene(i)
        masks = [scene.places == place for place in range(1, len(scene.labels) + 1)]
        run_lengths = tuple(mask.encode(np.asfortranarray(each, np.uint8)) for each in masks)
        boxes = torch.tensor([_tight_box(each) for each in masks], dtype=torch.float32)
        labels = torch.from_numpy(scene.labels)
        return Objects(boxes, labels, torch.zeros(len(labels), dtype=torch.bool), run_lengths)

    def class_map(self, i: int) -> NDArray[np.uint8]:
        """0 for the background and digit + 1 on digits."""
        scene = self.scene(i)
        classes = np.concatenate([[0], scene.labels + 1]).astype(np.uint8)
        return classes[scene.places]


def read_scenes(limit: int | None) -> tuple[Scenes, Scenes]:
    """Training and test scenes, of different digits; ``limit`` draws fewer for training."""
    scans, labels, train, test = read_digits()
    count = TRAIN_SCENES if limit is None else min(limit, TRAIN_SCENES)
    return (
        Scenes(scans[train], labels[train], count, seed=0, name="training"),
        Scenes(scans[test], labels[test], TEST_SCENES, seed=1, name="test"),
    )


def _draw(random: np.random.RandomState, scans: NDArray[np.uint8], labels: NDArray[np.int64]) -> Scene:
    height, width = random.randint(_SIDES[0], _SIDES[1] + 1, 2)
    pixels = _background(random, height, width)
    places = np.zeros((height, width), np.uint8)
    drawn: list[int] = []
    areas: list[int] = []
    for _ in range(random.randint(_DIGITS_PER_SCENE[0], _DIGITS_PER_SCENE[1] + 1)):
        label = random.randint(len(DIGITS))
        of_label = np.flatnonzero(labels == label)
        side = random.randint(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1)
        ink = _ink(scans[of_label[random.randint(len(of_label))]], side)
        colour = _bright_colour(random)
        for _ in range(_TRIES):
            top, left = random.randint(height - side + 1), random.randint(width - side + 1)
            window = (slice(top, top + side), slice(left, left + side))
            tried = places.copy()
            tried[window][ink >= _INK] = len(drawn) + 1
            *visible, area = np.bincount(tried.flat, minlength=len(drawn) + 2)[1:].tolist()
            if all(count >= _LEAST_VISIBLE * whole for count, whole in zip(visible, areas, strict=True)):
                places = tried
                drawn.append(label)
                areas.append(area)
                pixels[window] = _blend(pixels[window], colour, ink)
                break
    return Scene(pixels.astype(np.uint8), places, np.array(drawn, np.int64))


def _background(random: np.random.RandomState, height: int, width: int) -> NDArray[np.int64]:
    """Dark clouds with grain, (H, W, 3)."""
    clouds = Image.fromarray(random.randint(0, 90, (5, 5, 3)).astype(np.uint8))
    grain = random.randint(-10, 11, (height, width, 1))
    smooth = np.asarray(clouds.resize((width, height), Image.Resampling.BILINEAR)).astype(np.int64)
    clouded: NDArray[np.int64] = np.clip(smooth + grain, 0, 255)
    return clouded


def _ink(scan: NDArray[np.uint8], side: int) -> NDArray[np.int64]:
    """A digit brought to ``side`` pixels, 0 to 255."""
    ink = np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BILINEAR))
    return ink.astype(np.int64)


def _bright_colour(random: np.random.RandomState) -> NDArray[np.int64]:
    """One channel full, one any, one low, in any order: never grey, never dark."""
    return random.permutation([255, random.randint(60, 256), random.randint(60, 160)])


def _blend(under: NDArray[np.int64], colour: NDArray[np.int64], ink: NDArray[np.int64]) -> NDArray[np.int64]:
    share = np.clip(2 * ink - 80, 0, 255)[..., None]
    return (under * (255 - share) + colour * share + 127) // 255


def _tight_box(mask: NDArray[np.bool_]) -> Sequence[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
