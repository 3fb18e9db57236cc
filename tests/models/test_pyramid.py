import pytest
import timm
import torch

from statickey.errors import StaticKeyError
from statickey.models import Pyramid, build_model, build_pyramid

HOSTS = {
    "metaformer": ("skaformer_nano", None, 64, (32, 64, 160, 256)),
    "plain": ("small_vit", "cska", 32, (96, 96, 96, 96)),
    "class token": ("vit_tiny_patch16_224", "ska", 64, (48, 96, 192, 192)),
    "patches of 14": ("vit_small_patch14_dinov2", None, 56, (192, 192, 384, 384)),
    "windows": ("swin_tiny_patch4_window7_224", "ska", 64, (8, 16, 32, 64)),
    "windows of version 2": ("swinv2_tiny_window8_256", None, 64, (8, 16, 32, 64)),
    "timm's": ("resnet18", None, 64, (64, 128, 256, 512)),
}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("size", [(64, 64), (37, 91)], ids=str)
def test_maps_of_any_image(host, size):
    name, mixer, side, channels = HOSTS[host]
    args = {"depth": 2} if "vit" in name else SWIN if "swin" in name else {}
    pyramid = build_pyramid(name, mixer, img_size=side, model_args=args).eval()
    maps = pyramid(torch.rand(2, 3, *size))
    assert pyramid.channels == channels == tuple(each.shape[1] for each in maps)
    for each, stride in zip(maps, (4, 8, 16, 32), strict=True):
        for extent, cells in zip(size, each.shape[2:], strict=True):
            assert abs(extent / stride - cells) < 1


@pytest.mark.parametrize("host", ["plain", "class token", "windows", "metaformer"])
def test_the_smallest_image_leaves_a_cell(host):
    name, mixer, side, _ = HOSTS[host]
    args = {"depth": 2} if "vit" in name else SWIN if "swin" in name else {}
    pyramid = build_pyramid(name, mixer, img_size=side, model_args=args).eval()
    assert [tuple(each.shape[2:]) for each in pyramid(torch.rand(1, 3, 8, 12))][1:] == [(1, 2), (1, 1), (1, 1)]


def test_what_is_padded_is_not_seen_twice():
    """Zeros stand to the right and below, and whole patches stay as they are."""
    pyramid = build_pyramid("swin_tiny_patch4_window7_224", "ska", img_size=64, model_args=SWIN).eval()
    image = torch.rand(1, 3, 37, 91)
    padded = torch.nn.functional.pad(image, (0, 1, 0, 3))
    assert all(torch.equal(*maps) for maps in zip(pyramid(image), pyramid(padded), strict=True))


@pytest.mark.parametrize("host", ["metaformer", "plain"])
def test_the_body_is_the_classifier_of_the_seed(host):
    name, mixer, side, _ = HOSTS[host]
    body = build_pyramid(name, mixer, img_size=side, seed=3).body.state_dict()
    classifier = build_model(name, mixer, img_size=side, num_classes=1, seed=3).state_dict()
    assert body.keys() < classifier.keys()
    assert all(torch.equal(tensor, classifier[key]) for key, tensor in body.items())


@pytest.mark.parametrize("host", ["metaformer", "plain", "class token"])
def test_every_parameter_learns_and_keys_do_not_decay(host):
    name, mixer, side, _ = HOSTS[host]
    pyramid = build_pyramid(name, mixer, img_size=side)
    sum(each.square().mean() for each in pyramid(torch.rand(2, 3, 64, 64))).backward()
    names = dict(pyramid.named_parameters())
    assert all(parameter.grad is not None for parameter in names.values())
    keys = {name for name in names if "static_key" in name or "conv_key" in name}
    assert keys and keys <= pyramid.no_weight_decay()


def test_frozen_stages():
    pyramid = build_pyramid("skaformer_nano", None, img_size=64)
    pyramid.freeze(0)
    assert all(p.requires_grad for p in pyramid.parameters())
    pyramid.freeze(2)
    frozen = {".".join(name.split(".")[1:3]) for name, p in pyramid.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.conv", "stem.norm", "stages.0", "stages.1"}
    with pytest.raises(StaticKeyError, match="frozen_stages=5, but StaticKeyMetaFormer has 4"):
        pyramid.freeze(5)
    with pytest.raises(StaticKeyError, match="frozen_stages=-1"):
        pyramid.freeze(-1)


def test_a_network_for_one_size_says_so_on_another():
    args = {"embed_dim": 16, "stages": (1, 1, 1, 1)}
    pyramid = build_pyramid("hiera_tiny_224", None, img_size=64, model_args=args)
    assert [each.shape[-1] for each in pyramid(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2]
    with pytest.raises(
        StaticKeyError, match=r"Hiera, built for .* broke on one of 64 x 96 \(.*any size, such as ska"
    ):
        pyramid(torch.zeros(1, 3, 64, 96))


def test_what_has_no_pyramid():
    with pytest.raises(StaticKeyError, match="LevitDistilled has maps at strides"):
        Pyramid(timm.create_model("levit_128s"))
    with pytest.raises(StaticKeyError, match="Linear has maps at strides unknown"):
        Pyramid(torch.nn.Linear(2, 2))
    with pytest.raises(StaticKeyError, match="MetaFormer does not say which layer"):
        build_pyramid("caformer_s18", None, img_size=64).freeze(1)
    with pytest.raises(StaticKeyError, match="refuses"):
        build_pyramid("skaformer_nano", None, img_size=64, model_args={"nonsense": 1})


@pytest.mark.parametrize(
    ("mixer", "model_args", "expected"),
    [
        (None, {}, "pool"),
        ("cska", {}, "pool"),
        ("ska:key=continuous", {}, "pool"),
        ("ska:off_grid=window", {}, "window"),
        ("ska:off_grid=resample", {}, "resample"),
        ("ska", {"off_grid": "resample"}, "resample"),
        ("ska", {"mixer_args": {"ska": {"off_grid": "window"}}}, "window"),
    ],
    ids=str,
)
def test_keys_do_not_grow_with_the_image_unless_asked(mixer, model_args, expected):
    body = build_pyramid("skaformer_nano", mixer, img_size=64, model_args=model_args).body
    assert body.stages[1].blocks[0].token_mixer.off_grid == expected
    if not model_args:
        vit = build_pyramid("vit_tiny_patch16_224", mixer or "fcska", img_size=64, model_args={"depth": 1}).body
        assert vit.blocks[0].attn.off_grid == expected


def test_what_keys_do_on_other_grids_can_be_chosen():
    for off_grid in ("window", "resample"):
        body = build_pyramid("skaformer_nano", None, img_size=64, off_grid=off_grid).body
        assert body.stages[1].blocks[0].token_mixer.off_grid == off_grid
    sized = build_pyramid("skaformer_nano", "ska:key_size=[4,4]", img_size=64, off_grid="window").body
    assert sized.stages[1].blocks[0].token_mixer.key_size == (4, 4)
    build_pyramid("skaformer_nano", "mhsa", img_size=64, off_grid="window")  # nothing to choose
    with pytest.raises(StaticKeyError, match="off_grid"):
        build_pyramid("skaformer_nano", None, img_size=64, off_grid="sample")
