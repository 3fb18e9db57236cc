"""Batches of images with objects: the same however they are divided, marks that move with their pixels."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as run_lengths
from PIL import Image, ImageDraw
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from scenes import COLOURS, Rectangles, rectangles
from statickey.data.annotations import ObjectPictures, Objects
from statickey.data.detection_batches import DetectionDataModule, DetectionImages, Rescaling
from statickey.data.plan import BatchPlan
from statickey.errors import DataError, StaticKeyError
from statickey.tasks.detection import Detection, DetectionRecipe


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


class Polygons(ObjectPictures):
    """Each image has two triangles, marked by polygons and the tightest boxes around them."""

    size = 180, 240  # height, width

    def __len__(self):
        return 20

    def corners(self, i):
        random = np.random.default_rng(i)
        height, width = self.size
        at = random.uniform((0, 0), (width - 120, height - 120), (2, 2))
        return [place + random.uniform(0, 40, (3, 2)) + np.array([[0, 0], [80, 0], [20, 80]]) for place in at]

    def open(self, i):
        return Image.fromarray(np.zeros((*self.size, 3), np.uint8))

    def objects(self, i):
        drawn = self.corners(i)
        boxes = torch.tensor([[*own.min(0), *own.max(0)] for own in drawn], dtype=torch.float32)
        masks = tuple(run_lengths.segmToRle([own.flatten().tolist()], *self.size[::-1]) for own in drawn)
        return Objects(boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), masks)

    def describe(self, i):
        return f"image {i}"

    def key(self, i):
        return str(i)

    def image_id(self, i):
        return i


def whole_masks(target, shape):
    """The masks of a target, (n, H, W)."""
    masks = torch.zeros(len(target["boxes"]), *shape, dtype=torch.bool)
    (windows, pixels), first = target["masks"], 0
    for mask, (x1, y1, x2, y2) in zip(masks, windows.tolist(), strict=True):
        end = first + (x2 - x1) * (y2 - y1)
        mask[y1:y2, x1:x2] = pixels[first:end].view(y2 - y1, x2 - x1)
        first = end
    return masks


def moved(corners, shape, flip, factor, crop):
    """Where the corners of a polygon come to lie, computed for themselves."""
    height, width = shape
    x, y = corners.T
    x = width - x if flip else x
    size = round(height * factor), round(width * factor)
    return np.stack([x * size[1] / width - crop[1], y * size[0] / height - crop[0]], 1)


CHANGES = {
    "as it is": Rescaling(False),
    "flip": Rescaling(True),
    "smaller": Rescaling(True, (0.5, 0.9)),
    "larger": Rescaling(True, (1.1, 2.0)),
    "crop": Rescaling(True, crop_size=100),
    "jitter": Rescaling(True, (0.1, 2.0), 220, 240, crop_size=160),
}


@pytest.mark.parametrize("change", CHANGES)
def test_masks_and_boxes_are_those_of_the_moved_polygons(change):
    rescaling, pictures = CHANGES[change], Polygons()
    images, targets = DetectionImages(pictures, range(20), masks=True, rescaling=rescaling)[
        BatchPlan(torch.arange(20), 3)
    ]
    learned = left_out = 0
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        height, width = image.shape[1:]
        flip, factor, crop = draws(rescaling, pictures.size, target["seed"])
        masks = whole_masks(target, (height, width))
        found = dict(zip(target["labels"].tolist(), zip(target["boxes"].tolist(), masks, strict=True), strict=True))
        for label, corners in enumerate(pictures.corners(i)):
            polygon = moved(corners, pictures.size, flip, factor, crop)
            canvas = Image.new("L", (4 * width, 4 * height))
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in 4 * polygon], fill=1)
            share = torch.from_numpy(np.asarray(canvas, np.float32)).view(height, 4, width, 4).mean((1, 3))
            if label not in found:
                left_out += 1
                assert share.sum() < 2 or factor < 0.15  # next to nothing of it is left
                continue
            box, mask = found[label]
            assert mask.any()
            x1, y1, x2, y2 = np.clip([*polygon.min(0), *polygon.max(0)], 0, [width, height, width, height])
            assert box == pytest.approx([x1, y1, x2, y2], abs=0.01)
            if share.sum() > 600:
                expected = share > 0.5
                assert (mask & expected).sum() / (mask | expected).sum() > 0.9
                learned += 1
    assert learned > 10
    assert (left_out > 0) == (change in ("crop", "jitter"))


def draws(rescaling, shape, seed):
    """What a seed stands for: a flip, the factor from the stored to the scaled image, and the crop's corner."""
    generator = torch.Generator().manual_seed(seed)
    flip = rescaling.flip and float(torch.rand((), generator=generator)) < 0.5
    factor = rescaling.scale[0] + (rescaling.scale[1] - rescaling.scale[0]) * float(
        torch.rand((), generator=generator)
    )
    if rescaling.min_size is not None:
        factor *= min(rescaling.min_size / min(shape), rescaling.max_size / max(shape))
    if rescaling.crop_size is None:
        return flip, factor, (0, 0)
    free = [max(round(extent * factor) - rescaling.crop_size, 0) for extent in shape]
    places = torch.rand(2, generator=generator).tolist()
    return flip, factor, tuple(int(place * (room + 1)) for place, room in zip(places, free, strict=True))


def test_boxes_are_tight_around_masks_that_were_not_cut():
    rescaling = Rescaling(True, (0.5, 1.5))
    images, targets = DetectionImages(Polygons(), range(20), masks=True, rescaling=rescaling)[
        BatchPlan(torch.arange(20), 4)
    ]
    for image, target in zip(images, targets, strict=True):
        tight = masks_to_boxes(whole_masks(target, image.shape[1:])) + torch.tensor([0, 0, 1, 1])
        assert (tight - target["boxes"]).abs().max() <= 2


def test_a_crop_is_drawn_last_and_bounds_what_is_scaled_beyond_the_longest_side():
    whole, cropped = (Rescaling(True, (0.1, 2.0), 1000, 1000, size) for size in (None, 1000))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    image = tv_tensors.Image(torch.zeros(3, 50, 100, dtype=torch.uint8))
    sizes = []
    for _ in range(40):
        sizes.append(cropped.draw(50, 100, generators[0])(image).shape[1:])
        whole.draw(50, 100, generators[1])
        torch.rand(2, generator=generators[1])
        assert generators[0].get_state().equal(generators[1].get_state())
    heights, widths = zip(*sizes, strict=True)
    assert max(widths) == 1000 and min(widths) < 400
    assert 900 < max(heights) <= 1000  # 500 before it is scaled


def test_a_recipe_hands_its_crop_over():
    recipe = DetectionRecipe(img_size=64, max_size=80, scale=(0.1, 2.0), crop_size=72)
    made = Detection().data_module(recipe, rectangles(), 0)
    assert made.train_images.rescaling == Rescaling(True, (0.1, 2.0), 64, 80, 72)
    with pytest.raises(StaticKeyError, match="crop_size=0 must be a positive integer"):
        DetectionRecipe(crop_size=0)


def test_no_object_may_be_left_in_a_crop():
    images, targets = DetectionImages(
        Polygons(), range(20), masks=True, rescaling=Rescaling(scale=(2.0, 2.0), crop_size=8)
    )[BatchPlan(torch.arange(20), 0)]
    empty = [target for target in targets if not len(target["labels"])]
    assert empty
    for target in empty:
        assert target["boxes"].shape == (0, 4) and len(target["masks"].windows) == 0
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 8, 8)
        assert whole_masks(target, (8, 8)).flatten(1).any(1).all()


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


@pytest.mark.parametrize("crop_size", [None, 30])
def test_two_processes_or_steps_make_one_batch(crop_size):
    made = module(rescaling=Rescaling(scale=(0.5, 1.5), crop_size=crop_size))
    whole = list(map(made.train_images.__getitem__, made.plan()))
    parts = [list(map(made.train_images.__getitem__, made.plan(rank, 2))) for rank in (0, 1)]
    steps = list(map(made.train_images.__getitem__, module(grad_accum_steps=2).plan()))
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
