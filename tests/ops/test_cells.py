"""Values averaged over the cells of a coarser grid: the attention whose keys are equal within a cell."""

import pytest
import torch

from statickey.errors import FeatSizeError, StaticKeyError
from statickey.ops import (
    cell_sizes,
    kernel,
    pool_cells,
    reference,
    repeat_cells,
    static_key_attention,
    static_key_weights,
)
from tolerances import assert_close, assert_same_with_gradients

GRIDS = [  # map, cells
    ((7, 5), (3, 2)),
    ((6, 4), (3, 2)),
    ((7, 5), (7, 1)),
    ((7, 5), (1, 5)),
    ((2, 9), (2, 4)),
    ((7, 5), (1, 1)),
    ((7, 5), (7, 5)),
    ((1, 1), (1, 1)),
]
grids = pytest.mark.parametrize(("feat_size", "key_size"), GRIDS, ids=str)
prefixes = pytest.mark.parametrize("prefix", [0, 1, 5])
HEADS, WIDTH = 3, 5


@grids
@prefixes
def test_means_over_cells(feat_size, key_size, prefix):
    tokens = torch.randn(2, prefix + feat_size[0] * feat_size[1], 3, dtype=torch.float64)
    args = {"feat_size": feat_size, "key_size": key_size, "num_prefix_tokens": prefix}
    assert_same_with_gradients(lambda x: pool_cells(x, **args), lambda x: reference.pool_cells(x, **args), [tokens])


@grids
@prefixes
def test_every_token_has_the_key_of_its_cell(feat_size, key_size, prefix):
    """Repeated keys average to themselves, and sizes are how often each was repeated."""
    key = torch.randn(HEADS, prefix + key_size[0] * key_size[1], 2, 2)
    repeated = repeat_cells(key, key_size, feat_size, num_prefix_tokens=prefix)
    assert repeated.shape == (HEADS, prefix + feat_size[0] * feat_size[1], 2, 2)
    pooled = pool_cells(repeated.flatten(2), feat_size, key_size, num_prefix_tokens=prefix)
    assert_close("means", pooled, key.flatten(2))
    sizes = cell_sizes(feat_size, key_size, num_prefix_tokens=prefix)
    rows = torch.arange(key.shape[1]).view(1, -1).expand(HEADS, -1)
    times = repeat_cells(rows, key_size, feat_size, num_prefix_tokens=prefix)[0].bincount()
    assert (times == times[0]).all() if sizes is None else torch.equal(sizes, times.float())


def test_cells_are_even_to_a_row_and_the_same_from_both_ends():
    for extent in range(1, 40):
        for cells in range(1, extent + 1):
            rows = repeat_cells(torch.arange(cells).view(1, -1), (cells, 1), (extent, 1))[0]
            times = rows.bincount(minlength=cells)
            assert times.max() - times.min() <= 1
            assert rows.diff().ge(0).all()


@pytest.mark.parametrize("key_size", [(8, 5), (7, 6)])
def test_finer_cells_than_the_map_are_refused(key_size):
    for call in (
        lambda: pool_cells(torch.randn(1, 35, 2), (7, 5), key_size),
        lambda: repeat_cells(torch.randn(1, key_size[0] * key_size[1], 2), key_size, (7, 5)),
        lambda: cell_sizes((7, 5), key_size),
    ):
        with pytest.raises(FeatSizeError, match=r"is finer than the map, feat_size=\(7, 5\)"):
            call()
    with pytest.raises(FeatSizeError, match=r"36 tokens do not fill feat_size=\(7, 5\) with 0 prefix"):
        pool_cells(torch.randn(1, 36, 2), (7, 5), (3, 2))
    with pytest.raises(FeatSizeError, match="key_size") as caught:
        pool_cells(torch.randn(1, 35, 2), (7, 5), (0, 2))
    assert "\n" not in str(caught.value)


@grids
@prefixes
@pytest.mark.parametrize("wide", [False, True], ids=["query", "unfolded query"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_to_cells_is_attention_to_equal_keys(feat_size, key_size, prefix, backend, wide):
    """Outputs and gradients of query, key, bias, values and scale, against all tokens one by one."""
    tokens, cells = feat_size[0] * feat_size[1], key_size[0] * key_size[1]
    taps = 9 if wide else 1
    shapes = [
        (2, HEADS, tokens, WIDTH),
        (HEADS, prefix + cells, taps * WIDTH),
        (HEADS, prefix + cells),
        (2, prefix + tokens, HEADS * 4),
        (),
    ]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[-1] = torch.tensor(0.4, dtype=torch.float64)
    unfold = (feat_size, 3) if wide else None
    grid = {"num_prefix_tokens": prefix}

    def heads(value):
        return value.unflatten(2, (HEADS, 4)).transpose(1, 2)

    def pooled(query, key, bias, value, scale):
        value = heads(pool_cells(value, feat_size, key_size, **grid))
        count = cell_sizes(feat_size, key_size, **grid)
        options = {"key_bias": bias, "scale": scale, "key_count": count, "unfold": unfold}
        return static_key_attention(query, key, value, **options, backend=backend)

    def whole(query, key, bias, value, scale):
        query = reference.unfold_queries(query, *unfold) if wide else query
        key, bias = (repeat_cells(x, key_size, feat_size, **grid) for x in (key, bias))
        return reference.static_key_attention(query, key, heads(value), key_bias=bias, scale=scale)

    assert_same_with_gradients(pooled, whole, inputs)


@pytest.mark.skipif(not kernel.INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_kernel_counts_keys(with_bias):
    query, key, value = torch.randn(2, 2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 2, 5, 4)
    options = {"key_count": torch.tensor([1.0, 4, 6, 4, 6]), "key_bias": torch.randn(2, 5) if with_bias else None}
    expected = static_key_attention(query, key, value, **options, scale=0.3, backend="math")
    assert_close("kernel", static_key_attention(query, key, value, **options, scale=0.3, backend="triton"), expected)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_counts_beside_masks(backend):
    """A count is a key given several times, also where some keys, or the query's own, are hidden."""
    query, key, value = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5)
    times = torch.tensor([1, 3, 1, 2])
    allowed = torch.rand(4, 4) > 0.4
    allowed[2] = False
    hidden = allowed & ~torch.eye(4, dtype=torch.bool)
    repeated = [x.repeat_interleave(times, dim=-2) for x in (key, value)]
    expected = static_key_attention(
        query, *repeated, attn_mask=hidden.repeat_interleave(times, dim=-1), backend=backend
    )
    options = {"attn_mask": allowed, "mask_diagonal": True, "key_count": times.float()}
    assert_close("output", static_key_attention(query, key, value, **options, backend=backend), expected)
    weights = static_key_weights(query, key, **options)
    assert_close("weights", weights @ value, expected)


def test_wrong_counts_are_refused():
    query, key, value = torch.randn(1, 1, 3, 2), torch.randn(1, 3, 2), torch.randn(1, 1, 3, 2)
    for count in (torch.ones(2), torch.ones(1, 3), torch.ones(3, dtype=torch.long)):
        with pytest.raises(StaticKeyError, match=r"key_count .* must be floats \(3,\)"):
            static_key_attention(query, key, value, key_count=count)
        with pytest.raises(StaticKeyError, match=r"key_count .* must be floats \(3,\)"):
            static_key_weights(query, key, key_count=count)
    for count in ([1.0, 1.0, 1.0], 1.0):
        with pytest.raises(
            StaticKeyError, match=rf"key_count is a {type(count).__name__}; pass a tensor of floats \(3"
        ):
            static_key_attention(query, key, value, key_count=count)
    with pytest.raises(StaticKeyError, match="key_count is on meta, the query on cpu"):
        static_key_attention(query, key, value, key_count=torch.ones(3, device="meta"))
