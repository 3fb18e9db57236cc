import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statickey.errors import StaticKeyError
from statickey.ops import static_key_attention, tiles, unfold_queries
from statickey.ops.grid import fold_queries
from tolerances import assert_close, assert_same_with_gradients

BATCH, HEADS, QUERIES, KEYS, WIDE, DV = 3, 4, 7, 9, 12, 3
ROW = KEYS + WIDE
SPLITS = {  # numbers of a tile: how many heads, images and rows it then has
    "rows of one image": 2 * ROW,
    "less than a row": 1,
    "one image": QUERIES * ROW,
    "two images of three": 2 * QUERIES * ROW + 1,
    "one head": BATCH * QUERIES * ROW,
    "three heads of four": 3 * BATCH * QUERIES * ROW,
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
    monkeypatch.setattr(tiles, "TILE_NUMEL", SPLITS[split])
    monkeypatch.setattr(tiles, "KEPT_NUMEL", 10**6 if kept else 0)
    inputs = tensors()
    if MASKS[mask] is not None:
        inputs.append(torch.randn(MASKS[mask], dtype=torch.float64))
    assert_same_with_gradients(attend("sdpa"), attend("math"), inputs)


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_frozen_inputs_get_no_gradient(kept, monkeypatch):
    monkeypatch.setattr(tiles, "KEPT_NUMEL", 10**6 if kept else 0)
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
    monkeypatch.setattr(tiles, "TILE_NUMEL", 100)
    for kept, whole in ((0, False), (10**6, True)):
        monkeypatch.setattr(tiles, "KEPT_NUMEL", kept)
        query, key, value, _ = (torch.randn(shape) for shape in ((2, 2, 50, 6), (2, 50, 6), (2, 2, 50, 2), (1,)))
        query.requires_grad_()
        with Sizes() as sizes:
            static_key_attention(query, key, value).sum().backward()
        assert (sizes.largest >= 2 * 2 * 50 * 50) == whole


@pytest.mark.parametrize("num_tokens", [15, 35], ids=["grid", "with a border"])
@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
@pytest.mark.parametrize("split", [1, 80, 15 * 33, 2 * 15 * 33, 3 * 15 * 33, 2 * 3 * 15 * 33, 10**6])
def test_unfolding_tile_by_tile_is_unfolding(split, kept, num_tokens, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", split)
    monkeypatch.setattr(tiles, "KEPT_NUMEL", 10**6 if kept else 0)
    shapes = ((3, 4, num_tokens, 2), (4, 15, 18), (3, 4, 15, 3), (4, 15))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    options = {"unfold": ((5, 3), 3), "scale": 0.4}
    assert_same_with_gradients(
        lambda q, k, v, b: static_key_attention(q, k, v, key_bias=b, **options),
        lambda q, k, v, b: static_key_attention(unfold_queries(q, (5, 3), 3), k, v, key_bias=b, scale=0.4),
        inputs,
    )
    assert_same_with_gradients(
        lambda q, k, v, b: static_key_attention(q, k, v, key_bias=b, **options),
        lambda q, k, v, b: static_key_attention(q, k, v, key_bias=b, backend="math", **options),
        inputs,
    )


@pytest.mark.parametrize(("num_tokens", "bordered"), [(35, False), (99, True)])
def test_folding_is_the_adjoint_of_unfolding(num_tokens, bordered):
    query, other = torch.randn(2, 3, num_tokens, 4).double(), torch.randn(2, 3, 35, 100).double()
    inner = (unfold_queries(query, (7, 5), 5) * other).sum()
    assert_close("inner product", (query * fold_queries(other, (7, 5), 5, bordered=bordered)).sum(), inner)


@pytest.mark.parametrize(
    ("unfold", "message"),
    [
        (((2, 2), 3), "query has 15 tokens, feat_size=\\(2, 2\\) makes 4, or 16 with a border for kernel_size=3"),
        (((5, 3), 2), "kernel_size=2"),
        (((5, 3), 5), "differ: with 3 images, 4 heads and width 50"),
    ],
)
def test_unfolding_that_does_not_fit_is_refused(unfold, message):
    inputs = torch.randn(3, 4, 15, 2), torch.randn(4, 15, 18), torch.randn(3, 4, 15, 3)
    with pytest.raises(StaticKeyError, match=message):
        static_key_attention(*inputs, unfold=unfold)


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
