"""Batches of images with objects: the same however they are divided, marks that move with their pixels."""

import pytest
import torch

from scenes import COLOURS, Rectangles, rectangles
from statickey.data.detection_batches import DetectionDataModule, DetectionImages, Rescaling
from statickey.data.plan import BatchPlan
from statickey.errors import DataError


def module(**changes):
    settings = {"batch_size": 4, "rescaling": Rescaling(scale=(0.5, 1.5)), "holdout": 0.25, "masks": True}
    return DetectionDataModule(rectangles(), **settings | changes)


def same(one, other):
    (images, targets), (others, their_targets) = one, other
    assert len(images) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
    for a, b in zip(targets, their_targets, strict=True):
        assert a["seed"] == b["seed"]
        assert torch.equal(a["boxes"], b["boxes"])
        assert all(torch.equal(x, y) for x, y in zip(a["masks"], b["masks"], strict=True))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("scale", "size"), [((1.0, 1.0), None), ((0.5, 1.5), None), ((0.8, 1.2), 60)])
def test_boxes_and_masks_move_with_the_pixels(flip, scale, size):
    data = rectangles(train=6)
    images = DetectionImages(data.train, range(6), masks=True, rescaling=Rescaling(flip, scale, size, 70))
    pixels, targets = images[BatchPlan(torch.arange(6), 1)]
    checked = 0
    for image, target in zip(pixels, targets, strict=True):
        assert max(image.shape[1:]) <= 70
        for i, (box, label) in enumerate(zip(target["boxes"], target["labels"].tolist(), strict=True)):
            x1, y1, x2, y2 = box.tolist()
            assert 0 <= x1 < x2 <= image.shape[2]
            assert 0 <= y1 < y2 <= image.shape[1]
            share = target["masks"].in_regions(box[None], torch.tensor([i]), 8)
            assert share[:, 1:-1, 1:-1].min() > 0.9
            if i == len(target["boxes"]) - 1 and len(target["boxes"]) < 3:  # nothing lies on top of it
                centre = image[:, round((y1 + y2) / 2), round((x1 + x2) / 2)].float()
                checked += bool((centre - torch.tensor(COLOURS[label])).abs().max() < 20)
    assert checked >= 2


def test_crowds_are_not_learned_and_images_may_be_empty():
    data = rectangles(train=40)
    _, targets = DetectionImages(data.train, range(40), masks=True, rescaling=Rescaling())[
        BatchPlan(torch.arange(40), 0)
    ]
    marked = [data.train.objects(i) for i in range(40)]
    assert any(own.crowd.any() for own in marked)
    for own, target in zip(marked, targets, strict=True):
        assert len(target["boxes"]) == len(target["masks"].windows) == int((~own.crowd).sum())
    assert targets[3]["boxes"].shape == (0, 4)


def test_an_objects_draws_differ_between_images_and_epochs():
    plan = module().plan()
    first = next(iter(plan))
    plan.set_epoch(1)
    assert next(iter(plan)).seed != first.seed
    images, targets = module().train_images[first]
    assert len({image.shape for image in images}) > 1
    assert len({target["seed"] for target in targets}) == 4


def test_two_processes_or_steps_make_one_batch():
    whole = list(map(module().train_images.__getitem__, module().plan()))
    parts = [list(map(module().train_images.__getitem__, module().plan(rank, 2))) for rank in (0, 1)]
    steps = list(map(module().train_images.__getitem__, module(grad_accum_steps=2).plan()))
    assert len(whole) == 2
    for i, batch in enumerate(whole):
        same(batch, tuple(a + b for a, b in zip(parts[0][i], parts[1][i], strict=True)))
        same(batch, tuple(a + b for a, b in zip(steps[2 * i], steps[2 * i + 1], strict=True)))


def test_loader_workers_change_nothing():
    alone, helped = (list(module(num_workers=n).train_dataloader()) for n in (0, 1))
    for one, other in zip(alone, helped, strict=True):
        same(one.content, other.content)


def test_images_are_normalised_and_scored_as_marked():
    made = module()
    images, targets = made.on_after_batch_transfer(next(iter(made.scoring_dataloader("test"))), 0)
    assert len(images) == 4
    pixels = torch.tensor([255.0, 0, 0]).view(3, 1, 1) / 255
    assert (images[0] - (pixels - made.mean) / made.std).abs().amin() < 1e-6
    assert [target["image_id"] for target in targets] == [100, 101, 102, 103]
    assert "seed" not in targets[0]
    assert len(targets[0]["masks"]) == len(targets[0]["crowd"]) == len(targets[0]["boxes"])


def test_evaluation_goes_through_few_images_at_once():
    made = DetectionDataModule(rectangles(test=20), batch_size=2, rescaling=Rescaling(), masks=True)
    assert [len(images) for images, _ in made.scoring_dataloader("test")] == [8, 8, 4]


def test_bad_normalisation_is_refused():
    with pytest.raises(DataError, match="2 numbers for images of 3 channels"):
        module(mean=(0.5, 0.5))


class Broken(Rectangles):
    """Image 1 cannot be read."""

    def open(self, i):
        if i == 1:
            raise DataError("image 1 is broken")
        return super().open(i)


def test_an_image_that_cannot_be_read():
    pictures, plan = Broken(4, 0), BatchPlan(torch.arange(3), 5)
    for rescaling in (Rescaling(), None):
        with pytest.raises(DataError, match="image 1 is broken"):
            DetectionImages(pictures, range(4), masks=True, rescaling=rescaling)[plan]
    skipping = {"masks": True, "on_bad_sample": "skip"}
    with pytest.warns(UserWarning, match="image 1 is broken; the next one takes its place"):
        images, targets = DetectionImages(pictures, range(4), rescaling=Rescaling(), **skipping)[plan]
    instead = DetectionImages(pictures, range(4), rescaling=Rescaling(), masks=True)[
        BatchPlan(torch.tensor([2]), 5, 1)
    ]
    assert len(images) == 3 and images[1].equal(instead[0][0]) and targets[1]["seed"] == instead[1][0]["seed"]
    with pytest.warns(UserWarning, match="left out"):
        _, targets = DetectionImages(pictures, range(4), **skipping)[plan]
    assert [target["image_id"] for target in targets] == [100, 102]
