import pytest
import torch

from statickey.data import EpochBatches, ImageData, ImageDataModule, LabelledImages
from statickey.data.module import channel_statistics, random_crop
from statickey.errors import DataError


def images(count=40, size=8):
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count))
    return LabelledImages(pixels.to(torch.uint8), torch.arange(count) % 4)


def module(**kwargs):
    data = ImageData("noise", images(), images(10), tuple("abcd"), 2, True)
    return ImageDataModule(data, **{"batch_size": 8} | kwargs)


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_order_and_augmentation_repeat_at_a_seed_and_epoch():
    first = epoch(module(seed=1).train_dataloader(), 2)
    torch.rand(7)  # what a model draws must not matter
    second = epoch(module(seed=1).train_dataloader(), 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_augmentation_differs_between_epochs_seeds_and_images():
    same = ImageData(
        "same",
        LabelledImages(images(1).images.repeat(40, 1, 1, 1), torch.zeros(40).long()),
        images(),
        ("a",),
        2,
        True,
    )
    loader = ImageDataModule(same, batch_size=36, seed=1).train_dataloader()
    first, second = epoch(loader, 0)[0], epoch(loader, 1)[0]
    other = epoch(ImageDataModule(same, batch_size=36, seed=2).train_dataloader(), 0)[0]
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
    batch, labels = next(iter(data.test_dataloader()))
    expected = (data.data.test.images.float() / 255 - data.mean) / data.std
    assert torch.equal(batch, expected)
    assert torch.equal(labels, data.data.test.labels)


def test_normalisation_uses_training_statistics():
    part = images(30)
    mean, std = channel_statistics(part.images)
    values = part.images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean.flatten().double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.flatten().double(), values.std(1, correction=0), rtol=1e-5, atol=1e-6)


def test_random_crop_shifts_each_image_by_whole_pixels():
    source = images(64, 6).images
    out = random_crop(source, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
    offsets = set()
    for original, crop in zip(padded, out, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(original[:, y : y + 6, x : x + 6], crop)]
        assert found
        offsets.update(found)
    assert len(offsets) > 15
    assert random_crop(source, 0, torch.Generator()) is source


def test_last_small_batch_is_left_out_but_a_small_set_is_used():
    assert len(EpochBatches(20, 8, 0)) == 2
    assert len(EpochBatches(5, 8, 0)) == 1


def test_too_few_images():
    with pytest.raises(DataError, match=r"holdout=0.01 of 40 training images leaves 40"):
        module(holdout=0.01)
