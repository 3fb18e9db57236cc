"""Weights files that are damaged, or are none."""

import re

import pytest
import torch
from safetensors.torch import save_file

from statickey.errors import OutputError, StaticKeyError
from statickey.models import build_model, checkpoint_filter_fn, load_exactly, read_weights, start_from

ARGS = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 2}


def small(img_size=8):
    return build_model("small_vit", "ska", img_size=img_size, num_classes=2, in_chans=1, model_args=ARGS)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"some text\n", "a.txt"),
        (b"", "a.pt"),
        (b"", "a.safetensors"),
        (b"\x80\x04K\x01.", "a.pth"),
        (b"cos\n", "a.bin"),
    ],
)
def test_a_file_that_holds_no_weights(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        OutputError, match=rf"cannot read weights from .*{name}: .*; give a .safetensors file"
    ) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(OutputError, match=r"no weights file .*; give a .safetensors file or a timm checkpoint"):
        read_weights(tmp_path)


HEAD = "head.weight"
KEY = "blocks.0.attn.static_key"
GRID = "blocks.0.attn._extra_state"
DAMAGE = [
    (HEAD, torch.full((2, 16), float("nan")), "head.weight holds NaN; the run behind it diverged"),
    (HEAD, torch.full((2, 16), float("inf")), "head.weight holds values that are not finite"),
    (
        HEAD,
        torch.zeros(2, 16, dtype=torch.long),
        "head.weight is torch.int64 in the checkpoint, the model has torch.f",
    ),
    (KEY, torch.zeros(2, 16, 8, dtype=torch.int8), "static_key is torch.int8 in the checkpoint"),
    (KEY, torch.zeros(3), r"static_key is \(3,\) in the checkpoint, which is not \(2, \d+, 8\) on another grid"),
    ("pos_embed", torch.zeros(()), r"pos_embed is \(\) in the checkpoint, which is not"),
    (
        GRID,
        torch.tensor(4),
        r"_extra_state in the checkpoint is 4, but must be a grid \(H, W\).*; save the checkpoint again",
    ),
    (GRID, torch.tensor([4, 4, 4]), r"_extra_state in the checkpoint is \[4, 4, 4\], but must be"),
    (GRID, torch.tensor([-4, -4]), r"_extra_state in the checkpoint is \[-4, -4\]"),
    (GRID, torch.tensor([4.5, 4.0]), r"_extra_state in the checkpoint is \[4\.5, 4\.0\]"),
    (GRID, None, "it lacks 'blocks.0.attn._extra_state'"),
]


@pytest.mark.parametrize("img_size", [8, 12])
@pytest.mark.parametrize(("name", "value", "message"), DAMAGE)
def test_a_damaged_tensor_is_named(tmp_path, img_size, name, value, message):
    state = small().state_dict() | {name: value}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "w.safetensors")
    model = small(img_size)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(OutputError, match=message) as caught:
        load_exactly(model, tmp_path / "w.safetensors")
    assert "w.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_sound_weights_load_at_both_sizes(tmp_path):
    save_file(small().state_dict(), tmp_path / "w.safetensors")
    load_exactly(small(), tmp_path / "w.safetensors")
    load_exactly(small(12), tmp_path / "w.safetensors")
    assert start_from(small(12), tmp_path / "w.safetensors").fresh == ()


def test_weights_cast_to_half_load(tmp_path):
    save_file({name: tensor.half() for name, tensor in small().state_dict().items()}, tmp_path / "w.safetensors")
    load_exactly(small(), tmp_path / "w.safetensors")
    load_exactly(small(12), tmp_path / "w.safetensors")


def test_parameters_must_be_finite_to_start_from(tmp_path):
    path = str(tmp_path / "w.safetensors")
    for value in (float("inf"), float("-inf")):
        save_file(small().state_dict() | {KEY: torch.full((2, 16, 8), value)}, path)
        for size in (8, 12):
            with pytest.raises(
                OutputError, match=r"w\.safetensors: blocks\.0\.attn\.static_key holds values that are"
            ):
                start_from(small(size), path)
    save_file({"blocks.0.attn.qkv.weight": torch.full((48, 16), float("inf"))}, path)
    with pytest.raises(
        OutputError, match=r"w\.safetensors: blocks\.0\.attn\.qv\.weight holds values that are not finite"
    ):
        start_from(small(), path)
    save_file(small().state_dict() | {HEAD: torch.full((2, 16), float("inf"))}, path)
    with pytest.raises(StaticKeyError, match=r"w\.safetensors: head\.weight holds values that are not finite; give"):
        build_model(
            "small_vit", "ska", img_size=8, num_classes=2, in_chans=1, model_args=ARGS | {"checkpoint_path": path}
        )


def test_what_is_infinite_and_no_parameter_loads(tmp_path):
    def masked(value):
        model = small()
        model.register_buffer("mask", torch.full((3,), value))
        return model

    save_file(masked(float("-inf")).state_dict(), tmp_path / "w.safetensors")
    for load in (load_exactly, start_from):
        model = masked(0.0)
        load(model, tmp_path / "w.safetensors")
        assert model.mask.isneginf().all()
    save_file(small().state_dict() | {"other": torch.full((3,), float("inf"))}, tmp_path / "w.safetensors")
    assert start_from(small(), tmp_path / "w.safetensors").unused == ("other",)


@pytest.mark.parametrize("value", [3, None, "x", [1.0]])
def test_an_entry_that_is_no_tensor(tmp_path, value):
    state = dict(small().state_dict()) | {HEAD: value}
    torch.save(state, tmp_path / "w.pt")
    message = re.escape(f"head.weight is a {type(value).__name__} in the checkpoint, it must be a tensor")
    for load in (load_exactly, start_from):
        with pytest.raises(StaticKeyError, match=message):
            load(small(), tmp_path / "w.pt")


@pytest.mark.parametrize("grid", [torch.tensor(4), torch.tensor([4, 4, 4]), torch.tensor([0, 4]), {"a": 1}, None])
def test_a_grid_of_another_shape_is_refused_before_anything_is_loaded(grid):
    model = small()
    state = dict(model.state_dict()) | {GRID: grid}
    with pytest.raises(
        StaticKeyError, match=r"blocks.0.attn._extra_state in the checkpoint is .*, but must be a grid"
    ):
        checkpoint_filter_fn(state, model)
    if isinstance(grid, torch.Tensor):
        with pytest.raises(StaticKeyError, match="_extra_state"):
            model.load_state_dict(state)
