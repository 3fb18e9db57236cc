import numpy as np

from statickey.viz import class_map_overlay


def test_classes_are_named_by_what_they_cover():
    classes = np.zeros((20, 30), np.uint8)
    classes[:, 20:] = 2
    figure = class_map_overlay(np.full((20, 30, 3), 0.5), classes, ("sky", "road", "tree"), "a street")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sky: 66.7 %", "tree: 33.3 %"]
    assert figure.get_suptitle() == "a street"
    left, right = figure.axes
    assert (left.images[0].get_array() == 0.5).all()
    colours = np.unique(np.asarray(right.images[0].get_array()).reshape(-1, 3), axis=0)
    assert len(colours) == 2


def test_one_class_has_no_outline():
    figure = class_map_overlay(np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), ("all",))
    assert not figure.axes[1].collections
