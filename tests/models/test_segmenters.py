import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import DECODERS, build_detector, build_model, build_segmenter, start_from
from statickey.models.segmenters import in_windows


def small(decoder="upernet", name="skaformer_nano", mixer=None, **options):
    return build_segmenter(name, mixer, img_size=64, num_classes=5, decoder=decoder, decoder_channels=32, **options)


@pytest.mark.parametrize("decoder", DECODERS)
def test_any_size_and_a_batch_of_one_trains(decoder):
    model = small(decoder)
    for size in ((32, 32), (75, 91), (33, 130)):
        logits = model(torch.rand(1, 3, *size))
        assert logits.shape == (1, 5, *size)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("decoder", DECODERS)
def test_images_do_not_depend_on_their_batch(decoder):
    model = small(decoder).eval()
    images = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)


def test_all_but_the_mixers_is_the_same_at_one_seed():
    models = [small(mixer=mixer, seed=2).state_dict() for mixer in ("ska", "cska", "sepconv")]
    shared = set.intersection(*(set(state) for state in models))
    shared = {name for name in shared if "token_mixer" not in name}
    assert len(shared) > 100 and any(name.startswith("decoder") for name in shared) and "head.weight" in shared
    flat = [{name: state[name].flatten() for name in shared} for state in models]  # on maps a linear layer is 1 x 1
    assert all(flat[0][name].equal(other[name]) for name in shared for other in flat[1:])


def test_windows_are_averaged():
    class Position(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x, x.shape[-1])], dim=1)

    image = torch.arange(7 * 11.0).reshape(1, 7, 11)
    whole = in_windows(Position(), image, None)
    tiled = in_windows(Position(), image, 5)
    torch.testing.assert_close(tiled[0], image[0])  # each window says the same of a pixel
    assert (tiled[1] == 5).all() and (whole[1] == 11).all()
    assert in_windows(Position(), image, 20).equal(whole)


def test_segment_answers_in_the_size_asked_for():
    model, image = small(window=32).eval(), torch.rand(3, 40, 70)
    with torch.no_grad():
        logits = in_windows(model, image, 32)
        assert model.segment(image).equal(logits.argmax(0))
        resized = F.interpolate(logits[None], (20, 35), mode="bilinear")[0]
        assert model.segment(image, (20, 35)).equal(resized.argmax(0))
        assert not in_windows(model, image, None).equal(logits)


def test_a_classifiers_weights_fill_the_backbone(tmp_path):
    from safetensors.torch import save_file

    classifier = build_model("skaformer_nano", None, img_size=32, num_classes=10, seed=5)
    state = {k: v.contiguous() for k, v in classifier.state_dict().items()}
    save_file(state, tmp_path / "c.safetensors")
    model = small(seed=1)
    report = start_from(model, tmp_path / "c.safetensors")
    assert "stem.conv.weight" in report.taken and not report.fresh
    assert model.pyramid.body.stem.conv.weight.equal(classifier.stem.conv.weight)
    detector = build_detector("skaformer_nano", None, img_size=64, num_classes=2, channels=16, seed=1)
    assert not start_from(detector, tmp_path / "c.safetensors").fresh
    assert detector.pyramid.body.stem.conv.weight.equal(classifier.stem.conv.weight)
    own = detector.state_dict()
    save_file({k: v.contiguous() for k, v in own.items()}, tmp_path / "d.safetensors")
    assert "rpn.head.cls_logits.weight" in start_from(detector, tmp_path / "d.safetensors").taken
    save_file({k: v.contiguous() for k, v in small(seed=7).state_dict().items()}, tmp_path / "s.safetensors")
    assert "head.weight" in start_from(model, tmp_path / "s.safetensors").taken


def test_layers_for_decay():
    from timm.optim import create_optimizer_v2

    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    first, last = scale[id(named["pyramid.body.stem.conv.weight"])], scale[id(named["head.weight"])]
    assert first < scale[id(named["pyramid.body.stages.3.blocks.0.mlp.fc1.weight"])] < last == 1
    key = next(p for name, p in named.items() if name.endswith("static_key"))
    assert decay[id(key)] == 0 and decay[id(named["head.weight"])] == 0.1


def test_refusals():
    with pytest.raises(UnknownNameError, match="decoder 'upernext'"):
        small("upernext")
    with pytest.raises(StaticKeyError, match="decoder_channels=0"):
        build_segmenter("skaformer_nano", None, img_size=64, num_classes=5, decoder_channels=0)
