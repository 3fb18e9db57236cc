"""A batch divided among processes or into parts has the losses of the whole."""

import pytest
import torch

from statickey.data import IGNORE_INDEX
from statickey.models import ARCHS, MaskWindows, build_detector
from statickey.tasks import Segmentation, SegmentationRecipe

VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2}
BOXES = ([[4, 4, 30, 30], [20, 10, 40, 60], [8, 30, 20, 50]], [], [[30, 30, 60, 62]])


def picture(boxes, seed):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 64, 64)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": MaskWindows.cut(masks), "seed": seed}
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)), target


def of_parts(losses, *parts):
    """The losses of a batch in parts, as gradients of processes and parts are averaged."""
    whole = sum(len(part) for part in parts)
    found = [losses(part) for part in parts]
    return {
        name: sum(len(part) / whole * own[name] for part, own in zip(parts, found, strict=True)) for name in found[0]
    }


def assert_divisible(losses, samples):
    whole = losses(samples)
    for parts in ([samples[:1], samples[1:]], [[sample] for sample in samples]):
        for name, value in of_parts(losses, *parts).items():
            torch.testing.assert_close(
                value, whole[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.endswith("rcnn")])  # others say so
def test_detectors(arch):
    model = build_detector(
        "small_vit",
        "ska",
        arch=arch,
        img_size=64,
        num_classes=3,
        channels=8,
        anchor_size=8,
        min_size=None,
        model_args=VIT,
    ).train()
    model.rpn.nms_thresh = 0.3  # so that images have different numbers of regions
    samples = [picture(boxes, seed) for seed, boxes in enumerate(BOXES)]
    with torch.no_grad():
        assert_divisible(lambda part: model(*map(list, zip(*part, strict=True))), samples)


def test_segmenters():
    task, recipe = Segmentation(), SegmentationRecipe(loss=("cross_entropy", "dice", "focal"))
    maps = torch.randint(0, 4, (3, 16, 16))
    maps[1, 4:] = IGNORE_INDEX
    maps[2] = 3
    maps[2, :8] = IGNORE_INDEX
    model = torch.nn.Conv2d(3, 4, 1)

    def losses(part):
        images, classes = map(torch.stack, zip(*part, strict=True))
        return task.losses(model, (images, classes), recipe)

    with torch.no_grad():
        assert_divisible(losses, list(zip(torch.randn(3, 3, 16, 16), maps, strict=True)))
        only = losses([(torch.zeros(3, 16, 16), maps[2])])["dice"]
        share = torch.softmax(model.bias, 0)[3]
        torch.testing.assert_close(only, 1 - 2 * share / (1 + share))  # of the one class it shows, not of all
