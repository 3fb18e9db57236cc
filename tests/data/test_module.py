from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from statickey.data import Augmentation, EpochBatches, ImageData, ImageDataModule, LabelledImages
from statickey.data.batches import EvenBatches
from statickey.data.pixels import channel_statistics
from statickey.errors import DataError


def images(count=40, size=8):
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count))
    return LabelledImages(pixels.to(torch.uint8), torch.arange(count) % 4)


def module(data=None, **kwargs):
    if data is None:
        data = ImageData("noise", images(), images(10), tuple("abcd"), 2, True)
    names = {field.name for field in fields(Augmentation)} & set(kwargs)
    augmentation = Augmentation(**{name: kwargs.pop(name) for name in names})
    return ImageDataModule(data, augmentation, **{"batch_size": 8} | kwargs)


def epoch(data, number, rank=0, world=1):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_order_and_augmentation_repeat_at_a_seed_and_epoch():
    first = epoch(module(seed=1), 2)
    torch.rand(7)  # what a model draws must not matter
    second = epoch(module(seed=1), 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_padding": 0, "flip": False, "auto_augment": "rand-m9-n2"},
        {"crop_padding": 0, "flip": False, "random_erasing": 1.0},
    ],
    ids=["crop", "rand", "erase"],
)
def test_augmentation_differs_between_epochs_seeds_and_images(options):
    same = ImageData(
        "same",
        LabelledImages(images(1).images.repeat(40, 1, 1, 1), torch.zeros(40).long()),
        images(),
        ("a",),
        2,
        True,
    )
    data = module(same, batch_size=36, seed=1, **options)
    first, second = epoch(data, 0)[0], epoch(data, 1)[0]
    other = epoch(module(same, batch_size=36, seed=2, **options), 0)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len({x.numpy().tobytes() for x in first}) > 10


def test_holdout_is_apart_and_the_same_for_every_seed():
    first, second = module(seed=1), module(seed=2)
    assert torch.equal(first.val_part.images, second.val_part.images)
    assert len(first.val_part.labels) == 4
    seen = {x.numpy().tobytes() for x in first.train_part.images}
    assert not any(x.numpy().tobytes() in seen for x in first.val_part.images)


def test_validation_and_test_are_plain_and_in_order():
    data = module()
    batch, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    expected = (data.data.test.images.float() / 255 - data.mean) / data.std
    assert torch.equal(batch, expected)
    assert torch.equal(labels, data.data.test.labels)


def test_normalisation_uses_training_statistics():
    part = images(30)
    mean, std = channel_statistics(part.images)
    values = part.images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean.flatten().double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.flatten().double(), values.std(1, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"auto_augment": "rand-m9-n2-mstd0.5"}], ids=["crop", "rand"])
def test_processes_share_the_batch_of_one(options):
    whole, labels = epoch(module(**options), 1)
    parts = [epoch(module(**options), 1, rank, 2) for rank in (0, 1)]
    images = torch.stack([x.reshape(-1, 4, *x.shape[1:]) for x, _ in parts], dim=1).flatten(0, 2)
    assert torch.equal(images, whole)
    assert torch.equal(torch.stack([y.reshape(-1, 4) for _, y in parts], dim=1).flatten(), labels)


def test_accumulation_splits_the_batch_and_nothing_else():
    (whole, labels), (parts, same) = epoch(module(), 1), epoch(module(grad_accum_steps=4), 1)
    assert torch.equal(whole, parts)
    assert torch.equal(labels, same)
    assert len(module(grad_accum_steps=4).train_dataloader()) == 4 * len(module().train_dataloader())


def test_mixed_labels_are_shares_that_differ_from_step_to_step():
    mixed, shares = epoch(module(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 0)
    plain, _ = epoch(module(), 0)
    assert shares.shape == (32, 4)
    torch.testing.assert_close(shares.sum(1), torch.ones(32))
    assert not torch.equal(mixed, plain)
    again, _ = epoch(module(mixup=0.8, cutmix=1.0, label_smoothing=0.1), 0)
    assert torch.equal(mixed, again)
    assert len({tuple(sorted(row.tolist())) for row in shares}) > 4


@pytest.mark.parametrize(("count", "world"), [(700, 1), (700, 2), (257, 4), (5, 4), (513, 3)])
def test_every_image_is_scored_once_in_as_many_batches_on_every_process(count, world):
    parts = [list(EvenBatches(count, rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(EvenBatches(count, 0, world))}
    assert sorted(i for part in parts for plan in part for i in plan.indices.tolist()) == list(range(count))
    assert all(len(plan.indices) for part in parts for plan in part)


WRONG = {
    "world": ({"batch_size": 9}, r"batch of 9 images does not divide into 2 processes x 1 accumulation steps"),
    "odd": ({"batch_size": 6, "mixup": 0.2}, "mixup pairs images, but 3 are computed at once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_that_do_not_fit(case):
    options, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        epoch(module(**options), 0, 0, 2)


def test_normalisation_of_the_wrong_width():
    with pytest.raises(DataError, match=r"mean=\[0.5\] has 1 numbers for images of 3 channels"):
        module(mean=[0.5])


def test_last_small_batch_is_left_out_but_a_small_set_is_used():
    assert len(EpochBatches(20, 8, 0)) == 2
    assert len(EpochBatches(5, 8, 0)) == 1


def test_too_few_images():
    with pytest.raises(DataError, match=r"holdout=0.01 of 40 training images leaves 40"):
        module(holdout=0.01)
