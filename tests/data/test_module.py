from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch

from image_folders import make_folder
from statickey.data import Augmentation, EpochBatches, ImageData, ImageDataModule, LabelledImages, open_stream
from statickey.data.batches import even_batches
from statickey.data.pixels import channel_statistics
from statickey.errors import DataError, StaticKeyError


def images(count=40, size=8):
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(count))
    return LabelledImages(pixels.to(torch.uint8), torch.arange(count) % 4)


def module(data=None, **kwargs):
    if data is None:
        data = ImageData("noise", images(), images(10), tuple("abcd"), 2, True)
    names = {field.name for field in fields(Augmentation)} & set(kwargs)
    augmentation = Augmentation(**{name: kwargs.pop(name) for name in names})
    return ImageDataModule(data, augmentation, **{"batch_size": 8} | kwargs)


def batches(data, number, rank=0, world=1):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def epoch(data, number, rank=0, world=1):
    rows = batches(data, number, rank, world)
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


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
    batch, labels = data.on_after_batch_transfer(next(iter(data.scoring_dataloader("test"))), 0)
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


EVERYTHING = {
    "crop_padding": 2,
    "flip": True,
    "auto_augment": "rand-m9-n2-mstd0.5",
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


def parts_of(world, **options):
    """What ``world`` processes see, put together in the order of the whole batches."""
    ranks = [batches(module(**options), 1, rank, world) for rank in range(world)]
    rows = [row for parts in zip(*ranks, strict=True) for row in parts]
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


@pytest.mark.parametrize("erasing", [{}, {"random_erasing": 0.5}], ids=["kept", "erased"])
@pytest.mark.parametrize("mix", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize(("world", "steps"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_a_part_is_augmented_as_in_the_whole_batch(world, steps, mix, erasing):
    options = EVERYTHING | {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0} | mix | erasing
    whole, labels = parts_of(1, **options)
    images, same = parts_of(world, grad_accum_steps=steps, **options)
    assert torch.equal(images, whole)
    assert torch.equal(same, labels)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_part_of_a_streamed_batch_is_augmented_as_in_the_whole(tmp_path, steps):
    data = open_stream(str(make_folder(tmp_path, per_class=20, size=(10, 12))), img_size=8)
    options = EVERYTHING | {"crop_padding": None}
    whole, labels = parts_of(1, data=data, **options)
    images, same = parts_of(1, data=data, grad_accum_steps=steps, **options)
    assert torch.equal(images, whole)
    assert torch.equal(same, labels)


def test_neighbours_are_mixed_with_one_share_in_a_batch():
    plain = {"crop_padding": 0, "flip": False, "label_smoothing": 0.0}
    whole, labels = epoch(module(**plain), 0)
    mixed, shares = epoch(module(mixup=0.8, **plain), 0)
    classes = torch.nn.functional.one_hot(labels, 4).float()
    seen = []
    for start in range(0, len(whole), 8):
        rows = slice(start, start + 8)
        pairs = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
        x, other = whole[rows], whole[rows][pairs]
        lam = ((mixed[rows] - other) * (x - other)).sum() / (x - other).square().sum()
        torch.testing.assert_close(mixed[rows], lam * x + (1 - lam) * other, rtol=1e-4, atol=1e-5)
        expected = lam * classes[rows] + (1 - lam) * classes[rows][pairs]
        torch.testing.assert_close(shares[rows], expected, rtol=1e-4, atol=1e-5)
        seen.append(round(lam.item(), 4))
    assert len(set(seen)) == len(seen) == 4


def test_erasing_fills_rectangles_of_some_images_with_noise():
    plain = {"crop_padding": 0, "flip": False}
    whole, _ = epoch(module(**plain), 0)
    erased, _ = epoch(module(random_erasing=0.5, **plain), 0)
    changed = (whole != erased).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.8
    noise = erased[whole != erased]
    assert abs(noise.mean()) < 0.3
    assert 0.7 < noise.std() < 1.3
    assert not torch.equal(epoch(module(random_erasing=0.5, **plain), 1)[0], erased)


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
    parts = [even_batches(count, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for plan in part for i in plan.indices.tolist()) == list(range(count))
    assert all(len(plan.indices) for part in parts for plan in part)


@pytest.mark.parametrize(("count", "world"), [(700, 1), (700, 3), (257, 2), (2, 4)])
def test_processes_score_every_image_once_in_order(count, world):
    data = module(ImageData("noise", images(), images(count), tuple("abcd"), 2, True))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    seen = []
    for rank in range(world):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)
        seen += [x for x, _ in data.scoring_dataloader("test")]
    assert torch.equal(torch.cat(seen), images(count).images)
    assert all(0 < len(x) <= 256 for x in seen)
    assert sum(len(y) for _, y in module().scoring_dataloader("holdout")) == 4


WRONG = {
    "world": ({"batch_size": 9}, r"batch of 9 images does not divide into 2 processes x 1 accumulation steps"),
    "odd": ({"batch_size": 6, "mixup": 0.2}, "mixup pairs images, but 3 are computed at once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_that_do_not_fit(case):
    options, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        epoch(module(**options), 0, 0, 2)


STATISTICS = {
    "width": ({"mean": [0.5]}, r"mean=\[0.5\] has 1 numbers for images of 3 channels"),
    "one number": ({"std": 0.5}, "std=0.5 must be 3 numbers, one for each channel"),
    "text": ({"mean": "0.5"}, "mean='0.5' must be 3 numbers"),
    "texts": ({"mean": ["a", "b", "c"]}, r"mean=\['a', 'b', 'c'\] must hold finite numbers"),
    "nan": ({"mean": (0.5, float("nan"), 0.5)}, r"mean=\[0.5, nan, 0.5\] must hold finite numbers"),
    "infinite": ({"std": (0.5, float("inf"), 0.5)}, "must hold finite numbers"),
    "zero": ({"std": (0.5, 0, 0.5)}, r"std=\[0.5, 0, 0.5\] must be positive"),
    "negative": ({"std": (0.5, -0.1, 0.5)}, "must be positive: images are divided by it"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_normalisation_that_cannot_be(case):
    options, message = STATISTICS[case]
    with pytest.raises(DataError, match=message):
        module(**options)


def test_normalisation_as_given():
    data = module(mean=(-0.1, 0, 1), std=[1, 2, 0.5])
    assert data.mean.flatten().tolist() == torch.tensor([-0.1, 0, 1]).tolist()
    assert data.std.flatten().tolist() == [1, 2, 0.5]
    assert data.mean.dtype == data.std.dtype == torch.float32


AUGMENTATION = {
    "padding": ({"crop_padding": -1}, "crop_padding=-1 must not be negative; 0 switches"),
    "half a pixel": ({"crop_padding": 1.5}, "crop_padding=1.5 must be a whole number"),
    "padding of the image": ({"crop_padding": 8}, "crop_padding=8 lets a crop miss its image of 8 pixels"),
    "flip": ({"flip": "no"}, "flip='no' must be true or false"),
    "flip by number": ({"flip": 1}, "flip=1 must be true or false"),
    "policy": ({"auto_augment": "v0"}, "'v0' is not known"),
    "erasing": ({"random_erasing": 1.5}, r"random_erasing=1.5 must be in \[0, 1\]"),
    "erasing nan": ({"random_erasing": float("nan")}, r"random_erasing=nan must be in \[0, 1\]"),
    "mixup": ({"mixup": -0.1}, "mixup=-0.1 must not be negative"),
    "mixup nan": ({"mixup": float("nan")}, "mixup=nan must be a finite number"),
    "cutmix": ({"cutmix": float("inf")}, "cutmix=inf must be a finite number"),
    "cutmix text": ({"cutmix": "1"}, "cutmix='1' must be a finite number"),
    "smoothing": ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
    "smoothing text": ({"label_smoothing": "0.1"}, r"label_smoothing='0.1' must be in \[0, 1\)"),
}


@pytest.mark.parametrize("case", AUGMENTATION)
def test_augmentation_that_cannot_be(case):
    options, message = AUGMENTATION[case]
    with pytest.raises(StaticKeyError, match=message):
        module(**options)


def test_augmentation_at_its_limits():
    data = module(crop_padding=7, flip=False, random_erasing=1, mixup=0, cutmix=2, label_smoothing=0)
    assert (data.crop_padding, data.flip) == (7, False)
    assert module().crop_padding == 2
    assert module().flip


@dataclass(frozen=True, kw_only=True)
class Choices(Augmentation):
    """As a recipe, which holds more than augmentation."""

    epochs: int = 3

    def __post_init__(self):
        super().__post_init__()
        if self.epochs < 1:
            raise DataError(f"epochs={self.epochs}")


def test_a_class_that_inherits_the_choices_is_one():
    data = ImageData("noise", images(), images(10), tuple("abcd"), 2, True)
    assert ImageDataModule(data, Choices(epochs=5, crop_padding=3), batch_size=8).crop_padding == 3
    assert replace(Choices(), mixup=0.5).mixup == 0.5
    with pytest.raises(StaticKeyError, match="mixup=-1"):
        Choices(mixup=-1)


def test_padding_of_streamed_images(tmp_path):
    data = open_stream(str(make_folder(tmp_path, per_class=20)), img_size=8)
    with pytest.raises(DataError, match="crop_padding=1 is for images in memory"):
        module(data, crop_padding=1)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_holdout_is_a_share(share):
    with pytest.raises(DataError, match=rf"holdout={share} must be in \(0, 1\)"):
        module(holdout=share)


def test_last_small_batch_is_left_out_but_a_small_set_is_used():
    assert len(EpochBatches(20, 8, 0)) == 2
    assert len(EpochBatches(5, 8, 0)) == 1


def test_too_few_images():
    with pytest.raises(DataError, match=r"holdout=0.01 of 40 training images leaves 40"):
        module(holdout=0.01)
