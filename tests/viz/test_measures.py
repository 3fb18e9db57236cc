"""What maps and keys amount to."""

import pytest
import torch
from torch.nn import functional as F

from statickey import ConvStaticKeyAttention, StaticKeyAttention
from statickey.errors import StaticKeyError
from statickey.viz import (
    LayerMaps,
    attention_distances,
    attention_rollout,
    average_query_map,
    key_similarity,
)
from tolerances import assert_close


def maps(*shape, grid=(2, 3), key_grid=None, prefix=0):
    weights = torch.rand(*shape).softmax(dim=-1)
    return LayerMaps(weights, grid, grid if key_grid is None else key_grid, prefix)


def test_rollout_is_the_product_of_half_attention_half_identity():
    layers = [maps(2, 3, 7, 7, prefix=1) for _ in range(3)]
    rolled = attention_rollout(layers)
    assert rolled.shape == (2, 7, 7)
    expected = torch.eye(7)
    for layer in layers:
        expected = (layer.weights[1].mean(dim=0) + torch.eye(7)) / 2 @ expected
    assert_close("rollout", rolled[1], expected)
    assert_close("rows", rolled.sum(dim=-1), torch.ones(2, 7))


def test_rollout_through_other_grids_is_refused():
    fewer_keys = maps(1, 1, 6, 2, key_grid=(1, 2))
    for layers, shown in (
        ([maps(1, 1, 6, 6), maps(1, 1, 4, 4, grid=(2, 2))], "2 x 3, 2 x 2"),
        ([fewer_keys], "2 x 3, 1 x 2"),
        ([], "none"),
    ):
        with pytest.raises(StaticKeyError, match=f"all attend on one grid, these are on {shown}"):
            attention_rollout(layers)


def test_distances_are_shares_of_the_diagonal():
    itself = LayerMaps(torch.eye(6).expand(2, 1, 6, 6), (2, 3), (2, 3), 0)
    assert attention_distances(itself).tolist() == [0.0]
    row = torch.zeros(1, 2, 5, 5)
    row[..., 1], row[:, 1] = 1, torch.eye(5)[3]
    found = attention_distances(LayerMaps(row, (2, 2), (2, 2), 1))  # all look at the first place, or at the third
    side = 0.5 / 2**0.5
    assert found.tolist() == pytest.approx([(0 + side + side + 0.5) / 4] * 2)
    uniform = LayerMaps(torch.full((1, 1, 900, 900), 1 / 900), (30, 30), (30, 30), 0)
    assert attention_distances(uniform).item() == pytest.approx(0.37, abs=0.005)


@pytest.mark.parametrize("mixer", [StaticKeyAttention, ConvStaticKeyAttention])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_average_querys_map_is_that_of_the_mean_query(mixer, prefix):
    torch.manual_seed(0)
    layer = mixer(8, 2, feat_size=(2, 3), num_prefix_tokens=prefix).double().requires_grad_(False)
    x = torch.randn(3, prefix + 6, 8, dtype=torch.float64)
    found = average_query_map(LayerMaps(layer.attention_weights(x), (2, 3), (2, 3), prefix))
    query = layer._project(x)[0][:, :, prefix:]
    if mixer is StaticKeyAttention:
        logits = query.mean(dim=(0, 2))[:, None] @ layer.static_key.mT
    else:
        around = query.transpose(1, 2).reshape(3, 2, 3, 8).permute(0, 3, 1, 2)
        convolved = F.conv2d(around, layer.conv_key.flatten(0, 1), layer.conv_bias.flatten(), padding=1, groups=2)
        logits = convolved.mean(dim=(0, 2, 3)).view(2, 1, prefix + 6)
    assert_close("prior", found, (layer.scale * logits).softmax(dim=-1)[:, 0])


def test_an_average_query_of_masked_maps_is_refused():
    weights = torch.rand(1, 1, 6, 6)
    weights[0, 0, 2, 2] = 0
    with pytest.raises(StaticKeyError, match="not known where attention is masked"):
        average_query_map(LayerMaps(weights, (2, 3), (2, 3), 0))


def test_likeness_of_rows_does_not_see_what_they_share():
    key = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    alike = key_similarity(key)
    assert alike.shape == (2, 5, 5)
    assert_close("diagonal", alike.diagonal(dim1=1, dim2=2), torch.ones(2, 5, dtype=torch.float64))
    assert_close("shifted", key_similarity(key + torch.randn(2, 1, 3, 2, 2)), alike)
    opposite = key_similarity(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]))
    assert_close("opposite", opposite[0, 0], torch.tensor([1.0, -1.0], dtype=torch.float64))
