import pytest
import torch
import torch.nn.functional as F

from statickey.ops import attention, convolution, reference, static_key_attention, tiles
from statickey.ops.convolution import convolved_attention, is_convolved
from statickey.ops.grid import unfold_queries
from statickey.ops.tiles import tiled_attention
from tolerances import assert_close, assert_same_with_gradients

GRID, TOKENS, HEADS, DIM = (7, 5), 35, 3, 5


def tensors(batch, *, prefix=0, bordered=False, kernel_size=3, dtype=torch.float64):
    """Query, key, value and bias; prefix tokens are keys without a place on the grid."""
    keys, around = TOKENS + prefix, (kernel_size - 1) * bordered
    queries = (GRID[0] + around) * (GRID[1] + around)
    shapes = (
        (batch, HEADS, queries, DIM),
        (HEADS, keys, DIM * kernel_size**2),
        (batch, HEADS, keys, 4),
        (HEADS, keys),
    )
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("images", [1, 2, 5], ids="{} at a time".format)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_is_the_convolution_of_the_paper(kernel_size, batch, images, with_bias, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", images * HEADS * TOKENS * TOKENS)

    def plain(query, key, value, bias=None):
        filters = key.unflatten(2, (kernel_size, kernel_size, DIM)).permute(0, 1, 4, 2, 3)
        return reference.conv_static_key_attention(query, filters, bias, value, feat_size=GRID, scale=1.0)

    def ours(query, key, value, bias=None):
        return convolved_attention(query, key, bias, value, None, (GRID, kernel_size))

    assert_same_with_gradients(ours, plain, tensors(batch, kernel_size=kernel_size)[: 3 + with_bias])


@pytest.mark.parametrize("of", ["map", "head", "image"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("bordered", [False, True], ids=["grid", "with a border"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_prefix_borders_and_masks(prefix, bordered, batch, of, monkeypatch):
    keys = TOKENS + prefix
    monkeypatch.setattr(tiles, "TILE_NUMEL", 2 * HEADS * TOKENS * keys)
    monkeypatch.setattr(convolution, "UNFOLDED_TOKENS", TOKENS)  # one image is unfolded without gradients
    extents = {"map": (TOKENS, keys), "head": (HEADS, TOKENS, keys), "image": (batch, 1, 1, keys)}[of]
    inputs = [*tensors(batch, prefix=prefix, bordered=bordered), torch.randn(extents, dtype=torch.float64)]

    def ours(query, key, value, bias, mask):
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return convolved_attention(query, key, bias, value, mask, (GRID, 3))

    def plain(query, key, value, bias, mask):
        unfolded = unfold_queries(query, GRID, 3)
        return reference.static_key_attention(unfolded, key, value, key_bias=bias, attn_mask=mask, scale=1.0)

    assert_same_with_gradients(ours, plain, inputs)
    with torch.no_grad():
        assert_close("output", ours(*inputs), plain(*inputs))


@pytest.mark.parametrize("batch", [1, 3])
def test_second_derivatives(batch, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_NUMEL", 1)
    shapes = ((batch, 2, 6, 2), (2, 6, 18), (2, 6), (batch, 2, 6, 2))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def call(query, key, bias, value):
        return convolved_attention(query, key, bias, value, None, ((3, 2), 3))

    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


CHOICES = {  # tokens along one side, heads, width: forward, and with gradients
    (4, 16, 16): (True, True),
    (7, 16, 32): (True, True),
    (8, 16, 16): (True, True),
    (14, 10, 24): (True, False),
    (14, 10, 32): (True, True),
    (14, 20, 16): (True, False),
    (16, 4, 64): (True, True),
    (16, 10, 24): (True, False),
    (28, 8, 16): (False, False),
    (28, 4, 64): (False, False),
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize("shape", CHOICES, ids=str)
def test_what_is_convolved(shape):
    side, heads, dim = shape
    query, key = torch.empty(1, heads, side**2, dim), torch.empty(heads, side**2, 9 * dim)
    unfold = ((side, side), 3)
    with torch.no_grad():
        forward = is_convolved(query, key, unfold)
    assert (forward, is_convolved(query, key, unfold)) == CHOICES[shape]
    assert not is_convolved(query.double(), key.double(), unfold)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize(
    ("batch", "grad", "unfolds"), [(4, False, True), (5, False, False), (1, True, False)], ids=str
)
def test_a_key_is_its_convolutions_weight_without_a_copy(batch, grad, unfolds, monkeypatch):
    weights, taken = [], []
    conv2d, unfold = F.conv2d, convolution.unfold_queries

    def spy(maps, weight, *args, **kwargs):
        weights.append(weight.data_ptr())
        return conv2d(maps, weight, *args, **kwargs)

    def unfolding(*args):
        taken.append(True)
        return unfold(*args)

    monkeypatch.setattr(F, "conv2d", spy)
    monkeypatch.setattr(convolution, "unfold_queries", unfolding)
    query, key, value = torch.randn(batch, 2, 16, 5), torch.randn(2, 16, 45), torch.randn(batch, 2, 16, 4)
    with torch.set_grad_enabled(grad):
        out = static_key_attention(query, key, value, scale=0.4, unfold=((4, 4), 3))
    expected = reference.static_key_attention(unfold_queries(query, (4, 4), 3), key, value, scale=0.4)
    assert_close("output", out, expected)
    assert (weights, bool(taken)) == ([] if unfolds else [key.data_ptr()], unfolds)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_the_op_chooses(monkeypatch):
    taken = []
    for name, function in (("convolved", convolved_attention), ("tiled", tiled_attention)):

        def spy(*args, name=name, function=function):
            taken.append(name)
            return function(*args)

        monkeypatch.setattr(attention, f"{name}_attention", spy)
    query, key, value, bias = tensors(2, dtype=torch.float32)
    expected = static_key_attention(query, key, value, key_bias=bias, unfold=(GRID, 3), backend="math")
    assert_close("output", static_key_attention(query, key, value, key_bias=bias, unfold=(GRID, 3)), expected)
    unfolded = unfold_queries(query, GRID, 3)
    assert_close("output", static_key_attention(unfolded, key, value, key_bias=bias), expected)
    monkeypatch.setattr(convolution, "KEPT_EXTENT", 1)
    assert_close("output", static_key_attention(query, key, value, key_bias=bias, unfold=(GRID, 3)), expected)
    assert taken == ["convolved", "tiled", "tiled"]


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_float32_under_autocast_and_in_bfloat16(batch, monkeypatch):
    seen, softmax = [], torch.Tensor.softmax

    def spy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return softmax(logits, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    inputs = tensors(batch, dtype=torch.bfloat16)
    expected = static_key_attention(*inputs[:3], key_bias=inputs[3], unfold=(GRID, 3), backend="math")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = static_key_attention(*inputs[:3], key_bias=inputs[3], unfold=(GRID, 3))
    assert out.dtype == torch.bfloat16
    assert_close("output", out, expected)
    assert set(seen) == {torch.float32}
