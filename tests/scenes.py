"""Coloured rectangles with their marks: data for tests of detectors."""

import numpy as np
import torch
from faster_coco_eval.core import mask as run_lengths
from PIL import Image

from statickey.data.annotations import DetectionData, ObjectPictures, Objects

COLOURS = ((255, 0, 0), (0, 0, 255))


class Rectangles(ObjectPictures):
    """Each image has one to three rectangles, but every fourth none; red is class 0, blue 1; the last is a crowd."""

    def __init__(self, count, seed, *, masks=True, side=48):
        self.count, self.seed, self.masks, self.side = count, seed, masks, side

    def __len__(self):
        return self.count

    def _drawn(self, i):
        random = np.random.default_rng((self.seed, i))
        height, width = self.side, self.side - 8 * (i % 2)
        pixels = random.integers(0, 60, (height, width, 3)).astype(np.uint8)
        boxes, labels, masks = [], [], []
        for _ in range(0 if i % 4 == 3 else random.integers(1, 4)):
            w, h = random.integers(10, 24, 2)
            x, y = random.integers(0, width - w), random.integers(0, height - h)
            label = int(random.integers(0, 2))
            pixels[y : y + h, x : x + w] = COLOURS[label]
            mask = np.zeros((height, width), np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
            masks.append(run_lengths.encode(mask))
        return pixels, boxes, labels, masks

    def open(self, i):
        return Image.fromarray(self._drawn(i)[0])

    def objects(self, i):
        _, boxes, labels, masks = self._drawn(i)
        crowd = torch.zeros(len(labels), dtype=torch.bool)
        if len(labels) == 3:
            crowd[-1] = True
        return Objects(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            crowd,
            tuple(masks) if self.masks else None,
        )

    def image_id(self, i):
        return 100 + i

    def describe(self, i):
        return f"image {i}"

    def key(self, i):
        return f"{self.seed} {i}"


def rectangles(*, masks=True, train=12, test=4, side=48):
    parts = Rectangles(train, 0, masks=masks, side=side), Rectangles(test, 1, masks=masks, side=side)
    return DetectionData("rectangles", ("red", "blue"), *parts, has_masks=masks, category_ids=(3, 7))


def assert_drawn_from_seeds(model, images, targets):
    """A detector's losses depend on what the targets' seeds say, not on the state of torch's generator."""

    def losses(targets, state):
        torch.manual_seed(state)
        return torch.stack(list(model(images, targets).values()))

    state = torch.manual_seed(5).get_state()
    first = losses(targets, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, losses(targets, 6))
    assert not torch.equal(first, losses([target | {"seed": 9} for target in targets], 5))
    unseeded = [{k: v for k, v in target.items() if k != "seed"} for target in targets]
    assert not torch.equal(losses(unseeded, 5), losses(unseeded, 6))
