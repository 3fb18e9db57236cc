import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statickey.ops import static_key_attention, tiles, unfold_queries
from tolerances import assert_close, assert_same_with_gradients

BATCH, HEADS, QUERIES, KEYS, WIDE, DV = 3, 4, 7, 9, 12, 3
SPLITS = {  # logits of a tile: how many heads, images and rows it then has
    "rows of one image": 2 * KEYS,
    "less than a row": 1,
    "one image": QUERIES * KEYS,
    "two images of three": 2 * QUERIES * KEYS + 1,
    "one head": BATCH * QUERIES * KEYS,
    "three heads of four": 3 * BATCH * QUERIES * KEYS,
    "all": 10**6,
}
MASKS = {
    "none": None,
    "per map": (QUERIES, KEYS),
    "per head": (HEADS, QUERIES, KEYS),
    "per image": (BATCH, 1, 1, KEYS),
    "full": (BATCH, HEADS, QUERIES, KEYS),
}


def tensors(dtype=torch.float64):
    shapes = ((BATCH, HEADS, QUERIES, WIDE), (HEADS, KEYS, WIDE), (BATCH, HEADS, KEYS, DV), (HEADS, KEYS))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def attend(backend):
    def call(query, key, value, bias, mask=None):
        return static_key_attention(query, key, value, key_bias=bias, attn_mask=mask, scale=0.4, backend=backend)

    return call


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_tiles_are_the_whole_map(split, mask, kept, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", SPLITS[split])
    monkeypatch.setattr(tiles, "KEPT", 10**6 if kept else 0)
    inputs = tensors()
    if MASKS[mask] is not None:
        inputs.append(torch.randn(MASKS[mask], dtype=torch.float64))
    assert_same_with_gradients(attend("sdpa"), attend("math"), inputs)


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_frozen_inputs_get_no_gradient(kept, monkeypatch):
    monkeypatch.setattr(tiles, "KEPT", 10**6 if kept else 0)
    for frozen in range(4):
        inputs = [x.requires_grad_(i != frozen) for i, x in enumerate(tensors())]
        attend("sdpa")(*inputs).sum().backward()
        assert [x.grad is None for x in inputs] == [i == frozen for i in range(4)]


class Sizes(TorchDispatchMode):
    """Elements of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().size() // out.element_size())
        return out


def test_a_large_map_is_never_whole(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 100)
    for kept, whole in ((0, False), (10**6, True)):
        monkeypatch.setattr(tiles, "KEPT", kept)
        query, key, value, _ = (torch.randn(shape) for shape in ((2, 2, 50, 6), (2, 50, 6), (2, 2, 50, 2), (1,)))
        query.requires_grad_()
        with Sizes() as sizes:
            static_key_attention(query, key, value).sum().backward()
        assert (sizes.largest >= 2 * 2 * 50 * 50) == whole


def test_unfolded_queries_are_not_copied(monkeypatch):
    query = torch.randn(2, 2, 25, 4)
    unfolded = unfold_queries(query, (5, 5), 3)
    assert [tile.of(unfolded).flatten(1, 2).data_ptr() for tile in tiles._tiles(unfolded.shape, 25)] == [
        unfolded.data_ptr()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_float32_logits(dtype):
    inputs = tensors(dtype)
    inputs[1] = inputs[1] * 1000  # beyond float16's range as a logit
    out = attend("sdpa")(*inputs)
    assert out.dtype == dtype
    assert_close("output", out, attend("math")(*inputs))


def test_function_transforms_still_work():
    query, key, value, bias = tensors()

    def loss(query, key, value, bias):
        return attend("sdpa")(query[None], key, value[None], bias).sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, 0, None))(query, key, value, bias)
    query.requires_grad_()
    attend("sdpa")(query, key, value, bias).sum().backward()
    assert_close("gradient", per_image, query.grad)
