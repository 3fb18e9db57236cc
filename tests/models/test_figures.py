import pytest

from statickey.errors import StaticKeyError, UnknownNameError, UnsupportedHostError
from statickey.models import model_figures
from statickey.models.figures import PUBLISHED


def test_caformer_is_as_published():
    figures = model_figures("caformer_s18")
    assert figures.differences == []
    assert (figures.key_params, figures.key_macs) == (0, 0)


def test_differences_to_the_published_figures_are_explained():
    found = model_figures("cskaformer_s18").differences
    assert found == [
        "GMACs: published 4.1, ours 6.40; logits and weighted sums of static keys are 2.36 of it, 4.04 without"
    ]
    logits_and_sums = 3 * 784**2 * 128 * (9 + 1)
    assert model_figures("cskaformer_s18").key_macs == logits_and_sums


def test_shares():
    figures = model_figures("ska_vit_tiny_patch16_224")
    assert figures.input_size == (3, 224, 224)
    assert figures.key_params == 12 * 197 * 192
    assert figures.key_macs == 12 * 2 * 197**2 * 192
    assert figures.attention_macs == 12 * (3 * 197 * 192**2 + 2 * 197**2 * 192)


def test_activations_of_a_known_model():
    """timm publishes 11.95 M for vit_small_patch16_224, counted the same way."""
    assert abs(model_figures("vit_small_patch16_224").activations / 1e6 - 11.95) < 0.05


def test_patterns_and_image_sizes():
    base = model_figures("skaformer_nano")
    assert model_figures("skaformer_nano", mixers=("sepconv", "cska", "mhsa", "mhsa")).macs > base.macs
    larger = model_figures("skaformer_nano", img_size=256)
    assert larger.input_size == (3, 256, 256)
    assert larger.params - base.params == (32**2 - 28**2) * 64
    assert larger.published is None


def test_every_published_figure_belongs_to_a_model():
    for name, published in PUBLISHED.items():
        figures = model_figures(name)
        assert figures.published is published
        assert abs(figures.params / 1e6 - published.params_m) < 3


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "convformer_s18"])
def test_timms_models_join(name):
    assert model_figures(name).macs > 0


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("skaformer_s1", {}, UnknownNameError, "did you mean skaformer_s18"),
        ("xcit_nano_12_p16_224", {}, UnsupportedHostError, "Xcit has no attention .* channels by channels"),
        ("vit_tiny_patch16_224", {"mixers": ("ska",) * 4}, StaticKeyError, "refuses .*mixers"),
        ("skaformer_nano", {"img_size": 2}, StaticKeyError, "img_size"),
    ],
)
def test_refuses(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        model_figures(name, **kwargs)
