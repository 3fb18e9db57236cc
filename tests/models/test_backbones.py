"""What every named model must do as a timm backbone; each name runs at its own width and few blocks.

The suite runs one name for each mixer and host, and traces four of them; ``-m slow`` runs the rest.
"""

import copy
import functools
import io
import pickle

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2

import statickey  # noqa: F401  (registers the models)
from statickey.convert import token_mixers
from statickey.errors import FeatSizeError, StaticKeyError
from statickey.export.formats import Subject, write_onnx
from statickey.export.int8 import write_int8
from statickey.layers import StaticKeyAttention
from statickey.models import checkpoint_filter_fn
from statickey.tasks import ModelCard
from tolerances import assert_close

NAMES = [name for name in timm.list_models() if name.startswith(("ska", "cska", "fcska", "lsa", "small"))]
FORMERS = [name for name in NAMES if "former" in name]
FAMILIES = [name for name in NAMES if name.endswith(("nano", "vit_tiny_patch16_224", "patch4_32", "small_vit"))]
"""One name per mixer and host."""


def small(name):
    """Few blocks and a small image, at the widths of the name."""
    if "former" in name:
        return {"depths": (1, 1, 2, 1), "img_size": 64}
    mixer = {"mixer": "ska"} if name == "small_vit" else {}  # it has timm's attention unless told otherwise
    return {"depth": 2, "img_size": 32 if "lsa" in name else 64, **mixer}


def size_of(name):
    size = small(name)["img_size"]
    return (size, size)


def create(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **small(name) | {"num_classes": 7} | kwargs)
    if name == "small_vit" and isinstance(getattr(model, "head", None), torch.nn.Linear):
        torch.nn.init.normal_(model.head.weight)  # it starts at zero, where all outputs are alike
    return model


@functools.lru_cache(maxsize=1)
def _shared(name):
    return create(name).eval()


TRACED = [name for name in FAMILIES if name.startswith(("skaformer_nano", "cska_vit", "fcska_lsa", "ska_continuous"))]
"""One name per way to make keys, of all hosts: each tracing takes seconds."""


def first(names, rest):
    """Parameters of a test: some names in the suite, the rest marked slow."""
    return names + [pytest.param(name, marks=pytest.mark.slow) for name in rest if name not in names]


@pytest.fixture(params=first(FAMILIES, NAMES), scope="module")  # so that a name's tests follow one another
def name(request):
    return request.param


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(params=first(TRACED, FAMILIES), scope="module")
def traced(request):
    return request.param


def images(name, batch=2, chans=3, size=None):
    torch.manual_seed(1)
    return torch.randn(batch, chans, *(size_of(name) if size is None else size))


def exported(name):
    """What the writers of exports take."""
    card = ModelCard(
        architecture=name,
        mixer=None,
        model_args={},
        img_size=small(name)["img_size"],
        in_chans=3,
        class_names=tuple("abcdefg"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    return Subject("", create(name).eval(), card, images(name, batch=4))


def other_size(name):
    return (48, 32) if "lsa" in name else (96, 64)


def same_output(first, second, name, x=None):
    x = images(name) if x is None else x
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second.eval()(x))


class TestEveryName:
    @pytest.mark.capability("features and head")
    def test_head_and_features(self, name):
        model = _shared(name)
        x = images(name)
        with torch.no_grad():
            features = model.forward_features(x)
            assert torch.equal(model.forward_head(features), model(x))
            assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        assert model(x).shape == (2, 7)
        assert model.get_classifier() is not None

    @pytest.mark.capability("new classifier")
    def test_classifier(self, name):
        model = copy.deepcopy(_shared(name))
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model(images(name)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images(name)).shape == (2, model.num_features)
        assert create(name, num_classes=0)(images(name)).shape == (2, model.num_features)

    @pytest.mark.capability("all parameters learn")
    def test_every_parameter_gets_a_gradient(self, name):
        model = create(name)
        model.train()(images(name)).square().mean().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert missing == []
        # where only the class token is read, the last block's other queries matter to nobody
        tied = [p for n, p in model.named_parameters() if n in model.no_weight_decay() and "blocks.1." not in n]
        assert all(p.grad.abs().sum() > 0 for p in tied)

    @pytest.mark.capability("feature maps at strides")
    def test_intermediates_and_features_only(self, name, record_property):
        model = _shared(name)
        x = images(name)
        indices = (0, 1, 2, 3) if name in FORMERS else (0, 1)
        with torch.no_grad():
            last, maps = model.forward_intermediates(x, indices=indices)
            assert torch.equal(last, model.forward_features(x))
            only = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        assert torch.equal(only[0], maps[-1])
        extractor = create(name, features_only=True, out_indices=indices).eval()
        negative = create(name, features_only=True, out_indices=(-1,)).eval()
        assert [info["num_chs"] for info in extractor.feature_info] == [m.shape[1] for m in maps]
        for feature, taken, stride in zip(extractor(x), maps, extractor.feature_info.reduction(), strict=True):
            assert_close("features", feature, taken)
            assert feature.shape[2:] == tuple(size // stride for size in size_of(name))
        assert_close("negative index", negative(x)[0], maps[-1])
        stride = 4 if "lsa" in name else 8 if name == "small_vit" else 16
        strides = [4, 8, 16, 32] if name in FORMERS else [stride] * 2
        assert extractor.feature_info.reduction() == strides
        record_property("cell", "/".join(map(str, dict.fromkeys(strides))))

    @pytest.mark.capability("img_size=, set_input_size")
    def test_input_sizes(self, name):
        size = other_size(name)
        x = images(name, size=size)
        built = create(name, img_size=size).eval()
        assert built(x).shape == (2, 7)
        model = copy.deepcopy(_shared(name))
        before = model(images(name))
        model.set_input_size(size_of(name))
        assert torch.equal(model(images(name)), before)
        model.set_input_size(size)
        assert model(x).shape == (2, 7)
        grids = [mixer.feat_size for mixer in token_mixers(built).values()]
        assert [mixer.feat_size for mixer in token_mixers(model).values()] == grids
        model.set_input_size(size_of(name))

    @pytest.mark.capability("other sizes at run time")
    def test_input_size_at_run_time(self, name, record_property):
        x = images(name, size=other_size(name))
        model = _shared(name)
        if name in FORMERS:
            assert model(x).shape == (2, 7)
            return
        record_property("cell", "dynamic_img_size")
        with pytest.raises(AssertionError):
            model(x)
        dynamic = create(name, dynamic_img_size=True).eval()
        dynamic.load_state_dict(model.state_dict())
        same_output(dynamic, model, name)
        resized = copy.deepcopy(model)
        resized.set_input_size(other_size(name))
        assert_close("dynamic", dynamic(x), resized(x))

    @pytest.mark.capability("layer decay")
    def test_no_weight_decay_and_layer_decay(self, name):
        model = _shared(name)
        skip = model.no_weight_decay()
        absent = {"dist_token", "reg_token", *(["cls_token"] if name == "small_vit" else [])}
        assert skip - absent <= set(dict(model.named_parameters()))
        keys = ("static_key", "conv_key", "static_key.weight")
        assert any(n.endswith(keys) for n in skip) == (name != "lsa_vit_small_patch4_32")
        groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
        assert len({group["lr_scale"] for group in groups}) > 2
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert not any(id(p) in decayed for n, p in model.named_parameters() if n in skip)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))

    @pytest.mark.capability("copy, pickle, load")
    def test_copies(self, name):
        model = _shared(name)
        same_output(copy.deepcopy(model), model, name)
        same_output(pickle.loads(pickle.dumps(model)), model, name)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        twin = create(name)
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        same_output(twin, model, name)

    @pytest.mark.capability("meta device")
    def test_meta_device(self, name):
        with torch.device("meta"):
            model = create(name)
        assert all(p.is_meta for p in model.parameters())
        model = model.to_empty(device="cpu")
        model.load_state_dict(_shared(name).state_dict())
        same_output(model, _shared(name), name)
        assert all(p.is_meta for p in create(name, device="meta").parameters())

    def test_full_size_on_the_meta_device(self, name):
        with torch.device("meta"):
            model = timm.create_model(name)
            out = model(torch.empty(1, *model.pretrained_cfg["input_size"]))
        assert out.shape == (1, model.num_classes)

    @pytest.mark.capability("load across sizes")
    def test_saved_at_another_size(self, name):
        model = _shared(name)
        size = other_size(name)
        other = create(name, img_size=size).eval()
        state = model.state_dict()
        if name.startswith("skaformer_continuous"):  # nothing in it is tied to a size
            other.load_state_dict(state)
        else:
            with pytest.raises(StaticKeyError, match=r"in the checkpoint.*in the model.*img_size"):
                other.load_state_dict(state)
        other.load_state_dict(checkpoint_filter_fn(state, other))
        resized = copy.deepcopy(model)
        resized.set_input_size(size)
        same_output(other, resized, name, images(name, size=size))

    @pytest.mark.capability("save_for_hf, in_chans")
    def test_hub_folder(self, name, tmp_path):
        model = create(name, img_size=other_size(name))
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        same_output(loaded, model, name, images(name, size=other_size(name)))
        for chans in (1, 4):
            adapted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=chans).eval()
            assert adapted(images(name, chans=chans, size=other_size(name))).shape == (2, 7)
            changed = {n for n, p in model.named_parameters() if not torch.equal(p, adapted.get_parameter(n))}
            assert changed <= {
                "stem.conv.weight",
                *(f"patch_embed.{n}" for n in ("proj.weight", "norm.weight", "norm.bias")),
            }
        resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size_of(name), num_classes=3)
        assert resized(images(name)).shape == (2, 3)

    def test_unknown_argument_is_refused_by_name(self, name):
        with pytest.raises(TypeError, match="widht"):
            create(name, widht=3)

    def test_no_published_weights(self, name):
        start = "weights of your own$" if name == "small_vit" else "warm_start"
        with pytest.raises(StaticKeyError, match=rf"no weights are published for .*pretrained=False.*{start}"):
            timm.create_model(name, pretrained=True)


class TestEveryFamily:
    @pytest.mark.capability("gradient checkpointing")
    def test_gradient_checkpointing(self, family):
        plain, saving = create(family, drop_rate=0.0), create(family, drop_rate=0.0)
        rates = [m for m in [*plain.modules(), *saving.modules()] if isinstance(m, torch.nn.Dropout)]
        for dropout in rates:
            dropout.p = 0.0
        saving.set_grad_checkpointing()
        x = images(family)
        outs = [model.train()(x) for model in (plain, saving)]
        assert_close("output", outs[1], outs[0])
        for out in outs:
            out.square().mean().backward()
        for (n, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert_close(n, b.grad, a.grad)

    def test_two_sizes_in_one_step_under_checkpointing(self, family):
        """As in self-distillation: several crops go through before the first backward, two with as many tokens."""
        kwargs = {} if family in FORMERS else {"dynamic_img_size": True}
        plain, saving = create(family, **kwargs).eval(), create(family, **kwargs).eval()
        saving.set_grad_checkpointing()
        height, width = size_of(family)
        crops = [images(family, size=size) for size in ((height, width), (height, width // 2), (height // 2, width))]
        for model in (plain, saving):
            sum(model(crop).square().mean() for crop in crops).backward()
        for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
            assert_close(name, b.grad, a.grad)
        copy.deepcopy(saving)(crops[1]).mean().backward()
        saving.set_grad_checkpointing(False)
        assert_close("off again", saving(crops[2]), plain(crops[2]))

    def test_dynamic_size_compiles_and_exports(self, traced):
        """At a size the model was not built for and has not seen."""
        model = create(traced, **({} if traced in FORMERS else {"dynamic_img_size": True})).eval()
        x = images(traced, size=other_size(traced))
        program = torch.export.export(model, (x,))
        with torch.no_grad():
            expected = model(x)
            assert_close("exported", program.module()(x), expected)
            turned = x.transpose(2, 3)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            assert_close("compiled", compiled(turned), model(turned))
        torch.compiler.reset()

    @pytest.mark.capability("torch.compile, no break")
    def test_compile_without_breaks(self, traced):
        model = create(traced).eval()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_close("compiled", compiled(images(traced)), model(images(traced)))
        torch.compiler.reset()

    @pytest.mark.capability("torch.export")
    def test_export(self, traced):
        model = create(traced).eval()
        program = torch.export.export(model, (images(traced),))
        with torch.no_grad():
            assert_close("exported", program.module()(images(traced)), model(images(traced)))

    @pytest.mark.slow
    @pytest.mark.capability("ONNX")
    def test_onnx(self, family, tmp_path):
        subject = exported(family)
        run = write_onnx(tmp_path, subject, opset=23)
        with torch.no_grad():
            assert_close("exported", run(subject.images[:1]), subject.model(subject.images[:1]))

    @pytest.mark.slow
    @pytest.mark.capability("ONNX in int8, keys included")
    def test_int8(self, family, tmp_path):
        """Each head's product with a static key is one of matrices, and in 8 bits."""
        onnx = pytest.importorskip("onnx")
        subject = exported(family)
        run = write_int8(tmp_path, subject, opset=23)
        with torch.no_grad():
            wanted = subject.model(subject.images)
        assert (run(subject.images) - wanted).abs().max() < 0.1 * wanted.abs().max()
        nodes = onnx.load(str(tmp_path / "model_int8.onnx")).graph.node
        made = {name: node.op_type for node in nodes for name in node.output}
        ours = [[made.get(name) for name in node.input] for node in nodes if "_head_" in node.name]
        assert all(inputs == ["DequantizeLinear"] * 2 for inputs in ours)
        static = [each for each in token_mixers(subject.model).values() if isinstance(each, StaticKeyAttention)]
        prefixed = [getattr(layer, "prefix_key", None) is not None for layer in static]  # has a key of its own
        assert len(ours) == sum(layer.num_heads * (1 + more) for layer, more in zip(static, prefixed, strict=True))

    @pytest.mark.capability("fx (timm)")
    def test_feature_extractors(self, family):
        model = _shared(family)
        node = "stages.1" if family in FORMERS else "blocks.1"
        extractor = create_feature_extractor(model, [node])
        with torch.no_grad():
            out = extractor(images(family))
            taken = []
            handle = model.get_submodule(node).register_forward_hook(lambda m, i, o: taken.append(o))
            model(images(family))
            handle.remove()
        out = out[node] if isinstance(out, dict) else out[0]
        assert_close("extracted", out, taken[0])


def test_a_metaformer_takes_heads_for_its_mixers_only():
    with pytest.raises(TypeError, match="num_heads"):
        timm.create_model("skaformer_nano", num_heads=4)


def test_names_and_search():
    assert len(NAMES) == 37
    assert len(timm.list_models("*ska*")) == 35
    assert not any(name in timm.list_models(pretrained=True) for name in NAMES)
    modules = set(timm.models.list_modules())
    assert {"static_key_vit", "static_key_former", "lsa_vit", "small_vit"} <= modules
    assert not set(timm.list_models(module="metaformer")) & set(NAMES)


def test_too_small_an_image():
    with pytest.raises(FeatSizeError, match=r"img_size=\(2, 2\) leaves a grid of \(0, 0\) in stage 0"):
        timm.create_model("skaformer_nano", img_size=2)
