import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statickey import ConvStaticKeyAttention
from statickey.errors import BackendError
from statickey.layers import HeadMix, SelfAttention
from statickey.ops import kernel, static_key_attention
from tolerances import assert_close, assert_same_with_gradients

interpreted = pytest.mark.skipif(
    not kernel.INTERPRETED, reason="needs triton and TRITON_INTERPRET=1, which is set for machines without a GPU"
)
CASES = {  # batch, heads, queries, keys, query width, value width; options
    "one block": ((2, 3, 35, 35, 4, 4), {}),
    "blocks of queries and keys": ((1, 2, 40, 70, 16, 16), {}),
    "value wider than a block": ((1, 1, 3, 5, 2, 130), {}),
    "query wider than a block": ((2, 1, 3, 5, 80, 3), {}),
    "one query, one key": ((1, 1, 1, 1, 1, 1), {}),
    "no diagonal": ((2, 2, 35, 35, 5, 3), {"mask_diagonal": True}),
    "no diagonal after prefix tokens": ((1, 2, 35, 37, 5, 7), {"mask_diagonal": True, "query_offset": 2}),
    "no diagonal before grid tokens": ((2, 1, 2, 37, 5, 7), {"mask_diagonal": True}),
    "3x3": ((2, 2, 35, 35, 5, 3), {"unfold": ((7, 5), 3)}),
    "3x3, prefix tokens": (
        (1, 2, 35, 38, 3, 4),
        {"unfold": ((5, 7), 3), "mask_diagonal": True, "query_offset": 3},
    ),
    "3x3 with a border": ((2, 1, 35, 17, 3, 2), {"unfold": ((5, 3), 3)}),
    "5x5": ((1, 1, 33, 33, 3, 2), {"unfold": ((3, 11), 5)}),
    "5x5 on a line": ((1, 2, 6, 6, 2, 2), {"unfold": ((1, 6), 5)}),
    "3x3, query wider than a block": ((1, 1, 6, 6, 70, 2), {"unfold": ((2, 3), 3)}),
}


def tensors(batch, heads, queries, keys, dk, dv, unfold=None, dtype=torch.float32, device="cpu"):
    taps = 1 if unfold is None else unfold[1] ** 2
    shapes = ((batch, heads, queries, dk), (heads, keys, taps * dk), (batch, heads, keys, dv), (heads, keys))
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[1] /= taps**0.5
    return [x.to(device, dtype) for x in inputs]


def attend(backend, **options):
    def call(query, key, value, bias=None, scale=0.6):
        return static_key_attention(query, key, value, key_bias=bias, scale=scale, backend=backend, **options)

    return call


def check(case, dtype, device):
    shape, options = CASES[case]
    inputs = [
        *tensors(*shape, unfold=options.get("unfold"), dtype=dtype, device=device),
        torch.tensor(0.4, device=device),
    ]
    assert_same_with_gradients(attend("triton", **options), attend("math", **options), inputs)
    assert_same_with_gradients(attend("triton", **options), attend("math", **options), inputs[:3])


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_is_the_formula(case):
    check(case, torch.float32, "cpu")


@interpreted
@pytest.mark.parametrize("case", ["blocks of queries and keys", "no diagonal", "3x3"])
def test_half_precision(case):
    check(case, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not (kernel.INSTALLED and torch.cuda.is_available()), reason="needs triton and CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_the_gpu(case, dtype):
    check(case, dtype, "cuda")


@interpreted
@pytest.mark.parametrize("options", [{}, {"unfold": ((5, 3), 3)}], ids=["plain", "3x3"])
def test_strided_queries_and_values_are_read_where_they_are(options):
    query, key, value, bias = tensors(2, 3, 15, 15, 4, 4, **options)
    tokens = torch.cat([query.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], dim=2)

    def split(call):
        def run(tokens, key, bias):
            query, value = tokens.view(2, 15, 2, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            assert not query.is_contiguous()
            return call(query, key, value, bias)

        return run

    inputs = [tokens, key, bias]
    assert_same_with_gradients(split(attend("triton", **options)), split(attend("math", **options)), inputs)
    backwards = query.mT.contiguous().mT, key, value.flip(3).mT.contiguous().mT
    assert_close("output", attend("triton", **options)(*backwards), attend("math", **options)(*backwards))


@interpreted
def test_neither_map_nor_unfolded_query_is_stored():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.untyped_storage().size())
            return out

    query, key, value, bias = tensors(2, 2, 35, 35, 4, 4, unfold=((7, 5), 3))
    with torch.no_grad(), Largest() as largest:
        attend("triton", unfold=((7, 5), 3), mask_diagonal=True)(query, key, value, bias)
    assert value.nbytes <= largest.size <= key.nbytes  # the interpreter copies what it is given


@interpreted
def test_output_is_token_major():
    out = attend("triton")(*tensors(2, 3, 9, 9, 4, 4))
    assert out.transpose(1, 2).is_contiguous()


@interpreted
def test_frozen_inputs_get_no_gradient():
    for frozen in range(4):
        inputs = [x.requires_grad_(i != frozen) for i, x in enumerate(tensors(1, 1, 3, 3, 2, 2))]
        attend("triton")(*inputs).sum().backward()
        assert [x.grad is None for x in inputs] == [i == frozen for i in range(4)]


@interpreted
def test_large_keys_stay_finite_in_half_precision():
    query, key, value, bias = tensors(2, 2, 20, 20, 16, 16, dtype=torch.float16)
    out = attend("triton")(query * 30, key * 1000, value, bias * 100, 1.0)
    assert out.dtype == torch.float16
    assert_close("output", out, attend("math")(query * 30, key * 1000, value, bias * 100, 1.0))


@interpreted
def test_a_bias_may_hide_a_whole_block_of_keys():
    query, key, value, bias = tensors(1, 2, 3, 40, 4, 4)
    bias[:, :32] = float("-inf")
    assert_close("output", attend("triton")(query, key, value, bias), attend("math")(query, key, value, bias))


@interpreted
@pytest.mark.parametrize("options", [{}, {"unfold": ((5, 3), 3)}], ids=["plain", "3x3"])
def test_second_derivatives(options):
    inputs = [*tensors(2, 2, 15, 15, 3, 2, **options), torch.tensor(0.4)]
    found = []
    for backend in ("triton", "math"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(backend, mask_diagonal=True, **options)(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for i, (grad, expected) in enumerate(zip(*found, strict=True)):
        assert_close(f"second derivative of input {i}", grad, expected)


@interpreted
@pytest.mark.parametrize("num_prefix_tokens", [0, 2])
def test_layer(num_prefix_tokens):
    layer = ConvStaticKeyAttention(
        12, 2, feat_size=(5, 3), num_prefix_tokens=num_prefix_tokens, learned_temperature=True, mask_diagonal=True
    )
    found = []
    for layer.backend in ("triton", "math"):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 2 * layer.num_tokens * 12).sin().view(2, -1, 12).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        found.append({"output": out, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()})
    for name, expected in found[1].items():
        assert_close(name, found[0][name], expected)


@interpreted
def test_layer_in_windows():
    layer = ConvStaticKeyAttention(12, 2, feat_size=(3, 4), num_prefix_tokens=1, off_grid="window")
    x = torch.randn(2, 1 + 4 * 7, 12)
    outs = []
    for layer.backend in ("triton", "math"):
        outs.append(layer(x, (4, 7)))
    assert_close("output", *outs)


CANNOT = {
    "mask": ({"attn_mask": torch.eye(9).bool()}, "takes no attn_mask; use backend='sdpa'"),
    "dynamic key": ({}, "takes no dynamic key"),
    "dropout": ({"dropout_p": 0.5}, r"has no dropout, but dropout_p=0\.5 .* use backend='sdpa'"),
    "no numbers": ({}, "needs CUDA, but the query is on meta; use backend='sdpa'"),
}


@interpreted
@pytest.mark.parametrize("case", CANNOT)
def test_what_the_kernel_cannot_do_is_refused(case):
    options, message = CANNOT[case]
    query, key, value, _ = tensors(2, 3, 9, 9, 4, 4, device="meta" if case == "no numbers" else "cpu")
    key = key.expand(2, -1, -1, -1) if case == "dynamic key" else key
    with pytest.raises(BackendError, match=message):
        attend("triton", **options)(query, key, value)


@interpreted
def test_layers_refuse_what_the_kernel_cannot_do():
    layer = ConvStaticKeyAttention(12, 2, feat_size=(5, 3), attn_drop=0.5)
    layer.backend = "triton"
    x = torch.randn(1, 15, 12)
    with pytest.raises(BackendError, match=r"dropout_p=0\.5 \(attn_drop of a layer in training\)"):
        layer(x)
    layer.eval()
    assert layer(x).isfinite().all()
    layer.head_mix = HeadMix(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(BackendError, match="talking heads"):
        layer(x)
    dynamic = SelfAttention(12, 2, feat_size=(5, 3))
    dynamic.backend = "triton"
    with pytest.raises(BackendError, match="which self-attention has"):
        dynamic(x)


def _transformed(call, query, key, value):
    return torch.func.vmap(lambda q, v: call(q[None], key, v[None])[0])(query, value)


def _exported(call, *inputs):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    return torch.export.export(Module(), inputs)


def _compiled(call, *inputs):
    torch.compiler.reset()
    return torch.compile(call, backend="eager")(*inputs)


@interpreted
@pytest.mark.parametrize("run", [_transformed, _exported, _compiled])
def test_does_not_run_under(run):
    with pytest.raises(BackendError, match="traced, exported, compiled or transformed"):
        run(attend("triton"), *tensors(2, 3, 9, 9, 4, 4)[:3])


WRONG = {
    "no triton": ({"INSTALLED": False}, torch.float32, "needs triton, which is not installed; use backend='sdpa'"),
    "cpu": ({"INTERPRETED": False}, torch.float32, "needs CUDA, but the query is on cpu; use backend='sdpa'"),
    "float64": ({}, torch.float64, "does not compute in torch.float64; use float32"),
    "bfloat16": ({"INTERPRETED": True}, torch.bfloat16, "cannot compute in torch.bfloat16 under TRITON_INTERPRET=1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case, monkeypatch):
    where, dtype, message = WRONG[case]
    for name, value in ({"INSTALLED": True} | where).items():
        monkeypatch.setattr(kernel, name, value)
    with pytest.raises(BackendError, match=message):
        attend("triton")(*tensors(2, 3, 9, 9, 4, 4, dtype=dtype))


def test_is_importable_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("statickey.ops.kernel_elsewhere", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.INSTALLED


@pytest.mark.slow
@pytest.mark.skipif(not kernel.INSTALLED, reason="needs triton")
def test_compiles_for_gpus_that_are_not_here(tmp_path):
    script = Path(__file__).with_name("compile_kernel.py")
    where = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, script], env=os.environ | where, check=True)
