import pytest

from statickey.convert import HeadFigures
from statickey.errors import StaticKeyError
from statickey.viz import head_map


def figures(layer, head, change=0.1, static=False):
    return HeadFigures(layer, head, 0.1 * head, 0.2 + head, 0.3, 0.4, change, static)


def test_a_row_a_layer_a_column_a_head_static_ones_framed():
    heads = [
        figures("a", 0),
        figures("a", 1, static=True),
        *(figures("b", head, static=head > 1) for head in range(3)),
    ]
    figure = head_map(heads)
    panels = [axes for axes in figure.axes if axes.images and axes.get_title(loc="left")]
    assert [axes.get_title(loc="left").split()[0] for axes in panels] == ["logit", "KL", "error", "spread", "output"]
    values = panels[1].images[0].get_array()
    assert values.shape == (2, 3)
    assert values[1].tolist() == pytest.approx([0.2, 1.2, 2.2])
    assert values.mask[0].tolist() == [False, False, True]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b"]
    assert len(panels[0].patches) == 2
    assert figure.get_suptitle() == "2 of 5 heads static (framed)"


def test_what_was_not_measured_has_no_panel():
    figure = head_map([figures("a", head, change=None) for head in range(2)])
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == 4
    with pytest.raises(StaticKeyError, match="no head to draw"):
        head_map([])
