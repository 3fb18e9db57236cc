"""The suites: which contenders are measured, against what, and what the ratios are to be at most."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .._files import explained_read, read_json, read_yaml
from ..layers import MIXERS, StaticKeyAttention
from .contender import (
    PLAIN_CSKA,
    TIMM_MHSA,
    Contender,
    LayerShape,
    Targets,
    layer,
    model,
    network,
    op,
)

LAYERS = (
    LayerShape((14, 14), 384, 6, num_prefix_tokens=1),
    LayerShape((28, 28), 128, 8),
    LayerShape((14, 14), 320, 10),
    LayerShape((14, 14), 320, 20),
    LayerShape((7, 7), 512, 16),
)
FCSKA_TARGETS = Targets(1.20, 1.30)
LAYER_TARGETS = {
    (LAYERS[0], "ska"): Targets(0.85, 0.88),
    (LAYERS[1], "cska"): Targets(0.35, 0.50, memory=0.30),
    (LAYERS[2], "ska"): Targets(0.85, 0.90),
    (LAYERS[3], "cska"): Targets(0.80, 0.80),
    (LAYERS[4], "ska"): Targets(0.85, 0.90),
}
SIDES, WIDTHS, BATCHES = (4, 7, 8, 14, 16, 28, 32), (16, 24, 32, 48, 64), (1, 8, 64)
"""Of the grid of shapes: tokens along a side, channels of a head, of which as many as make at most 256, images."""
MOST_MAP_BYTES = 1 << 29
"""Largest float32 map in the grid of shapes; the plain convolution needs several times as much memory."""
RESOLUTIONS = (224, 384, 512, 768, 1024, 1536)
KERNEL = ", triton"
"""What is added to the name of a mixer that runs with the kernel."""
STRIDE, BUILT_FOR = 8, (28, 28)
"""The second stage of a MetaFormer, built for images of 224 pixels."""


def layers(mixers: Sequence[str], kernel: bool = False) -> list[Contender]:
    """Attention layers at the shapes of ViT-S and of the stages of a MetaFormer.

    Args:
        mixers: Names of token mixers.
        kernel: Measure static keys with the op's Triton kernel too, against themselves without.
    """
    rows = []
    for shape in LAYERS:

        def row(name: str, against: str | None, shape: LayerShape = shape, **options: Any) -> Contender:
            return Contender(str(shape), name, partial(layer, shape, name), against, **options)

        with_plain = "cska" in mixers and not shape.num_prefix_tokens
        rows.append(row(TIMM_MHSA, None))
        if with_plain:
            rows.append(row(PLAIN_CSKA, None))
        for mixer in mixers:
            against = {"cska": PLAIN_CSKA if with_plain else TIMM_MHSA, "fcska": "ska"}.get(mixer, TIMM_MHSA)
            if against == "ska" and "ska" not in mixers:
                against = TIMM_MHSA
            targets = FCSKA_TARGETS if against == "ska" else LAYER_TARGETS.get((shape, mixer), Targets())
            twin = partial(layer, shape, PLAIN_CSKA) if against == PLAIN_CSKA else None
            rows.append(row(mixer, against, targets=targets, twin=twin))
            made = MIXERS[mixer]
            if kernel and isinstance(made, type) and issubclass(made, StaticKeyAttention):
                make = partial(layer, shape, mixer, backend="triton")
                rows.append(Contender(str(shape), f"{mixer}{KERNEL}", make, mixer))
    return rows


def models(mixers: Sequence[str], batch: int = 8) -> list[Contender]:
    """Whole networks against timm's."""
    rows = []
    vit, former = "vit_small_patch16_224", "caformer_s18"
    group = f"ViT-S, 224 pixels, batch {batch}"
    rows.append(Contender(group, vit, partial(model, vit, batch)))
    for mixer in mixers:
        targets = Targets(0.93, 0.95) if mixer == "ska" else Targets()
        name = f"{mixer}_{vit}"
        rows.append(Contender(group, name, partial(model, name, batch), vit, targets=targets))
    group = f"MetaFormer S18, 224 pixels, batch {batch}"
    rows.append(Contender(group, former, partial(model, former, batch)))
    for mixer in mixers:
        name = f"{mixer}former_s18"
        if mixer == "cska":
            plain_name = f"{name}, plain convolution"
            plain = partial(model, name, batch, plain_cska=True)
            rows.append(Contender(group, plain_name, plain, former))
            rows.append(
                Contender(
                    group, name, partial(model, name, batch), plain_name, targets=Targets(0.50, 0.60), twin=plain
                )
            )
        else:
            targets = Targets(1.08, 1.12) if mixer == "fcska" else Targets()
            rows.append(Contender(group, name, partial(model, name, batch), former, targets=targets))
    return rows


def resolution(mixers: Sequence[str]) -> list[Contender]:
    """The second stage's layer from 224 to 1536 pixels, windows of its grid against attention to all: per token."""
    rows = []
    for size in RESOLUTIONS:
        shape = LayerShape((size // STRIDE, size // STRIDE), 128, 8, batch=1)
        for name in (TIMM_MHSA, *mixers):
            windows = None if name == TIMM_MHSA else BUILT_FOR
            first = size == RESOLUTIONS[0]
            rows.append(
                Contender(
                    "stage 2 (stride 8, 128 channels, 8 heads), one image of so many pixels, ratios per token",
                    f"{name} {size}",
                    partial(layer, shape, name, windows),
                    None if first else f"{name} {RESOLUTIONS[0]}",
                    units=shape.num_tokens,
                    checked=first or windows is not None,
                    targets=Targets(1.15) if (name, size) == ("cska", 1024) else Targets(),
                )
            )
    return rows


def training(mixers: Sequence[str], compared: Path | None = None, batch: int = 64) -> list[Contender]:
    """The network of a comparison, or the built-in one at 32 pixels, against itself with self-attention."""
    name = "small_vit"
    args: dict[str, Any] = {"img_size": 32, "num_classes": 10, "in_chans": 3, "model_args": {}}
    if compared is not None:
        name, args, batch = _compared(Path(compared))
    group = f"{name}, {args['img_size']} pixels, batch {batch}"
    return [
        Contender(
            group,
            mixer,
            partial(network, name, mixer, batch=batch, **args),
            None if mixer == "mhsa" else "mhsa",
        )
        for mixer in ("mhsa", *(m for m in mixers if m != "mhsa"))
    ]


def _compared(folder: Path) -> tuple[str, dict[str, Any], int]:
    """The network of a folder of ``compare``: its name, arguments and batch size.

    Raises:
        OutputError: It is no such folder.
    """
    remedy = "give --compared a folder that compare has filled"
    config = read_yaml(folder / "config.yaml", remedy)
    card = read_json(next(folder.glob("runs/*/config.json"), folder / "runs"), remedy)
    with explained_read(folder, remedy):
        in_chans, _, img_size = card["pretrained_cfg"]["input_size"]
        args = {"img_size": img_size, "num_classes": card["num_classes"], "in_chans": in_chans}
        return str(config["model"]), args | {"model_args": dict(config["model_args"])}, int(config["batch_size"])


def shapes(mixers: Sequence[str]) -> list[Contender]:
    """CSKA's op against the same as the paper writes it, over grids, widths of heads and batches; no other mixer."""
    rows = []
    for side, width, batch in product(SIDES, WIDTHS, BATCHES):
        heads = 256 // width
        if 4 * batch * heads * side**4 > MOST_MAP_BYTES:
            continue
        shape = LayerShape((side, side), heads * width, heads, batch=batch)
        plain = partial(op, shape, plain=True)
        rows.append(Contender(str(shape), PLAIN_CSKA, plain, checked=False))
        targets = Targets(1.03, 1.03)
        rows.append(Contender(str(shape), "cska", partial(op, shape), PLAIN_CSKA, targets=targets, twin=plain))
    return rows


SUITES: dict[str, Callable[..., list[Contender]]] = {
    "layers": layers,
    "models": models,
    "resolution": resolution,
    "training": training,
    "shapes": shapes,
}
