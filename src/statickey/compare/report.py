"""The page of a comparison: one HTML file that needs nothing else."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..tasks import Machine, Metric, Run, load_model
from ..viz import (
    as_stored,
    attention_explorer,
    differences,
    heads_by_layers,
    key_colours,
    learning_curves,
    look,
    on_a_page,
    page,
    static_key_rows,
)
from .config import CompareConfig
from .results import FinishedRun
from .table import column_heads, difference_unit, row_cells

REPORT_FILE = "report.html"
NUM_IMAGES = 3
_ROOM = 3_000_000
"""Bytes of the attention maps, at most."""


def write_report(
    root: Path, config: CompareConfig, data: Any, summary: dict[str, Any], runs: Sequence[FinishedRun]
) -> Path:
    """Draw the comparison and write ``report.html``; a picture that cannot be drawn leaves its reason there.

    Args:
        root: Folder of the comparison.
        config: The comparison.
        data: Its images.
        summary: Its numbers.
        runs: Its finished runs.

    Returns:
        Path of the page.

    Raises:
        OutputError: The page cannot be written.
    """
    names = [row["mixer"] for row in summary["mixers"]]
    of = {name: [run for run in runs if run.mixer == name] for name in names}
    firsts = {name: of_name[0] for name, of_name in of.items()}
    sections = [
        page.section("", _verdicts(summary), _table(summary)),
        page.section("Difference to the baseline", *(_differences(summary, of) if len(names) > 1 else ())),
        page.section("Learning curves", page.drawn("This picture", lambda: _curves(Metric(**summary["metric"]), of))),
        page.section(
            "Where a token looks",
            page.drawn("This part", lambda: _attention(config, data, firsts)),
        ),
        page.section("What the static keys learned", _keys(config, data, firsts)),
        page.section("How it was made", _making(config, summary, runs)),
    ]
    page.write_page(root / REPORT_FILE, summary["title"], sections)
    return root / REPORT_FILE


def verdict(row: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What a row says about its mixer, in one sentence."""
    difference, baseline, metric = row["difference"], summary["baseline"], Metric(**summary["metric"])
    if difference is None:
        return f"no seed in common with {baseline}."
    size = f"{difference['mean']:+.2f} {difference_unit(metric)} against {baseline}"
    if len(difference["seeds"]) == 1:
        return f"{size}; one seed: nothing is said about other seeds."
    if difference["decided"] is None:
        return f"{size}; its seeds do not differ: nothing is said about other seeds."
    if not difference["decided"]:
        return f"{size}; not decided by this data, over seeds and images together."
    better = (difference["mean"] > 0) == metric.higher_is_better
    return f"{size}; {'better' if better else 'worse'}, over seeds and images together."


def _verdicts(summary: Mapping[str, Any]) -> str:
    rows = (row for row in summary["mixers"] if row["mixer"] != summary["baseline"])
    return page.points((row["mixer"], verdict(row, summary)) for row in rows)


def _table(summary: dict[str, Any]) -> str:
    rows = [row_cells(row, summary) for row in summary["mixers"]]
    return page.table(column_heads(summary), rows) + page.note(summary["reading"].replace("\n", " ") + ".")


def _differences(summary: Mapping[str, Any], of: Mapping[str, Sequence[FinishedRun]]) -> tuple[str, str]:
    metric, baseline = Metric(**summary["metric"]), summary["baseline"]
    base = {run.seed: run.result[metric.name] for run in of[baseline]}
    per_seed = {
        name: [run.result[metric.name] - base[run.seed] for run in runs if run.seed in base]
        for name, runs in of.items()
    }
    label = f"{metric.label} minus {baseline}, {difference_unit(metric)}"
    return (
        page.drawn("This picture", lambda: page.svg(differences(summary["mixers"], per_seed, label))),
        page.note(
            "Dot: mean. Ticks: seeds. Thin line: 95 % over seeds and images together. "
            "Wide band: 95 % over images alone (paired bootstrap, seeds fixed)."
        ),
    )


def _curves(metric: Metric, of: Mapping[str, Sequence[FinishedRun]]) -> str:
    unit = f", {metric.unit}" if metric.unit else ""
    shown = {f"holdout_{metric.name}": f"held-out {metric.label}{unit}", "train_loss": "training loss"}
    figures = learning_curves({name: [run.result["curve"] for run in runs] for name, runs in of.items()}, shown)
    return page.row(*map(page.svg, figures)) + page.note(
        "Line: mean over seeds. Band: lowest to highest seed. The held-out images are a part of the training images; "
        "the test images are read once, after the last epoch."
    )


def _attention(config: CompareConfig, data: Any, firsts: Mapping[str, FinishedRun]) -> str:
    module = config.task.data_module(config.recipe, data, config.seeds[0])
    pixels, images, captions = config.task.examples(data, module, config.score_on, NUM_IMAGES)
    looks, left_out = [], []
    for name, run in firsts.items():
        try:
            looks.append(look(name, load_model(run.path)[0], [images], pixels))
        except Exception as error:  # a user's mixer may raise anything
            left_out.append(f"{name} is left out: {' '.join(str(error).split())}.")
    if not looks:
        nothing = "None of these mixers has an attention map of whole images."
        return page.text(nothing) + "".join(map(page.note, left_out))
    seeds = ", ".join(map(str, sorted({run.seed for run in firsts.values()})))
    models = on_a_page(looks, _ROOM)
    explained = f"The networks of seed {seeds}. {as_stored(models)}"
    return attention_explorer(models, captions) + page.note(" ".join([explained, *left_out]))


def _keys(config: CompareConfig, data: Any, firsts: Mapping[str, FinishedRun]) -> str:
    drawn = [page.drawn(name, lambda run=run: _keys_of(config, data, run)) for name, run in firsts.items()]  # type: ignore[misc]
    drawn = [part for part in drawn if part]
    if not drawn:
        return page.text("None of these mixers has a static key.")
    return page.row(*drawn) + page.note(
        "What training added to each key: one picture a layer and head, one cell a token position. Red, green and "
        "blue are the first three principal components of the rows' change: positions of like colour changed alike; "
        "grey is the average change. (Where a key starts large, its start would hide this.)"
    )


def _keys_of(config: CompareConfig, data: Any, run: FinishedRun) -> str:
    """A picture of what training added to the keys of a run, or nothing where there is no key."""
    keys = static_key_rows(load_model(run.path)[0])
    if not keys:
        return ""
    before = static_key_rows(_start(config, data, run))
    layers = {
        layer: key_colours(key - before[layer][0], mixer.num_prefix_tokens, mixer.key_grid).numpy()
        for layer, (key, mixer) in keys.items()
    }
    return page.picture(heads_by_layers(layers, f"{run.mixer}, seed {run.seed}"))


def _start(config: CompareConfig, data: Any, run: FinishedRun) -> nn.Module:
    """The network that the run began with, pretrained weights included."""
    run_here = Run(
        task=config.task,
        recipe=config.recipe,
        machine=config.machine,
        data=data,
        mixer=run.mixer,
        seed=run.seed,
        path=run.path,
        ids=(),
    )
    return run_here.new_model()


def _making(config: CompareConfig, summary: Mapping[str, Any], runs: Sequence[FinishedRun]) -> str:
    images = summary["data"]
    lines = {
        "command": command_line(config),
        "training images": f"{images['train_images']:,}, {config.recipe.holdout:.0%} of them held out",
        "scored images": f"{images['scored_images']:,} of {images['img_size']} pixels",
        "training time": f"{sum(run.result['train_seconds'] for run in runs) / 60:.1f} min over {len(runs)} runs",
        "configuration hash": summary["config_hash"],
    }
    if images["skipped"]:
        lines["unreadable images left out"] = f"{len(images['skipped'])}: {'; '.join(images['skipped'][:5])}"
    if len(summary["environments"]) > 1:
        lines["note"] = "the runs were made in different environments: do not compare their images/s"
    for number, env in enumerate(summary["environments"], start=1):
        name = "environment" if len(summary["environments"]) == 1 else f"environment {number}"
        lines[name] = ", ".join(f"{key} {value}" for key, value in env.items())
    return page.facts(lines) + page.details("configuration", json.dumps(summary["config"], indent=2))


def command_line(config: CompareConfig) -> str:
    """The command that makes this comparison: its mixers, seeds and folder, and all options that are not defaults."""
    defaults = {"task": "classify", "score_on": "test"} | config.recipe.defaults() | asdict(Machine())
    words = ["statickey", "compare"]
    for name, value in config.to_dict().items():
        option = "--" + name.replace("_", "-")
        if name in ("mixers", "seeds"):
            words += [option, *map(str, value)]
        elif name == "plugin":
            words += [word for source in value for word in (option, source)]
        elif value != defaults.get(name):
            words += [option, value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
