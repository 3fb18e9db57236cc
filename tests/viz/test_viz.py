import numpy as np
import pytest
import torch

from statickey import StaticKeyAttention
from statickey.models import build_model
from statickey.viz import attention_overlay, capture_attention, differences, key_colours, learning_curves
from tolerances import assert_close


def test_captured_maps_are_those_the_model_uses():
    model = build_model("small_vit", "ska", img_size=8, in_chans=1, num_classes=3)
    images = torch.randn(2, 1, 8, 8)
    maps = capture_attention(model, images)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(4)]
    embedded = model.pos_drop(model._pos_embed(model.patch_embed(images)))
    block = model.blocks[0]
    assert_close("map", maps["blocks.0.attn"], block.attn.attention_weights(block.norm1(embedded)).detach())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_capture_takes_the_grid_of_the_call():
    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = StaticKeyAttention(8, 2, feat_size=(4, 4))

        def forward(self, x):
            return self.attn(x, feat_size=(2, 3))

    assert capture_attention(Host(), torch.randn(1, 6, 8))["attn"].shape == (1, 2, 6, 6)


def test_key_colours_show_differences_between_rows_only():
    key = torch.randn(2, 1 + 35, 4)
    pictures = key_colours(key, 1, (7, 5))
    assert pictures.shape == (2, 7, 5, 3)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    shifted = key + torch.randn(2, 1, 4)
    torch.testing.assert_close(key_colours(shifted, 1, (7, 5)), pictures, atol=1e-4, rtol=0)
    assert_close("equal rows", key_colours(torch.ones(1, 4, 2), 0, (2, 2)), torch.full((1, 2, 2, 3), 0.5))


def test_overlays_colour_what_differs_from_uniform_attention():
    image = np.full((8, 8, 3), 0.5)
    uniform = torch.full((2, 17, 17), 1 / 17)
    peaked = uniform.clone()
    peaked[0, 0] = torch.tensor([0.0] * 16 + [1.0])  # the class token looks at the last patch

    def levels(weights):
        axes = attention_overlay(image, weights, (4, 4), "a_$x$.png").axes
        assert [text.get_text() for text in axes[-1].get_xticklabels()][:2] == ["0", "1/N (uniform)"]
        return [np.asarray(panel.images[-1].get_array()) for panel in axes[2:4]]

    np.testing.assert_allclose(levels(uniform), 0, atol=1e-6)
    first, second = levels(peaked)
    assert first[3, 3] == pytest.approx(1)
    assert first[0, 0] == pytest.approx(-1)
    np.testing.assert_allclose(second, 0, atol=1e-6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_draw(seeds):
    curve = [{"epoch": e, "holdout_accuracy": 10.0 * e, "train_loss": 1 / e} for e in (1, 2)]
    shown = {"holdout_accuracy": "held-out accuracy, %", "train_loss": "training loss"}
    accuracy, loss = learning_curves({"mhsa": [curve] * seeds, "ska": [curve] * seeds}, shown)
    assert loss.axes[0].get_title(loc="left") == "training loss"
    lines = accuracy.axes[0].lines
    assert [line.get_label() for line in lines] == ["mhsa", "ska"]
    np.testing.assert_allclose(lines[0].get_ydata(), [10, 20])
    interval = None if seeds == 1 else (-1.0, 2.0)
    row = {"mixer": "ska", "difference": {"mean": 0.5, "interval": interval, "image_interval": (-0.2, 1.1)}}
    rows = [{"mixer": "mhsa", "difference": None}, row]
    axes = differences(rows, {"ska": [0.5] * seeds}, "accuracy minus mhsa, points").axes[0]
    assert axes.get_xlabel() == "accuracy minus mhsa, points"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ska"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_epoch_is_a_point(seeds):
    curve = [{"epoch": 1, "train_loss": 2.0}]
    (figure,) = learning_curves({"mhsa": [curve] * seeds, "ska": [curve] * seeds}, {"train_loss": "training loss"})
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["mhsa", "ska"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [(0, 2.0), (1, 2.0)]
