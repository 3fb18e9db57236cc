"""The graph that int8 is made of."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from statickey.export.int8 import _by_head


@pytest.mark.parametrize(("queries", "products"), [((2, "n", 4), 2), (("b", 2, "n", 4), 1), (("n", 4), 1)])
def test_a_product_of_stacks_is_one_for_each_head(tmp_path, queries, products):
    """Where the queries are a stack too; otherwise they are left as they are."""
    keys = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "keys"], ["y"], name="product")],
        "logits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, queries)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(keys, "keys")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    made = _by_head(tmp_path / "m.onnx")
    assert sum(node.op_type == "MatMul" for node in made.graph.node) == products
    assert {len(each.dims) for each in made.graph.initializer} == ({2} if products == 2 else {3})
    x = (
        np.random.default_rng(1)
        .normal(size=[{"b": 2, "n": 5}.get(size, size) for size in queries])
        .astype(np.float32)
    )
    session = onnxruntime.InferenceSession(made.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ keys, atol=1e-6)
