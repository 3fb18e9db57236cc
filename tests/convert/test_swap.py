import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from statickey import MIXERS, convert
from statickey.convert import HostRule, Site, register_host_rule, token_mixers
from statickey.convert import swap as swap_module
from statickey.errors import StaticKeyError, UnknownNameError, UnsupportedHostError
from statickey.models import checkpoint_filter_fn
from tolerances import assert_close

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def host(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(**ARGS | kwargs)


TINY = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 56, "window_size": 7, "num_classes": 5}


def caformer():
    metaformer = timm.models.metaformer
    return metaformer.MetaFormer(
        depths=(1, 1, 2, 1),
        dims=(16, 32, 64, 96),
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        num_classes=5,
    )


HOSTS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **TINY, img_size=64),
    "vit, norms and registers": lambda: timm.models.VisionTransformer(
        **TINY, img_size=64, qk_norm=True, scale_attn_norm=True, reg_tokens=4, init_values=0.1, drop_path_rate=0.1
    ),
    "vit, dynamic size": lambda: timm.create_model(
        "vit_tiny_patch16_224", **TINY, img_size=64, dynamic_img_size=True
    ),
    "vit, parallel blocks": lambda: timm.models.VisionTransformer(
        **TINY, img_size=64, block_fn=timm.models.vision_transformer.ParallelThingsBlock
    ),
    "deit, distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY, img_size=64),
    "caformer": caformer,
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
    "swin v2": lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN),
    "cait": lambda: timm.create_model("cait_xxs24_224", **TINY, img_size=64, init_values=0.3),
    "beit": lambda: timm.create_model("beit_base_patch16_224", **TINY, img_size=64),
    "beit, shared bias": lambda: timm.models.beit.Beit(**TINY, img_size=64, use_shared_rel_pos_bias=True),
    "eva": lambda: timm.create_model("eva_giant_patch14_224", **TINY, img_size=56),
    "eva, unfused": lambda: timm.models.eva.Eva(**TINY, img_size=64, qkv_fused=False, scale_attn_inner=True),
}


@pytest.fixture(params=HOSTS)
def made(request):
    """A host with no parameter at a value that hides a mistake, and images for it."""
    torch.manual_seed(0)
    model = HOSTS[request.param]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "bias_table" in name or "gamma" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    size = getattr(getattr(model, "patch_embed", None), "img_size", (64, 64))
    return model, torch.randn(2, 3, *size)


class TestEveryHost:
    def test_self_attention_keeps_the_function(self, made):
        model, images = made
        before = model(images)
        report = convert(model, "mhsa")
        assert_close("logits", model(images), before)
        assert report.macs_after == report.macs_before > 0
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("mixer", ["ska", "cska", "fcska"])
    def test_static_keys_train(self, made, mixer):
        model, images = made
        params = sum(p.numel() for p in model.parameters())
        report = convert(model, mixer)
        assert report.params_before == params
        assert report.params_after == sum(p.numel() for p in model.parameters())
        changed = sum(m.params_after - m.params_before for m in report.modules)
        assert report.params_after - report.params_before == changed
        assert len(report.modules) == len(token_mixers(model))
        assert (report.macs_after < report.macs_before) == (mixer == "ska")
        assert f"-> {mixer}" in str(report)
        model.train()(images).square().mean().backward()
        keys = {name for name in model.no_weight_decay() if name.endswith(("_key", "conv_bias"))}
        assert keys
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska"])
    def test_autocast(self, made, mixer):
        """Norms and cosines answer in float32, projections in bfloat16: the mixer brings them together."""
        model, images = made
        convert(model, mixer)
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
        assert out.isfinite().all()
        assert (out.float() - expected).abs().mean() < 0.05 * expected.std() + 0.02

    def test_copies(self, made):
        model, images = made
        convert(model, "ska")
        out = model(images)
        assert torch.equal(copy.deepcopy(model)(images), out)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), out)
        twin = copy.deepcopy(model)
        assert type(twin) is type(model)
        twin.load_state_dict(model.state_dict())

    def test_self_attention_can_be_swapped_again(self, made):
        model, images = made
        twin = copy.deepcopy(model)
        convert(model, "mhsa")
        again = convert(model, "ska")
        once = convert(twin, "ska")
        assert_close("logits", model(images), twin(images))
        assert (again.macs_before, again.macs_after) == (once.macs_before, once.macs_after)
        assert again.params_after == once.params_after
        assert [m.params_after for m in again.modules] == [m.params_after for m in once.modules]


def test_projections_are_carried_over():
    reference = host().blocks[0].attn
    query, _, value = reference.qkv.weight.chunk(3)
    for mixer in ("ska", "cska", "fcska", "synthesizer"):
        model = host()
        convert(model, mixer)
        attn = model.blocks[0].attn
        assert torch.equal(attn.qv.weight, torch.cat([query, value]))
        assert torch.equal(attn.proj.weight, reference.proj.weight)
    model = host()
    convert(model, "constant")
    assert torch.equal(model.blocks[0].attn.v.weight, value)


def test_fresh_weights_on_request():
    model = host()
    convert(model, "ska", keep_weights=False)
    assert not torch.equal(model.blocks[0].attn.proj.weight, host().blocks[0].attn.proj.weight)
    convert(host(), "ska", keep_weights=False, mixer_args={"head_dim": 4})


def test_shared_weights_are_bit_identical_across_mixers():
    states = []
    for mixer in ("mhsa", "ska", "cska", "fcska"):
        model = host(seed=7)
        convert(model, mixer)
        states.append(model.state_dict())
        assert torch.initial_seed() == 7
        states[-1]["next draw"] = torch.rand(3)
    shared = set.intersection(*(set(state) for state in states))
    assert {
        "patch_embed.proj.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.0.attn.proj.weight",
        "head.weight",
    } <= shared
    for name in shared:
        assert all(torch.equal(state[name], states[0][name]) for state in states), name


def test_a_place_gets_the_same_key_whatever_else_is_swapped():
    every, last = host(), host()
    convert(every, "cska")
    convert(last, "cska", layers=[-1])
    assert torch.equal(every.blocks[1].attn.conv_key, last.blocks[1].attn.conv_key)


def test_layers_get_different_keys_and_seeds_too():
    model = host()
    convert(model, "ska")
    assert not torch.equal(model.blocks[0].attn.static_key, model.blocks[1].attn.static_key)
    other = host(seed=1)
    convert(other, "ska")
    assert not torch.equal(model.blocks[0].attn.static_key, other.blocks[0].attn.static_key)


def test_rectangular_grid_and_drop_rates():
    model = host(img_size=(32, 48), attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False)
    convert(model, "cska", mixer_args={"kernel_size": 5})
    attn = model.blocks[0].attn
    assert attn.feat_size == (4, 6)
    assert (attn.attn_drop.p, attn.proj_drop.p, attn.kernel_size) == (0.1, 0.2, 5)
    assert attn.qv.bias is None
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"pool", "sepconv"}))
def test_any_mixer_runs_in_a_host_with_prefix_tokens(mixer):
    model = host(reg_tokens=1)
    convert(model, mixer)
    assert isinstance(model.blocks[1].attn, MIXERS[mixer])
    assert model.blocks[1].attn.num_prefix_tokens == 2
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_any_mixer_runs_in_any_stage_of_a_metaformer(mixer):
    model = caformer()
    for layers in ("stages.1", "stages.2"):
        convert(model, mixer, layers=layers)
    assert model(torch.randn(2, 3, 70, 90)).shape == (2, 5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [2, 3, 4]),
        ([0, -1], [2, 4]),
        ("stages.3.*", [4]),
        (["stages.1", "stages.2.blocks.1.token_mixer"], [1, 3]),
    ],
)
def test_layers_of_choice(layers, expected):
    model = caformer()
    names = [n for n, _ in model.named_modules() if n.endswith("token_mixer")]
    report = convert(model, "ska", layers=layers)
    assert [m.name for m in report.modules] == [names[i] for i in expected]
    assert list(token_mixers(model)) == [names[i] for i in expected]
    model(torch.randn(2, 3, 64, 96)).sum().backward()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 64, 96)).sum().backward()


def test_locality_survives_a_second_swap():
    torch.manual_seed(0)
    model = timm.create_model("lsa_vit_small_patch4_32", depth=2, embed_dim=48, num_heads=2, head_dim=16).eval()
    with torch.no_grad():
        model.blocks[1].attn.log_temperature.fill_(0.7)
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    convert(model, "mhsa")
    assert torch.equal(model(images), before)
    convert(model, "ska")
    attn = model.blocks[1].attn
    assert attn.mask_diagonal
    assert attn.log_temperature.item() == pytest.approx(0.7)


def test_indices_do_not_move():
    model = host()
    convert(model, "ska", layers=[0])
    assert [m.name for m in convert(model, "cska", layers=1).modules] == ["blocks.1.attn"]


def test_a_frozen_host_trains_its_keys_only():
    model = host().requires_grad_(False)
    convert(model, "ska")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["blocks.0.attn.static_key", "blocks.1.attn.static_key"]


MAPS = {"levit": "levit_128s", "sam": "samvit_base_patch16_224"}


@pytest.mark.parametrize("name", [*HOSTS, *MAPS])
@pytest.mark.parametrize("graded", [True, False])
def test_what_is_frozen_stays_frozen_tensor_by_tensor(name, graded):
    """As where biases alone are tuned; position biases and norms too, and whether gradients are on or not."""
    model = HOSTS[name]() if name in HOSTS else timm.create_model(MAPS[name])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    with torch.set_grad_enabled(graded):
        convert(model, "mhsa")
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if n.endswith("bias")}


def test_a_bias_the_host_does_not_have_starts_at_zero():
    model = host(qkv_bias=False).eval()
    images = torch.randn(1, 3, 32, 32)
    before = model(images)
    convert(model, "mhsa", mixer_args={"qkv_bias": True})
    assert_close("logits", model(images), before)


def test_a_window_of_one_token():
    torch.manual_seed(0)
    model = timm.create_model("swinv2_tiny_window8_256", **SWIN | {"depths": (1, 1)}).eval()
    before = copy.deepcopy(model)
    convert(model, "mhsa")
    for swin in (model, before):
        swin.set_input_size((16, 8), window_size=8)
    images = torch.randn(1, 3, 16, 8)
    assert [m.feat_size for m in token_mixers(model).values()] == [(4, 2), (2, 1)]
    assert_close("logits", model(images), before(images))


@pytest.mark.parametrize("name", ["swin", "swin v2"])
def test_position_bias_stays_out_of_weight_decay(name):
    model = HOSTS[name]()
    kept = len(model.no_weight_decay())
    convert(model, "mhsa")
    names = model.no_weight_decay()
    assert len(names) >= kept
    assert names <= set(dict(model.named_parameters())) | {"absolute_pos_embed"}


@pytest.mark.parametrize(("name", "sizes"), [("swin", (56, 64)), ("beit", (64, 96))])
def test_converted_hosts_load_across_sizes(name, sizes):
    torch.manual_seed(0)
    models = []
    for size in sizes:
        if name == "swin":
            model = timm.create_model(
                "swin_tiny_patch4_window7_224", **SWIN | {"img_size": size, "window_size": size // 8}
            )
        else:
            model = timm.create_model("beit_base_patch16_224", **TINY, img_size=size)
        convert(model, "fcska")
        models.append(model.eval())
    saved, other = models
    state = saved.state_dict()
    with pytest.raises(StaticKeyError, match="img_size"):
        other.load_state_dict(state)
    other.load_state_dict(checkpoint_filter_fn(state, other))
    if name == "swin":
        saved.set_input_size((sizes[1], sizes[1]), window_size=sizes[1] // 8)
    else:
        saved.set_input_size((sizes[1], sizes[1]))
    images = torch.randn(1, 3, sizes[1], sizes[1])
    assert_close("logits", other(images), saved(images))


def test_an_interruption_between_two_places_leaves_the_model_as_it_was(monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, dynamic_img_size=True)
    before = [type(module) for module in model.modules()]
    real, installed = swap_module._install, []

    def interrupted(*args):
        installed.append(args)
        if len(installed) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(swap_module, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "ska")
    assert [type(module) for module in model.modules()] == before


def test_keys_of_other_heads_are_refused_by_name():
    model, other = host(), host()
    convert(model, "partly_static", mixer_args={"dynamic_heads": [0]})
    convert(other, "ska")
    with pytest.raises(
        StaticKeyError, match=r"static_key: .* build the mixer with the num_heads and dynamic_heads it"
    ):
        other.load_state_dict(model.state_dict())


def test_nothing_is_loaded_when_a_grid_is_wrong():
    wide, tall = host(img_size=(32, 48)), host(seed=1, img_size=(48, 32))
    for model in (wide, tall):
        convert(model, "ska")
    before = copy.deepcopy(tall.state_dict())
    with pytest.raises(StaticKeyError, match=r"feat_size=\(4, 6\), this layer is built for \(6, 4\)"):
        tall.load_state_dict(wide.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tall.state_dict().items())


class Subclass(timm.models.VisionTransformer):
    """A class of a user's own."""


def test_a_subclass_of_a_host():
    torch.manual_seed(0)
    model = Subclass(**ARGS)
    convert(model, "ska")
    assert isinstance(model, Subclass)

    class Further(type(model)):
        pass

    model.__class__ = Further
    assert type(copy.deepcopy(model)) is Further


def test_weights_on_the_meta_device():
    model = host()
    convert(model, "ska")
    with torch.device("meta"):
        empty = host()
        convert(empty, "ska")
    meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    empty.load_state_dict(meta, assign=True)
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.blocks[0].attn.static_key, model.blocks[0].attn.static_key)


def test_swin_windows_follow_the_input_size():
    model = HOSTS["swin"]()
    convert(model, "ska")
    key = model.layers[0].blocks[0].attn.mixer
    assert key.feat_size == (7, 7)
    model.set_input_size((96, 64), window_size=(8, 4))
    assert key.feat_size == (8, 4)
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)


def test_a_folder_that_timm_saved_and_the_calls_that_load_it(tmp_path):
    saved = HOSTS["vit"]().eval()
    convert(saved, "fcska")
    timm.models.save_for_hf(saved, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}").eval()
    convert(model, "fcska")
    timm.models.load_checkpoint(model, str(tmp_path / "model.safetensors"))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), saved(images))


def test_a_cait_of_another_size():
    torch.manual_seed(0)
    model = HOSTS["cait"]().eval()
    convert(model, "mhsa")
    positions = model.pos_embed.detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    positions = nn.functional.interpolate(positions, (6, 2), mode="bicubic", antialias=True)
    other = timm.create_model("cait_xxs24_224", **TINY, img_size=(96, 32), init_values=0.3).eval()
    convert(other, "mhsa")
    state = model.state_dict() | {"pos_embed": positions.flatten(2).transpose(1, 2)}
    other.load_state_dict(state)
    model.set_input_size((96, 32))
    images = torch.randn(1, 3, 96, 32)
    assert_close("other size", model(images), other(images))


@pytest.mark.parametrize("name", ["beit", "beit, shared bias", "cait", "eva", "vit"])
def test_other_input_size(name):
    model = HOSTS[name]().eval()
    convert(model, "fcska")
    size = (84, 56) if name == "eva" else (96, 64)
    model.set_input_size(size)
    assert all(m.feat_size == (6, 4) for m in token_mixers(model).values())
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


class ToyAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": ToyAttention(12, 3)}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["attn"](x)
        return x


class OwnNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 3
        self.to_qkv = nn.Linear(12, 36)
        self.to_out = nn.Linear(12, 12)

    def forward(self, x):
        query, key, value = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


def test_a_rule_where_attention_has_names_of_its_own():
    class Net(nn.Sequential):
        pass

    def sites(model):
        attn = model[0]
        fields = {"num_heads": attn.heads, "qkv_weight": attn.to_qkv.weight, "qkv_bias": attn.to_qkv.bias}
        return {"0": Site.of(attn, feat_size=(4, 5), proj=attn.to_out, **fields)}

    register_host_rule(HostRule(host=Net, sites=sites))
    model, x = Net(OwnNames()), torch.randn(2, 20, 12)
    before = model(x)
    convert(model, "mhsa")
    assert_close("own names", model(x), before)


def test_a_rule_for_a_model_of_ones_own():
    with pytest.raises(
        UnsupportedHostError, match=r"attention classes in it: ToyAttention\); supported: beit.Beit.*"
    ):
        convert(Toy(), "ska")
    register_host_rule(
        HostRule(
            host=Toy,
            sites=lambda model: {
                f"blocks.{i}.attn": Site.of(block["attn"], feat_size=(4, 5)) for i, block in enumerate(model.blocks)
            },
        )
    )
    model, x = Toy(), torch.randn(2, 20, 12)
    before = model(x)
    assert [m.name for m in convert(model, "mhsa").modules] == ["blocks.0.attn", "blocks.1.attn"]
    assert_close("toy", model(x), before)
    model = Toy()
    convert(model, "cska", layers=[1])
    model(x).sum().backward()
    assert model.no_weight_decay() == {"blocks.1.attn.conv_key", "blocks.1.attn.conv_bias"}
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


REFUSED = {
    "no host": (lambda: timm.create_model("resnet18"), "ska", {}, "ResNet is not a host .*supported: .*MetaFormer"),
    "token dropping": (lambda: host(patch_drop_rate=0.2), "ska", {}, "patch_drop_rate > 0"),
    "fused blocks": (
        lambda: host(block_fn=timm.models.vision_transformer.DiffParallelScalingBlock),
        "ska",
        {},
        "DiffParallelScalingBlock without a timm.layers.Attention; DiffParallelScalingBlock weighs a value by",
    ),
    "no attention": (
        timm.models.metaformer.MetaFormer,
        "ska",
        {},
        "no attention module to replace; name token mixers",
    ),
    "no place for a norm": (
        lambda: host(qk_norm=True),
        "constant",
        {},
        "blocks.0.attn has q_norm, for which mixer 'constant' has no place",
    ),
    "unknown option": (host, "ska", {"mixer_args": {"kernel_size": 3}}, "mixer 'ska': .*kernel_size"),
    "other heads": (host, "ska", {"mixer_args": {"head_dim": 4}}, "keep_weights=False"),
    "prefix": (host, "pool", {}, "class_token=False"),
    "index": (host, "ska", {"layers": [0, 2]}, "index 2, but the model has 2 attention modules"),
    "pattern": (host, "ska", {"layers": "block.*"}, r"layers='block.\*' matches none of blocks.0.attn"),
    "nothing": (host, "ska", {"layers": []}, "names no module"),
    "neither": (host, "ska", {"layers": [1.5]}, "layers has 1.5"),
    "no layers": (host, "ska", {"layers": None}, "layers=None names no module"),
    "no name": (host, None, {}, "mixer=None must be a name"),
    "text": (host, "ska", {"mixer_args": "head_dim=3"}, "mixer_args is 'head_dim=3'; it must map"),
    "no head": (host, "ska", {"mixer_args": {"head_dim": 0}}, "head_dim=0 must be a positive integer"),
    "a grid": (host, "ska", {"mixer_args": {"feat_size": (2, 8)}}, "mixer_args has feat_size, which follow"),
    "norm of other heads": (
        lambda: host(qk_norm=True),
        "ska",
        {"keep_weights": False, "mixer_args": {"head_dim": 6}},
        "q_norm for 3 heads of 8, the mixer has 4 of 6",
    ),
    "talking heads": (
        lambda: HOSTS["cait"](),
        "cska",
        {"keep_weights": False, "mixer_args": {"num_heads": 8}},
        "head_mix for 4 heads of 12, the mixer has 8 of 6",
    ),
    "bias of other heads": (
        lambda: HOSTS["swin"](),
        "ska",
        {"keep_weights": False, "mixer_args": {"num_heads": 8}},
        "a position bias for 2 heads of 8",
    ),
    "bias without a map": (lambda: HOSTS["beit"](), "constant", {}, "a position bias, for which mixer 'constant'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_leaves_the_model_alone(case):
    make, mixer, options, message = REFUSED[case]
    model = make()
    modules, cls = list(model.modules()), type(model)
    with pytest.raises(StaticKeyError, match=message):
        convert(model, mixer, **options)
    assert type(model) is cls
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown mixer 'skaa'; did you mean ska"):
        convert(host(), "skaa")


def test_swin_v2_logits_start_as_scaled_cosines():
    """The factor of the host keeps its meaning: fresh keys have about the length sqrt(d) that the scale undoes."""
    torch.manual_seed(0)
    model = HOSTS["swin v2"]()
    convert(model, "ska")
    mixer = model.layers[0].blocks[0].attn.mixer
    lengths = mixer.static_key.norm(dim=-1) * mixer.scale
    assert math.isclose(lengths.mean().item(), 1.0, abs_tol=0.1)
