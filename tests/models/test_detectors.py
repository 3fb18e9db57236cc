"""Detectors: the same weights for every mixer, every draw from the data's seeds, every parameter learned."""

from itertools import product

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign

from scenes import assert_drawn_from_seeds
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import ARCHS, MaskWindows, build_detector, build_model, count_macs
from statickey.models.region_heads import SeededSampler, region_pool

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
FORMER = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def detector(mixer="ska", arch="mask_rcnn", **changes):
    settings = {"img_size": 64, "num_classes": 3, "channels": 8, "anchor_size": 8, "min_size": None}
    return build_detector("small_vit", mixer, arch=arch, **settings | {"model_args": VIT} | changes)


def picture(boxes, seed=0, size=(64, 64)):
    """A random image and its target; every mask fills its box."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 3
    target = {"boxes": boxes, "labels": labels, "masks": MaskWindows.cut(masks), "seed": seed}
    return torch.randn(3, *size, generator=generator), target


def batch(*pictures):
    images, targets = zip(*pictures, strict=True)
    return list(images), list(targets)


SOME = [[4, 4, 30, 30], [20, 10, 40, 60]]
MIXED = batch(picture(SOME, 1), picture([], 2, (48, 56)))


@pytest.mark.parametrize(("name", "args"), [("small_vit", VIT), ("skaformer_nano", FORMER)])
def test_mixers_share_every_weight_that_is_not_theirs(name, args):
    states = {}
    for mixer in ("mhsa", "ska", "identity"):
        model = detector(mixer, model_args=args) if name == "small_vit" else None
        if model is None:
            model = build_detector(name, mixer, arch="mask_rcnn", img_size=64, num_classes=3, channels=8)
        own = tuple(f"{place}." for place, _ in token_mixers(model).items())
        states[mixer] = {k: v for k, v in model.state_dict().items() if not k.startswith(own)}
    for mixer in ("ska", "identity"):
        assert states[mixer].keys() == states["mhsa"].keys()
        assert all(torch.equal(value, states["mhsa"][key]) for key, value in states[mixer].items())


def test_the_body_is_that_of_a_classifier():
    classifier = build_model("small_vit", "ska", img_size=64, num_classes=1, seed=3, model_args=VIT).state_dict()
    body = detector(seed=3).backbone.pyramid.body.state_dict()
    assert len(body) > 10
    assert all(torch.equal(value, classifier[key]) for key, value in body.items())


@pytest.mark.parametrize(("arch", "autocast"), list(product(ARCHS, [False, True])))
def test_every_parameter_gets_a_gradient_with_objects_and_without(arch, autocast):
    model = detector(arch=arch).train()
    for images, targets in (MIXED, batch(picture([], 1), picture([], 2))):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(images, targets)
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch.endswith("rcnn")])
def test_boxes_stay_in_float32_under_autocast(arch):
    model = detector(arch=arch).eval()
    proposals = []
    model.rpn.register_forward_hook(lambda module, args, output: proposals.extend(output[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(MIXED[0])
    assert {boxes.dtype for boxes in proposals} == {torch.float32}
    assert (proposals[0] != proposals[0].bfloat16().float()).float().mean() > 0.5
    for own, image in zip(found, MIXED[0], strict=True):
        assert own["boxes"].dtype == own["scores"].dtype == torch.float32
        assert set(own["labels"].tolist()) <= {0, 1, 2}
        if "mask" in arch:
            assert own["masks"].shape == (len(own["boxes"]), *image.shape[1:])
            assert own["masks"].dtype == torch.bool


def test_losses_are_drawn_from_the_seeds_of_the_data_alone():
    crowd = [[x, y, x + 9, y + 9] for x in range(0, 50, 6) for y in range(0, 50, 6)]
    model = detector("mhsa", "cascade_mask_rcnn").train()
    assert_drawn_from_seeds(model, *batch(picture(crowd, 1), picture(crowd, 2)))


def test_a_seeded_sampler_draws_for_each_image_by_itself():
    sampler = SeededSampler(8, 0.5)
    labels = [torch.tensor([-1.0, 0, 1] * 10), torch.tensor([0.0] * 20 + [1.0])]
    sampler.seeds = [4, 5]
    positive, negative = sampler(labels)
    assert [int(own.sum()) for own in positive] == [4, 1]
    assert [int(own.sum()) for own in negative] == [4, 7]
    assert all((own[where.bool()] >= 1).all() for own, where in zip(labels, positive, strict=True))
    assert all((own[where.bool()] == 0).all() for own, where in zip(labels, negative, strict=True))
    sampler.seeds = [5]
    alone = sampler(labels[1:])
    assert torch.equal(alone[0][0], positive[1])
    assert torch.equal(alone[1][0], negative[1])
    sampler.seeds = [6]
    assert not torch.equal(sampler(labels[1:])[1][0], negative[1])


def test_an_images_detections_do_not_depend_on_its_batch():
    model = detector().eval()
    (a, _), (b, _) = picture(SOME, 1), picture(SOME, 2)
    with torch.no_grad():
        together, alone = model([a, b])[0], model([a])[0]
    torch.testing.assert_close(together, alone)


def test_boxes_alone_are_learned_as_torchvision_does():
    heads = detector("mhsa", "faster_rcnn").train().roi_heads
    theirs = RoIHeads(
        heads.box_roi_pool, heads.box_head, heads.box_predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100
    ).train()
    features = {str(i): torch.randn(1, 8, 16 >> i, 16 >> i) for i in range(4)}
    proposals = torch.rand(300, 4) * 32
    proposals[:, 2:] += proposals[:, :2] + 1
    targets = [{"boxes": torch.tensor(SOME).float(), "labels": torch.tensor([1, 2])}]
    torch.manual_seed(0)
    ours = heads(features, [proposals], [(64, 64)], targets)[1]
    torch.manual_seed(0)
    torch.testing.assert_close(ours, theirs(features, [proposals], [(64, 64)], targets)[1], rtol=0, atol=0)


def test_regions_of_masks_are_those_torchvision_cuts_from_whole_ones():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(5, 37, 53, dtype=torch.bool)
    masks[0, 3:20, 10:30] = torch.rand(17, 20, generator=generator) > 0.4
    masks[1, :, :] = torch.rand(37, 53, generator=generator) > 0.5  # reaches every border
    masks[2, 36, 52] = masks[3, 0, 0] = True  # one pixel; the last mask is empty
    boxes = torch.rand(60, 4, generator=generator) * torch.tensor([30, 20, 22, 16])
    boxes[:, 2:] += boxes[:, :2] + 1
    boxes[0] = torch.tensor([0.0, 0, 53, 37])
    objects = torch.arange(60) % 5
    cut = MaskWindows.cut(masks)
    theirs = project_masks_on_boxes(masks, boxes, objects, 28)
    torch.testing.assert_close(cut.in_regions(boxes, objects, 28), theirs)
    assert cut.windows.tolist()[4] == [0, 0, 1, 1]


def test_a_thousand_masks_take_the_memory_of_their_objects():
    boxes = [[x, y, x + 4, y + 3] for x in range(0, 160, 5) for y in range(0, 160, 5)][:1000]
    image, target = picture(boxes, 0, (160, 160))
    assert target["masks"].pixels.numel() <= 1000 * 6 * 5
    model = detector(img_size=160, anchor_size=4, model_args=VIT | {"patch_size": 32}).train()
    assert sum(model([image], [target]).values()).isfinite()


def test_images_are_resized_in_evaluation_and_boxes_brought_back():
    model = detector(min_size=32, max_size=40).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    with torch.no_grad():
        (found,) = model([MIXED[0][0][:, :, :48]])
    assert seen == [(64, 32)]  # 40 x 30, padded
    assert found["masks"].shape[1:] == (64, 48)
    assert found["boxes"][:, 2].max() > 32
    model.train()
    model(*batch(picture(SOME, 1)))
    assert seen[1] == (64, 64)


def test_regions_are_pooled_at_true_strides_whatever_the_first_batch():
    ours, theirs = region_pool(7, 32), MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    maps = {str(i): torch.randn(1, 2, 64 >> i, 64 >> i) for i in range(4)}
    boxes = [torch.tensor([[3.0, 4, 9, 30], [0, 0, 250, 250], [10, 10, 130, 140]])]
    torch.testing.assert_close(ours(maps, boxes, [(256, 256)]), theirs(maps, boxes, [(256, 256)]), rtol=0, atol=0)
    torch.testing.assert_close(ours(maps, boxes, [(40, 40)]), ours(maps, boxes, [(256, 256)]), rtol=0, atol=0)


def test_no_layer_mixes_images():
    for arch in ARCHS:
        assert not any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in detector(arch=arch).modules()
        )


def test_keys_have_no_weight_decay_and_layers_their_rates():
    model = detector()
    keys = [name for name, _ in model.named_parameters() if name.endswith("static_key")]
    assert len(keys) == 2
    assert set(keys) <= model.no_weight_decay()
    groups = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: (scale[id(p)], decay[id(p)]) for name, p in model.named_parameters()}
    assert all(found[key][1] == 0 for key in keys)
    assert found["roi_heads.box_head.fc6.weight"] == (1.0, 0.1)
    blocks = [found[f"backbone.pyramid.body.blocks.{i}.mlp.fc1.weight"][0] for i in (0, 1)]
    assert blocks[0] == blocks[1] / 2 < 0.5


def test_multiply_accumulates_are_counted():
    model = detector(arch="faster_rcnn")
    assert count_macs(model, (3, 64, 64)) > count_macs(model.backbone, (3, 64, 64)) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "yolo"}, "arch='yolo' must be one of faster_rcnn"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"anchor_size": 0}, "anchor_size=0"),
        ({"min_size": 100, "max_size": 90}, "min_size=100 must not exceed max_size=90"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(StaticKeyError, match=message):
        detector(**changes)


def test_an_unknown_mixer_is_refused():
    with pytest.raises(UnknownNameError, match="nope"):
        detector("nope")
