"""What holds for any shape, mask and size of numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statickey import StaticKeyAttention
from statickey.ops import reference, resample_static_key, static_key_attention, unfold_queries
from tolerances import assert_close, assert_same_with_gradients

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
counts = st.integers(1, 4)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
backends = st.sampled_from(["sdpa", "math"])


@st.composite
def calls(draw):
    """Arguments of the op: odd widths, prefix queries, masks that may leave a row nothing."""
    batch, heads, queries, keys, dk, dv = (draw(st.integers(1, most)) for most in (3, 3, 9, 12, 7, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shapes = [(batch, heads, queries, dk), (heads, keys, dk), (batch, heads, keys, dv)]
    if draw(st.booleans()):
        shapes.append((heads, keys))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    allowed = torch.rand(draw(st.sampled_from([1, batch])), 1, queries, keys, generator=generator)
    mask = None if draw(st.booleans()) else allowed < draw(st.floats(0, 1))
    options = {"scale": draw(st.floats(0.1, 2)), "attn_mask": mask}
    if keys >= max(2, queries) and draw(st.booleans()):
        options |= {"mask_diagonal": True, "query_offset": draw(st.integers(0, keys - queries))}
    return inputs, options


@few
@given(calls(), backends)
def test_the_op_is_its_naive_twin(call, backend):
    inputs, options = call

    def run(op, **extra):
        return lambda q, k, v, b=None: op(q, k, v, key_bias=b, **options, **extra)

    assert_same_with_gradients(
        run(static_key_attention, backend=backend), run(reference.static_key_attention), inputs
    )


@few
@given(calls(), backends)
def test_one_vector_on_all_keys_changes_nothing(call, backend):
    (query, key, value, *bias), options = call
    options |= {"key_bias": bias[0] if bias else None, "backend": backend}
    shifted = key + torch.linspace(-2, 2, key.shape[-1], dtype=key.dtype)
    outs = [static_key_attention(query, each, value, **options) for each in (key, shifted)]
    assert_close("shifted", outs[1], outs[0])


@few
@given(calls(), backends, st.sampled_from([torch.bfloat16, torch.float16]), st.floats(1, 1e3))
def test_half_precision_stays_finite(call, backend, dtype, size):
    """Keys so large that logits overflow the type, and rows with nothing to attend to."""
    inputs, options = call
    query, key, value, *bias = ((size if i < 2 else 1) * each for i, each in enumerate(inputs))
    leaves = [each.to(dtype).requires_grad_() for each in (query, key, value, *bias)]
    out = static_key_attention(*leaves[:3], key_bias=leaves[3] if bias else None, backend=backend, **options)
    assert out.isfinite().all()
    if options["attn_mask"] is not None:
        empty = ~options["attn_mask"].any(-1).expand(out.shape[:3])
        assert (out[empty] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum(), leaves))


@few
@given(grids, counts, counts, st.sampled_from([1, 3, 5]))
def test_neighbourhoods_are_their_naive_twin(grid, heads, width, kernel_size):
    query = torch.randn(2, heads, grid[0] * grid[1], width, dtype=torch.float64)
    assert_close("unfolded", *(f(query, grid, kernel_size) for f in (unfold_queries, reference.unfold_queries)))


@few
@given(grids, grids, counts, st.integers(0, 3))
def test_resampling_keeps_prefix_rows_constants_and_size(grid, other, width, prefix):
    key = torch.randn(2, prefix + grid[0] * grid[1], width, dtype=torch.float64)
    there = resample_static_key(key, grid, other, num_prefix_tokens=prefix)
    assert there.shape == (2, prefix + other[0] * other[1], width)
    assert torch.equal(there[:, :prefix], key[:, :prefix])
    assert torch.equal(resample_static_key(key, grid, grid, num_prefix_tokens=prefix), key)
    flat = torch.ones_like(key)
    assert_close("constant", resample_static_key(flat, grid, other, num_prefix_tokens=prefix), torch.ones_like(there))


@few
@given(grids, grids, counts, st.sampled_from(["resample", "window", "pool"]))
def test_a_layer_maps_any_grid(grid, other, heads, off_grid):
    torch.manual_seed(0)
    layer = StaticKeyAttention(4 * heads, heads, feat_size=grid, off_grid=off_grid).double()
    x = torch.randn(2, other[0] * other[1], 4 * heads, dtype=torch.float64)
    out = layer(x, other)
    assert out.shape == x.shape
    if other == grid:
        assert_close("own grid", out, layer(x))
