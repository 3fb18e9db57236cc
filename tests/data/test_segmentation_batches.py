import numpy as np
import pytest
import torch
from PIL import Image

from statickey.data import IGNORE_INDEX, BatchPlan, MapPictures, SegmentationData, SegmentationDataModule
from statickey.data.segmentation_batches import resized_image
from statickey.errors import DataError


class Squares(MapPictures):
    """Images whose red channel is 100 times their class: 0 on the left, 1 on the right."""

    def __init__(self, count=6, size=(40, 60), bad=()):
        self.count, self.size, self.bad = count, size, bad

    def __len__(self):
        return self.count

    def open(self, i):
        if i in self.bad:
            raise DataError(f"picture {i} is broken")
        pixels = np.zeros((*self.size, 3), np.uint8)
        pixels[..., 0] = 100 * self.class_map(i)
        pixels[..., 1] = i
        return Image.fromarray(pixels)

    def describe(self, i):
        return f"picture {i}"

    def key(self, i):
        return str(i)

    def class_map(self, i):
        classes = np.zeros(self.size, np.uint8)
        classes[:, self.size[1] // 2 :] = 1
        return classes


def module(train=None, test=None, **options):
    data = SegmentationData("squares", ("left", "right"), train or Squares(), test or Squares(3))
    defaults = {"crop_size": 32, "batch_size": 4, "holdout": 0.2}
    return SegmentationDataModule(data, **defaults | options)


def test_crops_and_maps_stay_together():
    batch, seed, first = next(iter(module(scale=(1.0, 1.0)).train_dataloader()))
    images, maps = batch
    assert images.shape == (4, 3, 32, 32) and maps.shape == (4, 32, 32) and images.dtype == maps.dtype == torch.uint8
    assert torch.equal(images[:, 0], 100 * maps)
    normalised, classes = module().prepare_training_batch(batch, seed, first)
    assert normalised.dtype == torch.float32 and classes.dtype == torch.int64


def test_draws_are_of_the_plan_alone():
    own = module().train_images
    plan = BatchPlan(torch.arange(4), 7)
    whole = own[plan]
    torch.rand(3)
    parts = [own[BatchPlan(plan.indices[i : i + 2], 7, i)] for i in (0, 2)]
    for kind in (0, 1):
        assert whole[kind].equal(torch.cat([part[kind] for part in parts]))
    assert not whole[0].equal(own[plan._replace(seed=8)][0])
    twice, _ = own[BatchPlan(torch.tensor([1, 1]), 7)]
    assert not twice[0].equal(twice[1])  # each place has draws of its own


def test_padding_is_not_learned_from():
    images, maps = module(crop_size=64, scale=(0.5, 0.5)).train_images[BatchPlan(torch.arange(2), 0)]
    padded = maps == IGNORE_INDEX
    assert padded.float().mean() > 0.8
    colours = images.permute(0, 2, 3, 1)[padded].unique(dim=0)
    assert colours.tolist() == [[124, 116, 104]]  # ImageNet's mean


def test_scale_and_flip():
    scaled = [module(scale=(2.0, 2.0)).train_images[BatchPlan(torch.tensor([0]), s)][1] for s in range(12)]
    assert all((m != IGNORE_INDEX).all() for m in scaled)
    turned = module(crop_size=60, scale=(1.0, 1.0)).train_images
    ways = {int(turned[BatchPlan(torch.tensor([0]), s)][1][0, 30, 0]) for s in range(12)}
    assert ways == {0, 1}
    still = module(crop_size=60, scale=(1.0, 1.0), flip=False).train_images
    assert {int(still[BatchPlan(torch.tensor([0]), s)][1][0, 30, 0]) for s in range(12)} == {0}


def test_whole_images_keep_their_maps():
    own = module(img_size=20)
    images, maps = own.test_images[BatchPlan(torch.arange(2), 0)]
    assert [tuple(image.shape) for image in images] == [(3, 20, 30)] * 2 and maps[0].shape == (40, 60)
    assert len(list(own.scoring_dataloader("test"))) == 3  # one by one: they may differ in size
    assert resized_image(torch.zeros(3, 10, 20, dtype=torch.uint8), None).shape == (3, 10, 20)


def test_bad_samples():
    bad = Squares(bad=(0, 1))
    with pytest.raises(DataError, match="picture 0 is broken"):
        module(bad, holdout=0.01 + 1 / 6).train_images[BatchPlan(torch.arange(5), 0)]
    skipping = module(bad, on_bad_sample="skip")
    with pytest.warns(UserWarning, match="is broken; the next one takes its place"):
        images, _ = skipping.train_images[BatchPlan(torch.arange(4), 0)]
    assert len(images) == 4
    tests = module(test=Squares(3, bad=(1,)), on_bad_sample="skip").test_images
    with pytest.warns(UserWarning, match="left out"):
        assert len(tests[BatchPlan(torch.arange(3), 0)][0]) == 2
    with pytest.raises(DataError, match="none of 1 images"), pytest.warns(UserWarning):
        tests[BatchPlan(torch.tensor([1]), 0)]
    with pytest.raises(DataError, match="no readable image left"), pytest.warns(UserWarning):
        module(Squares(bad=range(6)), on_bad_sample="skip").train_images[BatchPlan(torch.tensor([0]), 0)]


def test_sizes_must_agree():
    class Cut(Squares):
        def class_map(self, i):
            return super().class_map(i)[:-1]

        def open(self, i):
            return Image.new("RGB", (60, 40))

    with pytest.raises(DataError, match="picture 0 is 60x40 pixels, its map of classes 60x39"):
        module(test=Cut()).test_images[BatchPlan(torch.tensor([0]), 0)]
