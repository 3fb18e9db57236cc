"""What a calibration found and did, as numbers, text and JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..swap import ConversionReport


@dataclass(frozen=True)
class HeadFigures:
    """One head, as measured on the unconverted model.

    Args:
        layer: Name of its module.
        head: Its index.
        explained: Share of the variance of its logits that the static ones have.
        kl: Divergence of the static map from its own, in nats.
        output_error: Squared error of its output, as a share of its energy.
        spread: How much its map changes from image to image; standard deviation, as a share of the mean entry.
        change: Change of the model's output when this head alone becomes static, or None where not measured.
        static: Whether it became static.
    """

    layer: str
    head: int
    explained: float
    kl: float
    output_error: float
    spread: float
    change: float | None
    static: bool


@dataclass(frozen=True)
class Stage:
    """The model after a step: root mean square change of its output as a share of its size, and the metric."""

    name: str
    change: float
    metric: float | None = None

    def __str__(self) -> str:
        metric = "" if self.metric is None else f"  metric {self.metric:.4g}"
        return f"{self.name:<34} output change {self.change:8.4f}{metric}"


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(ConversionReport):
    """What ``convert`` did with a calibration. ``print`` it for tables.

    Args:
        fit: How keys were fitted.
        bias: What is added to logits.
        num_images: Images that keys were fitted on.
        num_measured: Others, that everything here was measured on.
        heads: All heads of the chosen layers.
        stages: The model before, with keys fitted on the unconverted model, and with keys fitted layer by layer on
            what the converted layers before give; it has the last, unless ``note`` says that the others do better.
        controls: The converted model with other keys in the static heads, which its own must beat: each one's mean
            over positions, and those of shuffled positions.
        note: How the heads were chosen.
        steps: Arguments of ``convert`` that make the same layers of the host, with fresh keys.
        images_per_second: Before and after, on this machine.
    """

    fit: str
    bias: str | None
    num_images: int
    num_measured: int
    heads: tuple[HeadFigures, ...]
    stages: tuple[Stage, ...]
    controls: tuple[Stage, ...]
    note: str
    steps: tuple[dict[str, Any], ...]
    images_per_second: tuple[float, float] = field(compare=False)

    def __str__(self) -> str:
        width = max(len(head.layer) for head in self.heads)
        lines = [f"{'layer':<{width}}  head  static  explained      KL  output error  spread  change alone"]
        for head in self.heads:
            change = "-" if head.change is None else f"{head.change:.4f}"
            lines.append(
                f"{head.layer:<{width}}  {head.head:>4}  {'yes' if head.static else '-':>6}  {head.explained:>9.3f}  "
                f"{head.kl:>6.3f}  {head.output_error:>12.3f}  {head.spread:>6.2f}  {change:>12}"
            )
        before, after = self.images_per_second
        static = sum(head.static for head in self.heads)
        return "\n".join(
            [
                super().__str__(),
                "",
                *lines,
                "",
                f"{static} of {len(self.heads)} heads became static, {self.note}; fit={self.fit} bias={self.bias} on "
                f"{self.num_images} images, measured on {self.num_measured} others",
                *map(str, self.stages),
                *map(str, self.controls),
                f"{before:,.1f} images a second before, {after:,.1f} after",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, in types that JSON knows."""
        return asdict(self) | {"macs_before": self.macs_before, "macs_after": self.macs_after}
