from types import SimpleNamespace

import torch

from statickey.data import PlannedDataModule, hold_out


class Boxes:
    """Images of different sizes with target dicts, as detectors take them."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, plan):
        images = [torch.full((3, 4 + i, 5), i, dtype=torch.uint8) for i in plan.indices.tolist()]
        targets = [{"boxes": torch.full((i, 4), i), "name": f"{i}", "labels": ()} for i in plan.indices.tolist()]
        return images, targets


class Module(PlannedDataModule):
    def prepare_training_batch(self, batch, seed, first):
        return batch, seed, first


def ids(batch):
    images, targets = batch
    assert isinstance(batch, tuple)
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (3, 4 + int(target["name"]), 5)
        assert target["boxes"].shape == (int(target["name"]), 4)
        assert target["labels"] == ()
    return [int(target["name"]) for target in targets]


def test_lists_and_dicts_pass_through_untouched():
    data = PlannedDataModule(Boxes(8), Boxes(3), Boxes(5), batch_size=4)
    seen = [ids(data.on_after_batch_transfer(batch, 0)) for batch in data.train_dataloader()]
    assert [len(part) for part in seen] == [4, 4]
    assert sorted(i for part in seen for i in part) == list(range(8))
    test, held_out = data.scoring_dataloader("test"), data.scoring_dataloader("holdout")
    for loader, count in ((data.val_dataloader(), 3), (test, 5), (held_out, 3)):
        assert [ids(data.on_after_batch_transfer(batch, 0)) for batch in loader] == [list(range(count))]


def test_parts_of_a_batch_know_its_seed_and_their_place():
    def parts(steps, rank=0, world=1):
        data = Module(Boxes(12), Boxes(3), Boxes(5), batch_size=8, seed=3, grad_accum_steps=steps)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        return [(ids(batch), seed, first) for batch, seed, first in batches]

    ((whole, seed, _),) = parts(1)
    assert parts(2) == [(whole[:4], seed, 0), (whole[4:], seed, 4)]
    assert parts(2, rank=1, world=2) == [(whole[2:4], seed, 2), (whole[6:], seed, 6)]


def test_held_out_and_training_images_are_all():
    held_out, rest = hold_out(40, 0.1)
    assert len(held_out) == 4
    assert sorted([*held_out.tolist(), *rest.tolist()]) == list(range(40))
    assert torch.equal(held_out, hold_out(40, 0.1)[0])
