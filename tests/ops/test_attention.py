import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statickey.errors import BackendError, StaticKeyError
from statickey.ops import reference, static_key_attention, static_key_weights
from tolerances import assert_close, assert_same_with_gradients

CASES = {  # batch, heads, queries, keys, query width, value width
    "square": (2, 3, 35, 35, 4, 4),
    "one image": (1, 1, 35, 35, 5, 5),
    "wide query": (2, 2, 35, 36, 27, 3),
    "wide value": (2, 2, 7, 40, 3, 5),
    "two keys": (2, 1, 2, 2, 1, 1),
    "prefix queries": (2, 3, 5, 40, 4, 4),
}
BACKENDS = ("sdpa", "math")


def tensors(batch, heads, queries, keys, dk, dv, dtype=torch.float64, dynamic=False):
    key = (batch, heads, keys, dk) if dynamic else (heads, keys, dk)
    shapes = ((batch, heads, queries, dk), key, (batch, heads, keys, dv), (heads, keys))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "no diagonal"])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, masked, with_bias, backend):
    inputs = tensors(*CASES[case])
    if not with_bias:
        inputs = inputs[:3]
    offset = CASES[case][3] - CASES[case][2]

    def run(op, **extra):
        def call(query, key, value, bias=None):
            return op(query, key, value, key_bias=bias, mask_diagonal=masked, query_offset=offset, scale=0.7, **extra)

        return call

    assert_same_with_gradients(
        run(static_key_attention, backend=backend), run(reference.static_key_attention), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_scale_matches_reference(backend):
    inputs = [*tensors(2, 3, 12, 12, 4, 4), torch.tensor(0.3, dtype=torch.float64)]
    assert_same_with_gradients(
        lambda q, k, v, b, s: static_key_attention(q, k, v, key_bias=b, scale=s, backend=backend),
        lambda q, k, v, b, s: reference.static_key_attention(q, k, v, key_bias=b, scale=s),
        inputs,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_key_is_self_attention(backend):
    query, key, value, _ = tensors(2, 3, 9, 9, 4, 4, dynamic=True)
    out = static_key_attention(query, key, value, backend=backend)
    assert_close("output", out, F.scaled_dot_product_attention(query, key, value))


def test_default_scale_is_of_the_query_width():
    query, key, value, _ = tensors(2, 3, 9, 9, 4, 4)
    assert_close(
        "output", static_key_attention(query, key, value), static_key_attention(query, key, value, scale=0.5)
    )


def test_zero_scale_is_not_taken_for_missing():
    query, key, value, _ = tensors(2, 3, 9, 9, 4, 4)
    out = static_key_attention(query, key, value, scale=0.0)
    assert_close("output", out, value.mean(dim=2, keepdim=True).expand_as(out))


def test_weights_are_the_map_of_the_op():
    query, key, value, bias = tensors(2, 3, 9, 9, 4, 4)
    weights = static_key_weights(query, key, key_bias=bias, mask_diagonal=True)
    assert_close("rows", weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert weights.diagonal(dim1=-2, dim2=-1).eq(0).all()
    out = static_key_attention(query, key, value, key_bias=bias, mask_diagonal=True)
    assert_close("output", weights @ value, out)


def test_common_shift_of_the_key_changes_nothing():
    query, key, value, _ = tensors(2, 3, 9, 9, 4, 4)
    shifted = key + torch.randn(3, 1, 4, dtype=torch.float64)
    assert_close("output", static_key_attention(query, shifted, value), static_key_attention(query, key, value))


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_fused_and_explicit_paths_agree_on_a_key_wider_than_the_value(with_bias):
    query, key, value, bias = tensors(4, 3, 9, 9, 12, 4)
    bias = bias if with_bias else None
    explicit = static_key_attention(query, key, value, key_bias=bias)
    fused = static_key_attention(query, key.expand(4, -1, -1, -1), value, key_bias=bias)  # as a dynamic key
    assert_close("output", explicit, fused)


def test_wide_static_key_is_not_copied_for_every_image():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    query, key, value, _ = tensors(4, 3, 2, 64, 32, 4)
    with Largest() as largest:
        static_key_attention(query, key, value)
    assert largest.numel == key.numel()


@pytest.mark.parametrize("widths", [(4, 4), (4, 12)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_key_is_broadcast_not_copied(monkeypatch, widths, with_bias):
    seen = []
    fused = F.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append(key.stride(0))
        return fused(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    query, key, value, bias = tensors(4, 3, 9, 9, *widths)
    static_key_attention(query, key, value, key_bias=bias if with_bias else None)
    assert seen == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_half_precision_is_finite_for_large_keys(dtype, backend, dropout_p):
    query, key, value, bias = tensors(2, 2, 20, 20, 16, 16, dtype=dtype)
    out = static_key_attention(
        query * 30, key * 1000, value, key_bias=bias * 100, dropout_p=dropout_p, backend=backend, scale=1.0
    )
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_precision(dtype, backend):
    inputs = tensors(2, 2, 20, 20, 16, 16, dtype=dtype)
    query, key, value, bias = inputs
    out = static_key_attention(query, key, value, key_bias=bias, backend=backend)
    wide = [x.double() for x in inputs]
    assert_close("output", out, reference.static_key_attention(*wide[:3], key_bias=wide[3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_whole_weights_and_keeps_the_mean(backend):
    query, key, _, _ = tensors(400, 1, 10, 10, 4, 4)
    value = torch.ones(400, 1, 10, 4, dtype=torch.float64)
    out = static_key_attention(query, key, value, dropout_p=0.5, backend=backend)
    assert out.std() > 0.05
    assert abs(out.mean().item() - 1) < 0.05


def second_derivatives(call, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(call(*leaves).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)


ALLOWED = {  # of 3 heads, 5 queries and 6 keys; the second and the last query of a head see nothing
    "per head": torch.tensor([True, False, True, True, False]).reshape(5, 1) & (torch.rand(3, 5, 6) > 0.3),
    "per query": torch.tensor([True, False, True, True, False]).reshape(5, 1),
    "per image": torch.tensor([True, False]).reshape(2, 1, 1, 1) & (torch.arange(6) < 4),
    "nothing": torch.zeros(1, dtype=torch.bool),
}


@pytest.mark.parametrize("dk", [4, 12], ids=["narrow key", "wide key"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("added", [False, True], ids=["boolean", "added"])
@pytest.mark.parametrize("case", ALLOWED)
def test_a_row_in_which_nothing_is_allowed_gives_zeros(case, added, backend, dk):
    allowed = ALLOWED[case]
    inputs = tensors(2, 3, 5, 6, dk, 4)
    if added:
        inputs.append(torch.randn(allowed.shape, dtype=torch.float64).masked_fill(~allowed, float("-inf")))

    def run(op, **extra):
        def call(query, key, value, bias, mask=allowed):
            return op(query, key, value, key_bias=bias, attn_mask=mask, scale=0.7, **extra)

        return call

    assert_same_with_gradients(
        run(static_key_attention, backend=backend), run(reference.static_key_attention), inputs
    )
    empty = ~allowed.expand(2, 3, 5, 6).any(-1)
    leaves = [x.requires_grad_() for x in inputs]
    out = run(static_key_attention, backend=backend)(*leaves)
    assert out[empty].eq(0).all()
    out.sum().backward()
    assert leaves[0].grad[empty].eq(0).all()
    assert all(x.grad.isfinite().all() for x in leaves)
    if not empty.all():
        assert leaves[0].grad[~empty].abs().sum() > 0
    weights = static_key_weights(*leaves[:2], key_bias=leaves[3], attn_mask=leaves[4] if added else allowed)
    assert_close("rows", weights.sum(-1), (~empty).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_and_the_diagonal_may_leave_nothing_together(backend):
    query, key, value, bias = tensors(2, 3, 6, 6, 12, 4)
    own = torch.eye(6, dtype=torch.bool)
    call = {"key_bias": bias, "mask_diagonal": True, "backend": backend}
    assert static_key_attention(query, key, value, attn_mask=own, **call).eq(0).all()
    out = static_key_attention(query, key, value, attn_mask=own | (torch.arange(6) < 1), **call)
    assert out[:, :, 0].eq(0).all()
    assert_close("the first value", out[:, :, 1:], value[:, :, :1].expand(-1, -1, 5, -1))


@pytest.mark.parametrize("transform", ["grad", "hessian", "vectorized", "batched", "functional", "forward"])
def test_every_way_of_asking_for_derivatives(transform):
    inputs = tensors(2, 2, 6, 6, 27, 2)
    inputs[0] = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    found = {}
    for backend in BACKENDS:

        def call(query, key, value, bias, backend=backend):
            return static_key_attention(query, key, value, key_bias=bias, unfold=((3, 2), 3), backend=backend)

        def loss(*inputs, call=call):
            return call(*inputs).square().sum()

        leaves = [x.clone().requires_grad_() for x in inputs]
        if transform == "grad":
            result = second_derivatives(call, inputs)
        elif transform in ("hessian", "vectorized"):
            rows = torch.autograd.functional.hessian(loss, tuple(inputs), vectorize=transform == "vectorized")
            result = [block for row in rows for block in row]
        elif transform == "batched":
            out = call(*leaves)
            result = torch.autograd.grad(out, leaves, torch.stack([out, out.cos()]).detach(), is_grads_batched=True)
        elif transform == "functional":
            rows = torch.func.hessian(loss, (0, 1, 2, 3))(*inputs)
            result = [block for row in rows for block in row]
        else:
            with torch.autograd.forward_ad.dual_level():
                out = call(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0].cos()), *inputs[1:])
                result = [torch.autograd.forward_ad.unpack_dual(out).tangent]
        found[backend] = result
    for actual, expected in zip(*found.values(), strict=True):
        assert_close(transform, actual, expected)


def test_one_input_may_be_made_from_another():
    query, key, value, _ = tensors(2, 2, 6, 6, 9, 6)

    def by(backend):
        return lambda q, k, v: static_key_attention(q * k.sum(), k * k, v + q[..., :6], backend=backend)

    actual, expected = (second_derivatives(by(backend), [query, key, value]) for backend in BACKENDS)
    for left, right in zip(actual, expected, strict=True):
        assert_close("second derivative", left, right)


WRONG = {
    "heads": (lambda q, k, v, b: static_key_attention(q, k[:2], v), "with 2 images, 3 heads"),
    "width": (lambda q, k, v, b: static_key_attention(q[..., :3], k, v), "width 3 the key must be"),
    "value": (lambda q, k, v, b: static_key_attention(q, k, v[:, :, :5]), r"value \(2, 3, 5, 4\) must be"),
    "bias": (lambda q, k, v, b: static_key_attention(q, k, v, key_bias=b[:, :4]), r"key_bias \(3, 4\)"),
    "rank": (lambda q, k, v, b: static_key_attention(q[0], k, v), r"query \(3, 9, 4\) must be"),
    "type": (lambda q, k, v, b: static_key_attention(q, k.float(), v), "key is torch.float32"),
    "offset": (
        lambda q, k, v, b: static_key_attention(q, k, v, mask_diagonal=True, query_offset=1),
        "query_offset=1",
    ),
    "dropout": (lambda q, k, v, b: static_key_attention(q, k, v, dropout_p=1.5), "dropout_p=1.5"),
    "scale": (lambda q, k, v, b: static_key_attention(q, k, v, scale=torch.ones(3, 1, 1)), r"scale \(3, 1, 1\)"),
    "nan scale": (lambda q, k, v, b: static_key_attention(q, k, v, scale=float("nan")), "scale=nan must be a finite"),
    "infinite scale": (
        lambda q, k, v, b: static_key_weights(q, k, scale=-float("inf")),
        "scale=-inf must be a finite",
    ),
    "named scale": (lambda q, k, v, b: static_key_attention(q, k, v, scale="auto"), "scale='auto' must be a finite"),
    "integer scale": (
        lambda q, k, v, b: static_key_attention(q, k, v, scale=torch.tensor(1)),
        r"scale \(\) of torch.int64 must be",
    ),
    "integer query": (lambda q, k, v, b: static_key_attention(q.long(), k.long(), v.long()), "query is torch.int64;"),
    "integer value": (lambda q, k, v, b: static_key_attention(q, k, v.long()), "value is torch.int64"),
    "complex query": (
        lambda q, k, v, b: static_key_weights(q.to(torch.complex64), k.to(torch.complex64)),
        "query is torch.complex64; attention needs a floating-point dtype",
    ),
    "integer mask": (
        lambda q, k, v, b: static_key_attention(q, k, v, attn_mask=torch.ones(9, 9, dtype=torch.int64)),
        "attn_mask is torch.int64; pass bool",
    ),
    "complex mask": (
        lambda q, k, v, b: static_key_weights(q, k, attn_mask=torch.zeros(9, 9, dtype=torch.complex64)),
        "attn_mask is torch.complex64",
    ),
    "mask elsewhere": (
        lambda q, k, v, b: static_key_attention(q, k, v, attn_mask=torch.zeros(9, 9, device="meta")),
        "attn_mask is on meta, the query on cpu",
    ),
    "one key": (
        lambda q, k, v, b: static_key_attention(q[:, :, :1], k[:, :1], v[:, :, :1], mask_diagonal=True),
        "at least 2 keys",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    call, message = WRONG[case]
    with pytest.raises(StaticKeyError, match=message):
        call(*tensors(2, 3, 9, 9, 4, 4))


def test_unknown_backend_is_named():
    with pytest.raises(BackendError, match="unknown backend 'flash'; choose one of math, sdpa"):
        static_key_attention(*tensors(2, 3, 9, 9, 4, 4)[:3], backend="flash")


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_fused_kernel_runs_in_training(with_bias):
    query, key, value, bias = (x.float().requires_grad_() for x in tensors(2, 3, 35, 35, 4, 18))
    with torch.profiler.profile() as profile:
        static_key_attention(query, key, value, key_bias=bias if with_bias else None).sum().backward()
    kernels = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in kernels
    assert "aten::_scaled_dot_product_attention_math" not in kernels
