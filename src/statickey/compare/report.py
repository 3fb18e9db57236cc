"""The page of a comparison: one HTML file that needs nothing else."""

import base64
import html
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .._files import write_text
from ..data import ImageData, normalize
from ..layers import ConvStaticKeyAttention, StaticKeyAttention, TokenMixer
from ..tasks import data_module, load_model, new_model
from ..viz import (
    attention_of_token,
    capture_attention,
    differences,
    key_colours,
    learning_curves,
    static_keys,
)
from .config import CompareConfig
from .results import FinishedRun
from .table import column_heads, row_cells

REPORT_FILE = "report.html"
NUM_IMAGES = 3


def write_report(
    root: Path, config: CompareConfig, data: ImageData, summary: dict[str, Any], runs: Sequence[FinishedRun]
) -> Path:
    """Draw the comparison and write ``report.html``.

    Args:
        root: Folder of the comparison.
        config: The comparison.
        data: Its images.
        summary: Its numbers.
        runs: Its finished runs.

    Returns:
        Path of the page.

    Raises:
        OutputError: The page cannot be written, or a run's weights cannot be read.
    """
    names = [row["mixer"] for row in summary["mixers"]]
    of = {name: [run for run in runs if run.mixer == name] for name in names}
    models = {name: load_model(of[name][0].path)[0] for name in names}
    baseline = summary["baseline"]
    sections = [
        _section("", _verdicts(summary) + _table(summary)),
        _section(
            "Difference to the baseline",
            _svg(differences(summary["mixers"], baseline, _per_seed(of, baseline)))
            + "<p class=note>Dot: mean. Ticks: seeds. Thin line: 95 % over seeds (Student's t). "
            "Wide band: 95 % over images (paired bootstrap, seeds fixed).</p>"
            if len(names) > 1
            else "",
        ),
        _section(
            "Learning curves",
            "<div class=row>"
            + "".join(map(_svg, learning_curves({n: [run.result["curve"] for run in of[n]] for n in names})))
            + "</div><p class=note>Line: mean over seeds. Band: lowest to highest seed. The held-out images are a "
            "part of the training images; the test images are read once, after the last epoch.</p>",
        ),
        _section("Where a token looks", _attention(config, data, models, of)),
        _section("What the static keys learned", _keys(config, data, models, of)),
        _section("How it was made", _making(config, summary, runs)),
    ]
    title = html.escape(summary["title"])
    page = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page += f"<title>{title}</title><style>{_CSS}</style><main><h1>{title}</h1>{''.join(sections)}</main></html>\n"
    write_text(root / REPORT_FILE, page)
    return root / REPORT_FILE


def verdict(row: Mapping[str, Any], baseline: str) -> str:
    """What a row says about its mixer, in one sentence."""
    difference = row["difference"]
    if difference is None:
        return f"no seed in common with {baseline}."
    size = f"{difference['mean']:+.2f} points against {baseline}"
    if difference["decided"] is None:
        return f"{size}; one seed or no spread, so nothing is said about other seeds."
    if not difference["decided"]:
        return f"{size}; not decided by this data: an interval includes zero."
    side = "above" if difference["mean"] > 0 else "below"
    return f"{size}; {side} it by both intervals."


def _verdicts(summary: Mapping[str, Any]) -> str:
    baseline = summary["baseline"]
    lines = [
        f"<li><b>{html.escape(row['mixer'])}</b> {html.escape(verdict(row, baseline))}"
        for row in summary["mixers"]
        if row["mixer"] != baseline
    ]
    return f"<ul class=verdict>{''.join(lines)}</ul>"


def _table(summary: Mapping[str, Any]) -> str:
    baseline = summary["baseline"]
    head = "".join(f"<th>{html.escape(name)}" for name in column_heads(baseline))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row_cells(row, baseline)) for row in summary["mixers"]
    )
    note = html.escape(summary["reading"].replace("\n", " "))
    return f"<div class=wide><table><tr>{head}{body}</table></div><p class=note>{note}.</p>"


def _per_seed(of: Mapping[str, Sequence[FinishedRun]], baseline: str) -> dict[str, list[float]]:
    base = {run.seed: run.result["accuracy"] for run in of[baseline]}
    return {
        name: [run.result["accuracy"] - base[run.seed] for run in runs if run.seed in base]
        for name, runs in of.items()
    }


def _attention(
    config: CompareConfig,
    data: ImageData,
    models: Mapping[str, nn.Module],
    of: Mapping[str, Sequence[FinishedRun]],
) -> str:
    module = data_module(config.recipe, data, config.seeds[0])
    part = data.test if config.score_on == "test" else module.val_part
    picks = _one_per_class(part.labels)
    images = normalize(part.images[picks], module.mean, module.std)
    maps_of = {name: capture_attention(model, images) for name, model in models.items()}
    # maps of whole images only, and all on one grid: the first that attends, where stages differ
    whole = [
        (name, _grid_of(models[name], layer), weights)
        for name, maps in maps_of.items()
        for layer, weights in maps.items()
        if len(weights) == len(images)
    ]
    if not whole:
        return "<p>None of these mixers has an attention map of whole images."
    feat_size = whole[0][1]
    captured: dict[str, list[Tensor]] = {}
    for mixer, grid, weights in whole:
        if grid == feat_size:
            captured.setdefault(mixer, []).append(weights)
    token = (feat_size[0] // 2, feat_size[1] // 2)
    figures = []
    for i, pick in enumerate(picks):
        image = part.images[pick].permute(1, 2, 0).numpy() / 255
        figure = attention_of_token(
            image, {name: [layer[i] for layer in maps] for name, maps in captured.items()}, feat_size, token
        )
        name = html.escape(data.class_names[int(part.labels[pick])])
        figures.append(f"<figure>{_png(figure)}<figcaption>{name}</figcaption></figure>")
    left_out = [name for name in models if name not in captured]
    note = f" {', '.join(left_out)} has no map." if left_out else ""
    seeds = {runs[0].seed for runs in of.values()}
    return (
        f"<div class=row>{''.join(figures)}</div><p class=note>Attention of the framed token, mean over heads, "
        f"each map on its own scale from zero; seed {', '.join(map(str, sorted(seeds)))}.{html.escape(note)}</p>"
    )


def _grid_of(model: nn.Module, layer: str) -> tuple[int, int]:
    mixer = model.get_submodule(layer)
    assert isinstance(mixer, TokenMixer)
    return mixer.feat_size


def _one_per_class(labels: Tensor) -> list[int]:
    firsts = [int((labels == c).nonzero()[0]) for c in torch.unique(labels)]
    return firsts[:NUM_IMAGES]


def _keys(
    config: CompareConfig,
    data: ImageData,
    models: Mapping[str, nn.Module],
    of: Mapping[str, Sequence[FinishedRun]],
) -> str:
    figures = []
    for name, model in models.items():
        fresh = new_model(config.recipe, data, name, of[name][0].seed)
        layers = [
            key_colours(_key(mixer) - _key(start), mixer.num_prefix_tokens, mixer.feat_size).numpy()
            for mixer, start in zip(model.modules(), fresh.modules(), strict=True)
            if isinstance(mixer, StaticKeyAttention)
        ]
        if layers:
            figures.append(f"<figure>{_png(static_keys(layers, f'{name}, seed {of[name][0].seed}'))}</figure>")
    if not figures:
        return "<p>None of these mixers has a static key."
    return (
        f"<div class=row>{''.join(figures)}</div><p class=note>What training added to each key: one picture a layer "
        "and head, one cell a token position. Red, green and blue are the first three principal components of the "
        "rows' change: positions of like colour changed alike; grey is the average change. (Where a key starts "
        "large, its random start would hide this.)</p>"
    )


def _key(mixer: nn.Module) -> Tensor:
    name = "conv_key" if isinstance(mixer, ConvStaticKeyAttention) else "static_key"
    return mixer.get_parameter(name)


def _making(config: CompareConfig, summary: Mapping[str, Any], runs: Sequence[FinishedRun]) -> str:
    images = summary["data"]
    facts = {
        "command": command_line(config),
        "training images": f"{images['train_images']:,}, {config.recipe.holdout:.0%} of them held out",
        "scored images": f"{images['scored_images']:,} of {images['img_size']} pixels",
        "training time": f"{sum(run.result['train_seconds'] for run in runs) / 60:.1f} min over {len(runs)} runs",
        "configuration hash": summary["config_hash"],
    }
    if images["skipped"]:
        facts["unreadable images left out"] = f"{len(images['skipped'])}: {'; '.join(images['skipped'][:5])}"
    if len(summary["environments"]) > 1:
        facts["note"] = "the runs were made in different environments: do not compare their images/s"
    for number, env in enumerate(summary["environments"], start=1):
        name = "environment" if len(summary["environments"]) == 1 else f"environment {number}"
        facts[name] = ", ".join(f"{key} {value}" for key, value in env.items())
    lines = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in facts.items())
    dump = html.escape(json.dumps(summary["config"], indent=2))
    return f"<table class=facts>{lines}</table><details><summary>configuration</summary><pre>{dump}</pre></details>"


def command_line(config: CompareConfig) -> str:
    """The command that makes this comparison, all its mixers and seeds included."""
    words = ["statickey", "compare"]
    for name, value in config.to_dict().items():
        if value is None or (name == "model_args" and not value):
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [option, json.dumps(value) if isinstance(value, dict | bool) else str(value)]
    return shlex.join(words)


def _section(title: str, body: str) -> str:
    if not body:
        return ""
    return f"<section>{f'<h2>{html.escape(title)}</h2>' if title else ''}{body}</section>"


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "statickey", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return f"<div class=plot>{text.getvalue()[text.getvalue().index('<svg') :]}</div>"


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    width = figure.get_figwidth() * 96
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img width={width:.0f} src='data:image/png;base64,{data}' alt=''>"


_CSS = """
body{margin:0;background:#f5f7fa;color:#1f2933;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0 0 18px;letter-spacing:-.01em}h2{font-size:17px;margin:0 0 12px}
section{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:20px 22px;margin:0 0 18px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
td,th{padding:7px 10px;text-align:right;border-bottom:1px solid #e4e7eb;white-space:nowrap}
th{font-weight:600;color:#616e7c;font-size:13px}td:first-child,th:first-child{text-align:left}
td:first-child{font-weight:600}tr:last-child td{border-bottom:0}
.wide{overflow-x:auto;font-size:14px}.wide td,.wide th{padding:7px 6px}.wide th{white-space:normal}
.note{color:#616e7c;font-size:13px;margin:10px 0 0}
.verdict{margin:0 0 16px;padding-left:18px}.plot svg{max-width:100%;height:auto}
.row{display:flex;flex-wrap:wrap;gap:18px}.row img{max-width:100%;height:auto}
figure{margin:0}figcaption{text-align:center;color:#616e7c;font-size:13px}
.facts th{width:190px;vertical-align:top}.facts td,.facts td:first-child{text-align:left;white-space:normal;
font-weight:400;overflow-wrap:anywhere}details{margin-top:12px}pre{overflow-x:auto;font-size:12px}
"""
