"""Detection under the engine: trained, resumed, scored, read back."""

import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from scenes import rectangles
from statickey.data import open_image
from statickey.errors import StaticKeyError
from statickey.tasks import TASKS, Machine, load_model, train
from statickey.tasks.detection import BoxAveragePrecision, Detection, DetectionRecipe
from statickey.tasks.detection_report import mask_pixels

CPU = Machine(accelerator="cpu")
VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2}
TASK = Detection()


@pytest.fixture(autouse=True)
def detection(monkeypatch):
    monkeypatch.setitem(TASKS, "detect", TASK)
    monkeypatch.setattr("statickey.tasks.detection.open_detection", lambda data, **options: DATA[data], raising=False)


DATA = {"boxes": rectangles(masks=False), "masks": rectangles()}


def recipe(**changes):
    settings = {
        "model": "small_vit",
        "data": "masks",
        "model_args": VIT,
        "epochs": 2,
        "batch_size": 4,
        "channels": 8,
        "holdout": 0.25,
    }
    return DetectionRecipe(**settings | {"lr": 1e-3, "scale": (0.8, 1.2)} | changes)


def trained(out, **changes):
    quiet = Console(file=io.StringIO())
    return train(recipe(**changes), mixer="ska", out=str(out), machine=CPU, console=quiet)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "detect", TASK)
        patch.setattr("statickey.tasks.detection.open_detection", lambda data, **options: DATA[data], raising=False)
        return folder, trained(folder)


def test_a_run_is_trained_scored_and_read_back(run):
    folder, result = run
    assert result["task"] == "detect"
    assert 0 <= result["box_ap"] <= 100
    assert {"train_loss_mask", "train_loss_objectness", "holdout_box_ap"} <= result["curve"][0].keys()
    assert result["macs"] > 0
    model, card = load_model(folder)
    assert card.task_args == {
        "arch": "mask_rcnn",
        "channels": 8,
        "anchor_size": 4,
        "regions_per_image": 64,
        "img_size": None,
        "max_size": 1333,
        "off_grid": "pool",
    }
    with np.load(folder / "predictions.npz") as arrays:
        assert TASK.evidence_from(arrays).value() == result["box_ap"]
    data = DATA["masks"]
    module = TASK.data_module(recipe(), data, 0)
    scores = TASK.evaluation(data.class_names)
    with torch.inference_mode():
        for batch in module.scoring_dataloader("test"):
            scores.update(*TASK.outputs(model, module.on_after_batch_transfer(batch, 0)))
    assert scores.to_json()["box_ap"] == pytest.approx(result["box_ap"], abs=1e-6)


def test_draws_inside_the_network_do_not_move_what_is_sampled(run, tmp_path):
    """Two mixers at one seed see one sample; so does the same run anew."""
    again = trained(tmp_path)
    drop = [{k: v for k, v in row.items() if "second" not in k} for row in again["curve"]]
    assert drop == [{k: v for k, v in row.items() if "second" not in k} for row in run[1]["curve"]]


@pytest.mark.parametrize(
    ("data", "arch", "expected"),
    [
        ("boxes", None, "faster_rcnn"),
        ("masks", None, "mask_rcnn"),
        ("masks", "cascade_rcnn", "cascade_rcnn"),
    ],
)
def test_the_data_decide_what_is_learned(data, arch, expected):
    settled = TASK.settled(recipe(data=data, arch=arch, lr=None, channels=None), DATA[data])
    assert (settled.arch, settled.train_size, settled.anchor_size) == (expected, 64, 4)
    assert (settled.lr, settled.channels) == (1e-3, 64)
    module = TASK.data_module(recipe(data=data, arch=arch), DATA[data], 0)
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert all(("masks" in target) == ("mask" in expected) for target in batch[1])
    model = TASK.build(recipe(data=data, arch=arch), DATA[data], "ska", 0).train()
    assert ("loss_mask" in TASK.losses(model, batch, settled)) == ("mask" in expected)


def test_sizes_follow_the_images():
    """Keys are built for a classifier's images; anchors, widths and regions for those of the data."""
    large = TASK.settled(recipe(img_size=800, lr=None, channels=None), DATA["boxes"])
    assert (large.train_size, large.anchor_size, large.channels, large.regions_per_image) == (224, 32, 256, 512)
    small = TASK.settled(recipe(), DATA["boxes"])
    assert (small.train_size, small.anchor_size, small.regions_per_image) == (64, 4, 64)
    changes = {"model": "skaformer_nano", "model_args": {}}
    given = TASK.settled(recipe(img_size=800, train_size=96, regions_per_image=8, **changes), DATA["boxes"])
    assert (given.train_size, given.regions_per_image) == (96, 8)
    model = TASK.build(given, DATA["boxes"], "ska:off_grid=window", 0)
    layer = model.pyramid.body.stages[1].blocks[0].token_mixer
    assert (layer.feat_size, layer.off_grid) == ((12, 12), "window")


def test_a_detector_of_queries_is_trained_scored_and_read_back(tmp_path):
    pytest.importorskip("transformers")
    settled = TASK.settled(recipe(arch="rt_detr_v2", scale=(1, 1), lr=None, channels=None), DATA["masks"])
    assert (settled.train_size, settled.anchor_size, settled.lr, settled.channels) == (64, None, 1e-3, 64)
    result = trained(tmp_path, arch="rt_detr_v2", scale=(1.0, 1.0), epochs=1)
    assert {"train_loss_vfl", "train_loss_bbox", "train_loss_giou", "holdout_box_ap"} <= result["curve"][0].keys()
    assert result["macs"] > 0
    model, card = load_model(tmp_path)
    assert card.task_args["arch"] == "rt_detr_v2"
    assert model.side == 64
    assert load_model(tmp_path, img_size=96)[0].side == 96
    data = DATA["masks"]
    module = TASK.data_module(settled, data, 0)
    scores = TASK.evaluation(data.class_names)
    with torch.inference_mode():
        for batch in module.scoring_dataloader("test"):
            scores.update(*TASK.outputs(model, module.on_after_batch_transfer(batch, 0)))
    assert scores.to_json()["box_ap"] == pytest.approx(result["box_ap"], abs=1e-6)
    assert "mask_ap" not in scores.to_json()
    finder = TASK.predictor(model, card, img_size=None, top_k=3)
    path = tmp_path / "image.png"
    data.test.open(0).save(path)
    model.detr.decoder.class_embed[-1].bias.data[1] += 50  # everything is blue
    (answer,) = finder.predict(finder.prepare([finder.read(path)]))
    assert finder.title(answer.row) == "3 blue"


def test_masks_cannot_be_learned_from_boxes():
    with pytest.raises(StaticKeyError, match="boxes alone"):
        TASK.settled(recipe(data="boxes", arch="mask_rcnn"), DATA["boxes"])


def test_frozen_stages_keep_their_weights():
    model = TASK.build(recipe(frozen_stages=1), DATA["masks"], "ska", 0)
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert still
    assert all(name.startswith("backbone.pyramid.body.") for name in still)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "yolo"}, "arch='yolo'"),
        ({"scale": (1.0,)}, "scale="),
        ({"scale": [1.5, 0.5]}, "scale="),
        ({"img_size": 2000}, "img_size=2000 must not exceed"),
        ({"anchor_size": 0}, "anchor_size=0"),
        ({"frozen_stages": -1}, "frozen_stages=-1"),
        ({"arch": "rt_detr_v2"}, r"scale=\(0.8, 1.2\) means nothing to arch='rt_detr_v2'"),
        ({"arch": "rt_detr_v2", "scale": [1, 1], "anchor_size": 8}, "anchor_size=8 means nothing"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(StaticKeyError, match=message):
        recipe(**changes)


def marks():
    data = DATA["masks"]
    module = TASK.data_module(recipe(), data, 0)
    return [target for _, targets in module.scoring_dataloader("test") for target in targets]


def perfect(targets, shift=0.0):
    return [
        {
            "boxes": own["boxes"] + shift,
            "labels": own["labels"],
            "scores": 1 - torch.arange(len(own["labels"])) / 10,
            "masks": own["masks"],
        }
        for own in targets
    ]


@pytest.mark.parametrize("shift", [0.0, 2.0, 100.0])
def test_the_learning_curve_has_the_number_of_the_evidence(shift):
    targets = marks()
    metric = BoxAveragePrecision()
    for i in (0, 2):
        metric.update(perfect(targets, shift)[i : i + 2], targets[i : i + 2])
    value = metric.compute().item()
    assert 0 <= value <= 1
    assert 100 * value == pytest.approx(TASK.evidence([perfect(targets, shift)], [targets]).value(), abs=1e-4)


def test_an_evaluation_says_what_pycocotools_says(tmp_path, capsys):
    targets, data = marks(), DATA["masks"]
    scores = TASK.evaluation(data.class_names)
    found = perfect(targets, 1.0)
    scores.update(found[:1], targets[:1])
    scores.update(found[1:], targets[1:])
    numbers = scores.to_json()
    json.dumps(numbers)
    assert numbers["images"] == 4
    assert numbers["mask_ap"] == pytest.approx(100)
    assert numbers["box_ap"] < 100
    assert [row["class"] for row in scores.per_class()] == ["red", "blue"]
    assert "box AP" in scores.rows()
    assert set(scores.figures()) == {"per_class"}

    results = tmp_path / "results.json"
    results.write_text(json.dumps(scores.results(data)))
    truth = COCO()
    rows = [
        {"id": 1 + n, "image_id": own["image_id"], "category_id": data.category_ids[label], "iscrowd": int(crowd)}
        | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        for n, (own, (x1, y1, x2, y2), label, crowd) in enumerate(
            (own, box, label, crowd)
            for own in targets
            for box, label, crowd in zip(
                own["boxes"].tolist(), own["labels"].tolist(), own["crowd"].tolist(), strict=True
            )
        )
    ]
    images = [{"id": own["image_id"], "height": 48, "width": 48} for own in targets]
    truth.dataset = {"images": images, "annotations": rows, "categories": [{"id": k} for k in data.category_ids]}
    truth.createIndex()
    scorer = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert numbers["box_ap"] == pytest.approx(100 * scorer.stats[0], abs=1e-9)
    assert numbers["box_ap50"] == pytest.approx(100 * scorer.stats[1], abs=1e-9)


def test_objects_are_found_on_files(run, tmp_path):
    model, card = load_model(run[0])
    path = tmp_path / "image.png"
    DATA["masks"].test.open(0).save(path)
    model.roi_heads.box_predictor.cls_score.bias.data[1] += 50  # everything is red
    finder = TASK.predictor(model, card, img_size=None, top_k=3)
    (answer,) = finder.predict(finder.prepare([finder.read(path)]))
    row = answer.row
    json.dumps(row)
    assert len(row["objects"]) == 3
    assert row["objects"][0]["class"] == "red"
    with open_image(path) as image:
        assert mask_pixels(row["objects"]).shape == (3, image.height, image.width)
    assert finder.title(row) == "3 red"
    columns, cells = finder.csv([row | {"file": "image.png"}])
    assert len(cells) == 3
    assert set(columns) >= {"file", "class", "score", "x1"}
    assert finder.title({"objects": []}) == "nothing found"
    assert finder.csv([{"objects": [], "file": "x"}])[1] == []
    assert finder.table([row | {"file": "image.png"}]).row_count == 1


def test_examples_are_of_one_size():
    data = DATA["masks"]
    module = TASK.data_module(recipe(), data, 0)
    pixels, images, captions = TASK.examples(data, module, "test", 3)
    assert {image.shape for image in pixels} == {image.shape for image in images} == {(3, 64, 64)}  # as keys are
    assert len(captions) == 3


def test_another_size_of_images_is_the_networks_own_affair(run):
    folder, _ = run
    model, _ = load_model(folder, img_size=96)
    usual, _ = load_model(folder)
    seen = []
    for network in (model, usual):
        network.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
        with torch.no_grad():
            network([torch.rand(3, 48, 40)])
    assert seen == [(128, 96), (64, 64)]  # the shorter side at 96, or as it comes; then padded to multiples of 32
