"""Pictures of detections: every box, its label where there is room, the class's colour."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from statickey.viz.detections import class_colours, class_scores, draw_detections


def objects(*boxes, name="cat"):
    return [{"class": name, "box": box, "score": 0.9} for box in boxes]


def parts(figure):
    axes = figure.axes[0]
    boxes = [p for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]
    return boxes, [text.get_text() for text in axes.texts]


def test_every_object_has_a_box_and_a_label():
    figure = draw_detections(np.zeros((100, 120, 3)), objects((10, 20, 50, 60), (60, 50, 100, 90)), title="two")
    boxes, labels = parts(figure)
    assert len(boxes) == 4  # each on a white edge
    assert boxes[0].get_xy() == (9.5, 19.5)
    assert labels == ["cat 90 %"] * 2
    assert figure.texts[0].get_text() == "two"


def test_labels_do_not_cover_each_other():
    figure = draw_detections(np.zeros((100, 100, 3)), objects(*[(40, 40, 44, 44)] * 30))
    boxes, labels = parts(figure)
    assert len(boxes) == 60
    assert 1 <= len(labels) <= 6


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 600), (600, 20)])
def test_any_image_is_drawn(height, width):
    box = (0, 0, width, height)
    mask = np.ones((1, height, width), bool)
    figure = draw_detections(np.ones((height, width, 3)), objects(box), masks=mask)
    assert len(figure.axes[0].images) == 2
    assert parts(draw_detections(np.ones((height, width, 3)), []))[0] == []


def test_a_true_mark_has_no_score():
    assert parts(draw_detections(np.ones((50, 50, 3)), [{"class": "cat", "box": (5, 20, 40, 40)}]))[1] == ["cat"]


def test_classes_have_colours_of_their_own():
    colours = list(class_colours([str(i) for i in range(24)]).values())
    assert len(set(colours)) == 24
    apart = [np.abs(np.subtract(a, b)).sum() for a, b in pairwise(colours)]
    assert min(apart) > 0.4


def test_bars_of_classes_are_sorted_and_those_without_objects_left_out():
    figure = class_scores(["a", "b", "c"], {"box": [10.0, None, 50.0], "mask": [5.0, None, 40.0]}, "AP in %")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a"]
    many = class_scores([str(i) for i in range(90)], {"box": [float(i) for i in range(90)]}, "AP in %")
    assert len(many.axes[0].patches) == 40
