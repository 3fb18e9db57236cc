"""Cascade R-CNN's heads against a case computed by hand."""

from math import log

import pytest
import torch
from torch import nn

from statickey.models.cascade import CascadeHeads

SHAPES = [(30, 30)]
OBJECT = torch.tensor([[0.0, 0, 10, 10]])
PROPOSALS = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 5.5], [20, 20, 30, 30]])
"""They overlap the object by 0.8, 0.55 and 0."""
MOVED = torch.tensor([[1.0, 0, 11, 8], [1, 0, 11, 5.5], [21, 20, 30, 30], [1, 0, 11, 10]])
"""The proposals and the object, a tenth of their width further and clipped: overlaps 2/3, 0.469, 0 and 0.818."""
FURTHER = [[10.0, 0, 0, 0], [0.0] * 4, [0.0] * 4]
LOG_ODDS = [[0.0, log(3)], [0.0, 0.0], [log(9), 0.0]]


class FixedPool(nn.Module):
    """Keeps the boxes it is given, and pools one number from the map for each."""

    def __init__(self):
        super().__init__()
        self.boxes = []

    def forward(self, features, boxes, shapes):
        self.boxes.append(torch.cat(boxes))
        return features["0"] * torch.ones(len(self.boxes[-1]), 1)


class FixedPredictor(nn.Module):
    """The same logits and offsets for every region, and a gradient that reaches the map."""

    def __init__(self, logits, offsets):
        super().__init__()
        self.logits, self.offsets = nn.Parameter(torch.tensor(logits)), nn.Parameter(torch.tensor(offsets))

    def forward(self, x):
        return self.logits * x, self.offsets * x


def fixed_heads(offsets=FURTHER):
    heads = CascadeHeads(FixedPool(), 1, 1, 2, regions_per_image=512)
    heads.box_head = nn.ModuleList(nn.Identity() for _ in range(3))
    heads.box_predictor = nn.ModuleList(
        FixedPredictor(logits, [o / 10 for o in own]) for logits, own in zip(LOG_ODDS, offsets, strict=True)
    )
    return heads


def target(boxes=OBJECT):
    return [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}]


def losses_of(heads, value=1.0, targets=None):
    one = torch.tensor(value, requires_grad=True)
    _, losses = heads.train()({"0": one}, [PROPOSALS], SHAPES, target() if targets is None else targets)
    return one, losses


def test_every_stage_matches_the_boxes_of_the_one_before_by_its_own_overlap():
    heads = fixed_heads()
    _, losses = losses_of(heads)
    first, second, third = heads.box_roi_pool.boxes
    torch.testing.assert_close(first, torch.cat([PROPOSALS, OBJECT]))
    torch.testing.assert_close(second, MOVED)
    torch.testing.assert_close(third, MOVED)
    right = {"1": [0.75, 0.75, 0.25, 0.75], "2": [0.5] * 4, "3": [0.9, 0.9, 0.9, 0.1]}
    for stage, probabilities in right.items():
        expected = -sum(map(log, probabilities)) / 4
        assert losses[f"loss_classifier_{stage}"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("offsets", "counts"), [(FURTHER, (3, 2, 1)), ([[0.0] * 4] * 3, (3, 2, 2))], ids=["moved", "left in place"]
)
def test_overlaps_decide_how_many_regions_are_objects(offsets, counts):
    """Of the four, which overlap by 0.8, 0.55, 0 and 1 where they are left in place."""
    heads = fixed_heads(offsets)
    for predictor in heads.box_predictor:
        predictor.logits.data = torch.tensor([0.0, log(3)])
    _, losses = losses_of(heads)
    for stage, objects in enumerate(counts, start=1):
        expected = -(objects * log(0.75) + (4 - objects) * log(0.25)) / 4
        assert losses[f"loss_classifier_{stage}"].item() == pytest.approx(expected, rel=1e-5)


def test_offsets_are_measured_in_the_weights_of_the_stage():
    _, losses = losses_of(fixed_heads())

    def smooth(*offsets):
        return sum(abs(x) - 1 / 18 for x in offsets)

    second = smooth(2.0, 2.5, 10 * log(10 / 8)) + smooth(2.0)  # two regions, the second off in x alone
    assert losses["loss_box_reg_2"].item() == pytest.approx(second / 4, rel=1e-5)
    assert losses["loss_box_reg_3"].item() == pytest.approx(smooth(3.0) / 4, rel=1e-5)


def test_each_stage_sends_a_third_of_its_gradient_to_the_map():
    heads = fixed_heads()
    one, losses = losses_of(heads)
    for stage, predictor in enumerate(heads.box_predictor, start=1):
        loss = losses[f"loss_classifier_{stage}"]
        to_map, to_logits = torch.autograd.grad(loss, [one, predictor.logits], retain_graph=True)
        assert to_map.item() != 0 or stage == 2
        # logits = parameter * map, at 1: the full gradient is that of the parameter along itself
        torch.testing.assert_close(to_map, (to_logits * predictor.logits).sum() / 3)


def test_no_gradient_passes_through_the_boxes():
    heads = fixed_heads()
    _, losses = losses_of(heads)
    later = losses["loss_box_reg_2"] + losses["loss_box_reg_3"] + losses["loss_classifier_3"]
    (gradient,) = torch.autograd.grad(later, [heads.box_predictor[0].offsets], allow_unused=True)
    assert gradient is None


def test_in_evaluation_probabilities_are_averaged_and_boxes_are_the_last():
    heads = fixed_heads([[10.0, 0, 0, 0], [0, 20.0, 0, 0], [-30.0, 0, 0, 0]]).eval()
    heads.score_thresh = 0.0
    with torch.no_grad():
        found, losses = heads({"0": torch.tensor(1.0)}, [PROPOSALS[:1]], SHAPES)
    assert losses == {}
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[0.0, 0.8, 10, 8.8]]))
    torch.testing.assert_close(found[0]["scores"], torch.tensor([(0.75 + 0.5 + 0.1) / 3]))
    assert found[0]["labels"].tolist() == [1]


def test_an_image_without_objects_is_background_at_every_stage():
    _, losses = losses_of(fixed_heads(), targets=target(torch.zeros(0, 4)))
    assert losses["loss_classifier_1"].item() == pytest.approx(-log(0.25), rel=1e-5)
    assert [losses[f"loss_box_reg_{stage}"].item() for stage in (1, 2, 3)] == [0, 0, 0]
