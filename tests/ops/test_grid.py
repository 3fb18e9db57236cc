import pytest
import torch
import torch.nn.functional as F

from statickey.errors import FeatSizeError, StaticKeyError
from statickey.ops import (
    reference,
    resample_static_key,
    static_key_attention,
    unfold_queries,
    window_key_rows,
    window_merge,
    window_partition,
)
from tolerances import assert_close, assert_same_with_gradients

GRIDS = [(7, 5), (1, 1), (1, 6), (4, 4)]


@pytest.mark.parametrize("feat_size", GRIDS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_unfold_matches_reference(feat_size, kernel_size):
    query = torch.randn(2, 3, feat_size[0] * feat_size[1], 4, dtype=torch.float64)
    assert_same_with_gradients(
        lambda q: unfold_queries(q, feat_size, kernel_size),
        lambda q: reference.unfold_queries(q, feat_size, kernel_size),
        [query],
    )


def test_unfolded_query_times_weight_is_a_convolution():
    query, weight = torch.randn(2, 1, 35, 4, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    maps = query[:, 0].transpose(1, 2).reshape(2, 4, 7, 5)
    expected = F.conv2d(maps, weight, padding=1).flatten(2).transpose(1, 2)
    assert_close("logits", unfold_queries(query, (7, 5), 3)[:, 0] @ weight.permute(0, 2, 3, 1).flatten(1).T, expected)


def test_unfold_is_laid_out_head_by_head_for_the_product():
    assert unfold_queries(torch.randn(2, 3, 35, 4), (7, 5), 3).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unfold_queries(torch.zeros(1, 1, 6, 2), (2, 2), 3), FeatSizeError, "6 tokens"),
        (lambda: unfold_queries(torch.zeros(1, 4, 2), (2, 2), 3), StaticKeyError, r"query \(1, 4, 2\) must be"),
        (lambda: unfold_queries(torch.zeros(1, 1, 4, 2), (2, 2), 2), StaticKeyError, "kernel_size=2"),
        (lambda: resample_static_key(torch.zeros(1, 5, 2), (2, 2), (3, 3)), FeatSizeError, "5 rows"),
        (lambda: resample_static_key(torch.zeros(1, 4, 2), (2, 2), (0, 3)), FeatSizeError, "positive"),
        (lambda: window_partition(torch.zeros(1, 1, 5, 2), (2, 2), (2, 2)), FeatSizeError, "5 tokens"),
        (lambda: window_partition(torch.zeros(1, 1, 4, 2), (2, 2), (2, 2.0)), FeatSizeError, "positive"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("new", [(9, 4), (3, 5), (14, 10)], ids=str)
def test_resample_matches_reference(new, prefix, trailing):
    key = torch.randn(2, prefix + 35, *trailing, dtype=torch.float64)

    def run(op):
        return lambda k: op(k, (7, 5), new, num_prefix_tokens=prefix)

    assert resample_static_key(key, (7, 5), new, num_prefix_tokens=prefix).shape[1] == prefix + new[0] * new[1]
    if trailing:
        assert_same_with_gradients(run(resample_static_key), run(reference.resample_static_key), [key])


def test_resample_to_the_same_grid_is_the_key_itself():
    key = torch.randn(2, 36, 4)
    assert resample_static_key(key, (7, 5), (7, 5), num_prefix_tokens=1) is key


def test_resample_keeps_prefix_rows_and_constants():
    key = torch.cat([torch.randn(2, 1, 4), torch.full((2, 35, 4), 3.0)], dim=1)
    new = resample_static_key(key, (7, 5), (4, 9), num_prefix_tokens=1)
    assert torch.equal(new[:, :1], key[:, :1])
    assert_close("grid", new[:, 1:], torch.full((2, 36, 4), 3.0))


def test_resample_keeps_half_precision():
    assert resample_static_key(torch.randn(2, 35, 4).bfloat16(), (7, 5), (4, 9)).dtype == torch.bfloat16


@pytest.mark.parametrize("feat_size", [(7, 5), (4, 6), (2, 3), (9, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [(2, 3), (7, 5), (4, 2)], ids=str)
def test_windows_merge_back(feat_size, window):
    tokens = torch.randn(2, 3, feat_size[0] * feat_size[1], 4)
    groups = window_partition(tokens, feat_size, window)
    assert len(groups) <= 4
    assert sum(part.shape[0] * part.shape[2] for _, part in groups) == 2 * tokens.shape[2]
    assert torch.equal(window_merge([part for _, part in groups], feat_size, window), tokens)


def test_windows_compile_whole_for_a_map_of_any_size():
    torch.compiler.reset()
    compiled = torch.compile(window_partition, fullgraph=True, dynamic=True, backend="eager")
    tokens = torch.randn(1, 1, 4 * 6, 2)
    ((shape, windows),) = compiled(tokens, (4, 6), (2, 3))
    assert shape == (2, 3)
    assert torch.equal(windows, window_partition(tokens, (4, 6), (2, 3))[0][1])
    torch.compiler.reset()


@pytest.mark.parametrize("feat_size", [(7, 5), (4, 6), (2, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_windows_with_a_border_have_the_neighbourhoods_of_the_map(feat_size, kernel_size):
    window = (3, 2)
    tokens = torch.randn(2, 3, feat_size[0] * feat_size[1], 4, dtype=torch.float64)

    def by_windows(tokens):
        groups = window_partition(tokens, feat_size, window, border=kernel_size // 2)
        return window_merge([unfold_queries(part, s, kernel_size) for s, part in groups], feat_size, window)

    assert_same_with_gradients(by_windows, lambda x: unfold_queries(x, feat_size, kernel_size), [tokens])


@pytest.mark.parametrize("feat_size", [(7, 5), (4, 6), (2, 2), (3, 3)], ids=str)
def test_windowed_attention_matches_masking(feat_size):
    window = (3, 2)
    num_tokens = feat_size[0] * feat_size[1]
    inputs = [torch.randn(2, 2, num_tokens, 4), torch.randn(2, 6, 4), torch.randn(2, 2, num_tokens, 4)]
    inputs = [x.double() for x in inputs]

    def by_groups(query, key, value):
        pairs = zip(
            window_partition(query, feat_size, window), window_partition(value, feat_size, window), strict=True
        )
        parts = [static_key_attention(q, key[:, window_key_rows(window, s)], v) for (s, q), (_, v) in pairs]
        return window_merge(parts, feat_size, window)

    def by_mask(query, key, value):
        return reference.window_static_key_attention(
            query, key, value, feat_size=feat_size, window_size=window, scale=0.5
        )

    assert_same_with_gradients(by_groups, by_mask, inputs)
