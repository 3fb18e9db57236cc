"""Average precision against pycocotools, and for weights of the images."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from statickey.errors import StaticKeyError
from statickey.tasks.average_precision import AREAS, AveragePrecision, match_boxes, match_masks

SIDE = 200
STATS = ["all", None, None, "small", "medium", "large"]


def run_lengths(box):
    x1, y1, x2, y2 = np.round(box).astype(int)
    pixels = np.zeros((SIDE, SIDE), np.uint8, order="F")
    pixels[y1:y2, x1:x2] = 1
    pixels[y1:y2:3, x1:x2] = 0
    return coco_mask.encode(pixels)


def random_case(seed, images=12, classes=4, masks=True):
    """Objects and detections near them: crowds, empty images, equal scores, a class without objects or detections."""
    random = np.random.default_rng(seed)

    def boxes(count):
        corner = random.uniform(0, 90, (count, 2))
        return np.concatenate([corner, corner + random.uniform(4, 110, (count, 2))], axis=1).astype(np.float32)

    found, targets = [], []
    for i in range(images):
        real = boxes(0 if i in (2, 5) else random.integers(1, 7))
        near = np.repeat(real, 3, axis=0) + random.normal(0, 3, (3 * len(real), 4))
        guesses = np.concatenate([np.clip(near, 0, SIDE), boxes(4)]).astype(np.float32)[: 0 if i in (5, 7) else None]
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        labels = random.integers(0, classes - 1, len(real))
        told = np.concatenate([np.repeat(labels, 3), random.integers(0, classes, 4)])[: len(guesses)]
        scores = np.round(random.uniform(0, 1, len(guesses)), 1)  # many ties
        found.append({"boxes": guesses, "labels": told, "scores": scores})
        targets.append({"boxes": real, "labels": labels, "crowd": random.uniform(size=len(real)) < 0.2})
        if masks:
            for own in (found[-1], targets[-1]):
                own["masks"] = [run_lengths(box) for box in own["boxes"]]
    return found, targets


def by_pycocotools(found, targets, classes, kind, repeats=None):
    """Its twelve numbers; ``repeats`` says how often each image is there."""
    order = [i for i in range(len(targets)) for _ in range(1 if repeats is None else repeats[i])]
    annotations, results = [], []
    for image_id, i in enumerate(order):
        for box, label, crowd, n in zip(
            targets[i]["boxes"], targets[i]["labels"], targets[i]["crowd"], range(99), strict=False
        ):
            x1, y1, x2, y2 = box.astype(float)
            marks = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            if "masks" in targets[i]:
                rle = targets[i]["masks"][n]
                marks |= {"segmentation": rle, "area": float(coco_mask.area(rle))}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "iscrowd": int(crowd)}
                | marks
            )
        own = found[i]
        for n, (box, label, score) in enumerate(zip(own["boxes"], own["labels"], own["scores"], strict=True)):
            x1, y1, x2, y2 = box.astype(float)
            row = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            results.append(
                row | ({"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {"segmentation": own["masks"][n]})
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(len(order))],
            "annotations": annotations,
            "categories": [{"id": k} for k in range(classes)],
        }
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(results), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


@pytest.mark.parametrize(("kind", "match"), [("bbox", match_boxes), ("segm", match_masks)])
@pytest.mark.parametrize("seed", range(4))
def test_all_numbers_are_those_of_pycocotools(kind, match, seed):
    found, targets = random_case(seed)
    theirs = by_pycocotools(found, targets, 4, kind)
    ours = match(found, targets, areas=tuple(AREAS))
    assert 5 < ours.value() < 95
    assert ours.value() == pytest.approx(100 * theirs[0], abs=1e-9)
    assert match(found, targets).value() == ours.value()
    for place, area in ((3, "small"), (4, "medium"), (5, "large")):
        own = ours.by_class(area=list(AREAS).index(area)).values()
        assert (np.mean(list(own)) if own else -1) == pytest.approx(theirs[place], abs=1e-11)
    for place, which in ((1, slice(0, 1)), (2, slice(5, 6))):
        assert np.mean(list(ours.by_class(thresholds=which).values())) == pytest.approx(theirs[place], abs=1e-11)


def test_a_weight_is_how_often_an_image_is_there():
    found, targets = random_case(0, masks=False)
    random = np.random.default_rng(1)
    for own in found:  # of equal scores, order would decide, which repeats change
        own["scores"] = random.uniform(size=len(own["scores"]))
    repeats = np.array([2, 0, 1, 3, 1, 0, 2, 1, 1, 0, 4, 1])
    ours = match_boxes(found, targets)
    theirs = 100 * by_pycocotools(found, targets, 4, "bbox", repeats)[0]
    assert abs(theirs - ours.value()) > 0.1
    assert ours.value(repeats.astype(float)) == pytest.approx(theirs, abs=1e-9)


def test_evidence_of_batches_is_put_one_behind_the_other():
    found, targets = random_case(3)
    parts = [match_boxes(found[:5], targets[:5]).arrays(), match_boxes(found[5:], targets[5:]).arrays()]
    whole = AveragePrecision.from_arrays({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    assert whole.num_images == 12
    assert whole.value() == match_boxes(found, targets).value()


def test_without_objects_the_value_is_zero():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found, targets = [nothing | {"scores": torch.zeros(0)}], [nothing | {"crowd": torch.zeros(0, dtype=torch.bool)}]
    assert match_boxes(found, targets).value() == 0


def test_arrays_that_do_not_fit_are_refused():
    arrays = dict(match_boxes(*random_case(0, masks=False)).arrays())
    with pytest.raises(StaticKeyError, match="other lengths"):
        AveragePrecision.from_arrays(arrays | {"scores": arrays["scores"][1:]})
    with pytest.raises(KeyError, match="right"):
        AveragePrecision.from_arrays({k: v for k, v in arrays.items() if k != "right"})
