"""RT-DETRv2 on any body: the same weights for every mixer, draws from the data's seeds, any size of images."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from scenes import assert_drawn_from_seeds
from statickey.convert import convert, token_mixers
from statickey.errors import StaticKeyError
from statickey.models import build_detector, build_model, count_macs, start_from

transformers = pytest.importorskip("transformers")

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2}
FORMER = {"depths": [1, 1, 1, 1], "dims": [8, 32, 64, 96]}
SOME = [[4, 4, 30, 30], [20, 10, 40, 60]]


def detector(mixer="ska", name="small_vit", **changes):
    args = {"small_vit": VIT, "skaformer_nano": FORMER}.get(name)
    settings = {"img_size": 64, "num_classes": 3, "channels": 8, "min_size": None, "model_args": args}
    return build_detector(name, mixer, arch="rt_detr_v2", **settings | changes)


def picture(boxes, seed=0, size=(64, 64)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    return image, {"boxes": boxes, "labels": torch.arange(len(boxes)) % 3, "seed": seed}


def batch(*pictures):
    images, targets = zip(*pictures, strict=True)
    return list(images), list(targets)


MIXED = batch(picture(SOME, 1), picture([], 2, (48, 56)))
EMPTY = batch(picture([], 1), picture([], 2, (48, 56)))


@pytest.mark.parametrize("name", ["small_vit", "skaformer_nano"])
def test_mixers_share_every_weight_that_is_not_theirs(name):
    states = {}
    for mixer in ("mhsa", "ska"):
        model = detector(mixer, name)
        own = tuple(f"{place}." for place in token_mixers(model))
        states[mixer] = {k: v for k, v in model.state_dict().items() if not k.startswith(own)}
    assert states["ska"].keys() == states["mhsa"].keys()
    assert sum("detr." in key for key in states["ska"]) > 100
    assert all(torch.equal(value, states["mhsa"][key]) for key, value in states["ska"].items())


def test_its_encoder_converts_too():
    model = detector().train()
    report = convert(model.detr, "ska")
    assert [(module.name, module.feat_size) for module in report.modules] == [
        ("encoder.aifi.0.layers.0.self_attn", (2, 2))
    ]
    sum(model(*MIXED).values()).backward()
    key = "detr.encoder.aifi.0.layers.0.self_attn.mixer.static_key"
    assert model.get_parameter(key).grad.abs().sum() > 0
    assert key in model.no_weight_decay()
    assert len(model.eval()([MIXED[0][0]])) == 1


def test_the_body_is_that_of_a_classifier_and_starts_from_one(tmp_path):
    def classifier(seed):
        return build_model("small_vit", "ska", img_size=64, num_classes=1, seed=seed, model_args=VIT)

    model = detector(seed=3)
    body = model.pyramid.body
    assert all(torch.equal(value, classifier(3).state_dict()[key]) for key, value in body.state_dict().items())
    torch.save(classifier(4).state_dict(), tmp_path / "classifier.pth")
    report = start_from(model, tmp_path / "classifier.pth")
    assert not report.fresh
    assert torch.equal(body.blocks[0].attn.static_key, classifier(4).blocks[0].attn.static_key)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [MIXED, EMPTY], ids=["some objects", "none"])
@pytest.mark.parametrize("name", ["small_vit", "skaformer_nano"])
def test_every_parameter_gets_a_gradient_with_objects_and_without(name, given, autocast):
    model = detector(name=name).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(*given)
    assert set(losses) == {"loss_vfl", "loss_bbox", "loss_giou"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_batch_without_objects_is_scored_as_the_library_would(monkeypatch):
    """It divides by a number of cells there are none of; with the pairing spared, its own losses are ours."""
    from transformers.loss import loss_rt_detr

    model = detector().train()
    ours = model(*EMPTY)
    pairs = torch.zeros(2, 0, dtype=torch.int64)
    monkeypatch.setattr(
        loss_rt_detr.RTDetrHungarianMatcher, "forward", lambda self, said, targets: [tuple(pairs)] * 2
    )
    monkeypatch.setattr(type(model), "_losses_without_objects", lambda self, said: None)
    said = []
    model.detr.register_forward_hook(lambda module, args, output: said.append(output))
    model(*EMPTY)
    (said,) = said
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in EMPTY[1]]
    _, theirs, _ = loss_rt_detr.RTDetrForObjectDetectionLoss(
        said.intermediate_logits[:, -1],
        labels,
        torch.device("cpu"),
        said.intermediate_reference_points[:, -1],
        model.detr.config,
        said.intermediate_logits,
        said.intermediate_reference_points,
        enc_topk_logits=said.enc_topk_logits,
        enc_topk_bboxes=said.enc_topk_bboxes,
    )
    for kind, loss in ours.items():
        torch.testing.assert_close(loss, torch.stack([v for k, v in theirs.items() if k.startswith(kind)]).sum())
    assert ours["loss_vfl"] > 0 == ours["loss_bbox"] == ours["loss_giou"]


def test_losses_are_drawn_from_the_seeds_of_the_data_alone():
    assert_drawn_from_seeds(detector("mhsa").train(), *MIXED)


@pytest.mark.parametrize("autocast", [False, True])
def test_detections_are_of_each_image_by_itself(autocast):
    model = detector("cska").eval()
    images = [picture([], seed, size)[0] for seed, size in enumerate([(64, 64), (31, 100), (200, 90)])]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together, alone = model(images), [model([image])[0] for image in images]
    for image, own, other in zip(images, together, alone, strict=True):
        if not autocast:
            torch.testing.assert_close(own, other)
        assert own["boxes"].dtype == own["scores"].dtype == torch.float32
        assert own["boxes"].shape == (100, 4)
        assert own["scores"].equal(own["scores"].sort(descending=True).values)
        assert set(own["labels"].tolist()) <= {0, 1, 2}
        assert own["boxes"].min() >= 0
        assert (own["boxes"][:, 2] <= image.shape[2]).all()
        assert (own["boxes"][:, 3] <= image.shape[1]).all()
        assert (own["boxes"] != own["boxes"].bfloat16().float()).float().mean() > 0.5


def test_boxes_are_shares_of_the_image_inside_and_its_pixels_outside():
    model = detector()
    asked = []
    model.detr.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs["labels"]), with_kwargs=True)
    model.train()(*batch(picture([[10, 20, 30, 60]], 0, (80, 100))))
    ((label,),) = asked
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    model.detr._forward_pre_hooks.clear()
    model.detr._forward_pre_hooks_with_kwargs.clear()

    def say(_, args, said):
        said.intermediate_reference_points[:, -1, 7] = torch.tensor([0.2, 0.5, 0.2, 0.5])
        said.intermediate_reference_points[:, -1, 8] = torch.tensor([0.9, 0.5, 0.4, 2.0])
        said.intermediate_logits[:, -1] = -9.0
        said.intermediate_logits[:, -1, 7, 2] = 4.0
        said.intermediate_logits[:, -1, 8, 1] = 2.0

    model.detr.register_forward_hook(say)
    with torch.no_grad():
        (found,) = model.eval()([torch.zeros(3, 80, 100)])
    torch.testing.assert_close(found["boxes"][:2], torch.tensor([[10.0, 20, 30, 60], [70, 0, 100, 80]]))
    assert found["labels"][:2].tolist() == [2, 1]
    torch.testing.assert_close(found["scores"][:2], torch.tensor([4.0, 2.0]).sigmoid())


def test_losses_fall():
    model = detector(channels=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    before = sum(model(*MIXED).values()).item()
    for _ in range(8):
        loss = sum(model(*MIXED).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(model(*MIXED).values()) < 0.75 * before


@pytest.mark.parametrize("name", ["small_vit", "skaformer_nano", "resnet10t"])
def test_images_are_brought_to_a_square_of_any_size(name):
    mixer = None if name == "resnet10t" else "ska"
    model, larger = detector(mixer, name), detector(mixer, name, min_size=70)
    assert (model.side, larger.side) == (64, 96)
    larger.load_state_dict(model.state_dict())
    seen = []
    for each in (model, larger):
        each.pyramid.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        with torch.no_grad():
            (found,) = each.eval()([torch.rand(3, 50, 120)])
        assert found["boxes"].isfinite().all()
    assert seen == [(1, 3, 64, 64), (1, 3, 96, 96)]
    assert count_macs(larger, (3, 50, 120)) > count_macs(model, (3, 50, 120)) > count_macs(model.pyramid, (3, 64, 64))


def test_a_wide_one_is_deeper():
    small, wide = detector(), detector(channels=256)
    assert [len(each.detr.decoder.layers) for each in (small, wide)] == [3, 6]
    assert [each.detr.config.num_queries for each in (small, wide)] == [84, 84]  # an 8 x 8, a 4 x 4 and a 2 x 2 map
    assert not any(isinstance(module, nn.BatchNorm2d) for module in wide.detr.modules())


def test_keys_have_no_weight_decay_and_layers_their_rates():
    model = detector()
    keys = [name for name, _ in model.named_parameters() if name.endswith("static_key")]
    assert len(keys) == 2
    groups = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    settings = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: settings[id(p)] for name, p in model.named_parameters()}
    assert all(found[key][1] == 0 for key in keys)
    assert found["detr.enc_score_head.weight"] == (1.0, 0.1)
    blocks = [found[f"pyramid.body.blocks.{i}.mlp.fc1.weight"][0] for i in (0, 1)]
    assert blocks[0] == blocks[1] / 2 < 0.5


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(StaticKeyError, match="channels=10 must be a multiple of 4"):
        detector(channels=10)
    with pytest.raises(StaticKeyError, match="in training needs targets"):
        detector().train()(MIXED[0])
    monkeypatch.setattr("statickey.models.query_detector.find_spec", lambda name: None)
    with pytest.raises(StaticKeyError, match=r"pip install 'statickey\[hf\]'"):
        detector()
