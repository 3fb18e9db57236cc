"""ONNX in int8: products with constants, static keys among them, of a calibrated scale."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert import token_mixers
from ..layers import AttentionMixer
from .formats import FILES, Run, Subject, onnx_program, onnx_session

OPSET = 21
"""The newest to quantise: from 23 on attention is one operator, whose products onnxruntime cannot reach."""
_PRODUCTS = ["MatMul", "Gemm", "Conv"]
_BATCH = 16


def write_int8(place: Path, subject: Subject, opset: int) -> Run:
    """Write an ONNX file whose convolutions, linear layers and products with static keys are in int8.

    Weights and keys are quantised by channel, what they are multiplied with by the range it has on the images.
    Sums leave the products in float32: softmax, norms and the products of two activations stay as they are.

    Args:
        place: Folder of the file.
        subject: What to write; its images calibrate.
        opset: Of ONNX; ``OPSET`` at most.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain = copy.deepcopy(subject.model)
    for mixer in token_mixers(plain).values():
        if isinstance(mixer, AttentionMixer):
            mixer.backend = "math"  # a key that is a constant operand of a product
    with_constants, path = place / "constants.onnx", place / FILES["int8"][0]
    onnx_program(plain, subject, min(opset, OPSET)).save(str(with_constants))
    quant_pre_process(str(with_constants), str(with_constants), skip_symbolic_shape=True)  # folds what is constant
    proto = _by_head(with_constants)
    matrices = {each.name for each in proto.graph.initializer if len(each.dims) == 2}
    quantization.quantize_static(
        proto,
        str(path),
        _Reader(subject.images),
        per_channel=True,
        op_types_to_quantize=_PRODUCTS,
        nodes_to_exclude=[
            node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] not in matrices
        ],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": _PRODUCTS},
    )
    return onnx_session(path)


def _by_head(path: Path) -> Any:
    """A graph in which a product with constants of several heads, (h, ., d) @ (h, d, M), is one product for each.

    Matrices alone are quantised by channel; onnxruntime refuses to run what it makes of such a stack.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(path)
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        query, key = node.inputs
        assert query is not None and key is not None
        keys = key.const_value
        if keys is None or len(keys.shape) != 3 or query.shape is None or query.shape.rank() != 3:
            continue
        heads = keys.numpy()
        split = ir.node("Split", [query], {"axis": 0, "num_outputs": len(heads)}, num_outputs=len(heads))
        products = []
        for i, (part, head) in enumerate(zip(split.outputs, heads, strict=True)):
            constant = ir.Value(name=f"{node.name}_key_{i}", const_value=ir.tensor(head))
            graph.register_initializer(constant)
            products.append(ir.node("MatMul", [part, constant], name=f"{node.name}_head_{i}"))
        joined = ir.node("Concat", [product.outputs[0] for product in products], {"axis": 0})
        made = [split, *products, joined]
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, joined.outputs)
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


class _Reader:
    """The images, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(torch.split(images, _BATCH))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the name of the input, None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}
