"""Convert a trained network's heads to static keys fitted on images: all of it on copies, then the model at once."""

import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import one_line
from ...errors import StaticKeyError, UnsupportedHostError
from ...layers import PartlyStaticAttention, StaticKeyAttention
from ..again import static_heads
from ..host import Site, has_rule
from ..keys import token_mixers
from ..swap import ConversionReport, Layers, all_or_nothing, select_sites
from ..swap import convert as swap
from ..wrappers import find_host
from .choice import Head, largest_within, named_heads
from .fits import HeadKeys, fit_heads
from .measure import HeadErrors, head_errors
from .reading import (
    MIN_IMAGES,
    attention_at,
    batches,
    change,
    check_runs,
    dynamic_heads,
    layer_calls,
    outputs,
    read_images,
    turned_back,
)
from .report import CalibrationReport, HeadFigures, Stage
from .settings import Calibration
from .statistics import LayerStatistics

_SAME = 1e-2
"""Change of output by which self-attention of this package may differ from the host's: rounding in half precision."""


class Calibrator:
    """One calibration of one model, which stays as it is until the end of ``run``.

    Args:
        model: The host.
        layers: As in ``convert``.
        calibration: What is asked for.
    """

    def __init__(self, model: nn.Module, layers: Layers, calibration: Calibration) -> None:
        self.model = model
        self.asked = calibration
        sites = {name: _with_heads_left(site) for name, site in find_host(model).sites.items()}
        chosen = select_sites(sites, layers)
        self.names = [name for name in sites if name in chosen]
        for name in self.names:
            if not sites[name].replaceable:
                kind = type(sites[name].module).__name__
                raise UnsupportedHostError(
                    f"{name} is already a {kind}, with no keys to fit; build the host again, or name other layers"
                )
            if not sites[name].is_attention:
                raise UnsupportedHostError(f"{name} has no attention whose keys could be fitted; name other layers")
            mixer = sites[name].module
            if isinstance(mixer, PartlyStaticAttention) and mixer.bias != calibration.layer_bias:
                raise StaticKeyError(
                    f"{name} has static heads with bias={mixer.bias!r}, as all its heads must; this fit has "
                    f"{calibration.layer_bias!r}: choose the same, or name other layers"
                )
        images = read_images(calibration.images, calibration.num_images)
        held = torch.arange(len(images)) % 4 == 3
        self.fitted_on, self.measured_on = images[~held], images[held]
        self.teacher = deepcopy(model).eval()
        self.before = self._before()
        if not all(bool(part.isfinite().all()) for part in self.before):
            raise StaticKeyError(
                "the model's output on the calibration images is not finite; check images and weights"
            )
        own = [name for name in self.names if not isinstance(sites[name].module, PartlyStaticAttention)]
        if own:
            swap(self.teacher, "mhsa", layers=own)
        self.heads = {name: dynamic_heads(attention_at(self.teacher, name)) for name in self.names}
        static = (site.module for site in sites.values() if isinstance(site.module, StaticKeyAttention))
        self.num_static = sum(len(static_heads(mixer)) for mixer in static)
        if calibration.heads is not None:
            named_heads(calibration.heads, self.heads)  # refuses before anything is fitted
        if calibration.fraction is not None:
            self._count(calibration.fraction)  # likewise
        check_runs(self.teacher, self.names, self.measured_on[:1])
        self.metric_before = calibration.value_of(self.teacher)
        self.equal = Stage("self-attention of this package", self._change(self.teacher), self.metric_before)
        if self.equal.change > _SAME:
            raise UnsupportedHostError(
                f"self-attention in place of the host's changes the output by {self.equal.change:.2g} of its size; "
                "heads cannot be read off it"
            )
        self.fitted: dict[str, HeadKeys] = {}
        self.keys: dict[str, HeadKeys] = {}
        self.errors: dict[str, HeadErrors] = {}
        self.spread: dict[str, Tensor] = {}
        self.alone: dict[Head, float] = {}

    def run(self) -> CalibrationReport:
        """Fit, choose, fit again on converted inputs, verify, and only then convert the model."""
        self.survey()
        chosen, note = self.choose()
        surveyed = self.converted(chosen)
        refitted = self.refitted(chosen)
        stages = [
            self.equal,
            self._stage("keys of the unconverted model", surveyed),
            self._stage("fitted on converted inputs", refitted),
        ]
        within = self.asked.max_drop is None or self._cost(stages[2]) <= self.asked.max_drop
        student = refitted if within and stages[2].change <= stages[1].change else surveyed
        if student is surveyed:
            note += "; keys of the unconverted model kept, which do better"
        controls = self._controls(student)
        steps = self._steps(chosen)
        verified = deepcopy(self.model)
        self._apply(verified, steps, student)
        speed = (self._speed(deepcopy(self.model).eval()), self._speed(verified.eval()))
        del verified
        made = self._apply(self.model, steps, student)
        return CalibrationReport(
            mixer="ska",
            modules=tuple(module for report in made for module in report.modules),
            params_before=made[0].params_before,
            params_after=made[-1].params_after,
            fit=self.asked.fit,
            bias=self.asked.layer_bias,
            num_images=len(self.fitted_on),
            num_measured=len(self.measured_on),
            heads=tuple(self._figures(chosen)),
            stages=tuple(stages),
            controls=tuple(controls),
            note=note,
            steps=tuple(steps),
            images_per_second=speed,
        )

    def _before(self) -> list[Tensor]:
        """What the model gives for the images kept back.

        Raises:
            UnsupportedHostError: It does not run on images, as the one inside it that is converted may.
        """
        try:
            return outputs(self.teacher, self.measured_on)
        except StaticKeyError:
            raise
        except Exception as error:
            for name, module in self.model.named_modules():
                if name and has_rule(module) and all(place.startswith(f"{name}.") for place in self.names):
                    raise UnsupportedHostError(
                        f"{type(self.model).__name__} does not run on these images ({one_line(error)}); where it "
                        f"needs more than images, calibrate the {type(module).__name__} in it, model.{name}"
                    ) from error
            raise

    def survey(self) -> None:
        """Fit all heads on the unconverted model, and measure them; the rest builds on it."""
        for name in self.names:
            self._survey_layer(name)

    def _survey_layer(self, name: str) -> None:
        heads = list(self.heads[name])
        statistics = self._statistics(self.teacher, name)
        self.fitted[name] = keys = fit_heads(statistics, self.asked.fit, self.asked.bias, self._places(name, heads))
        self.errors[name] = head_errors(layer_calls(self.teacher, name, self.measured_on), keys)
        self.spread[name] = statistics.spread().cpu()
        self.keys[name] = self._turned_back(name, keys, heads, statistics.rope)
        if self.asked.criterion == "change" and self.asked.ranks:
            images = len(self.fitted_on) + len(self.measured_on)
            part = self.measured_on[: max(images // len(heads), MIN_IMAGES)]  # all heads cost about what fitting does
            before = outputs(self.teacher, part)
            for head in heads:
                with_one = self.converted([(name, head)])
                self.alone[name, head] = change(before, outputs(with_one, part))

    def _places(self, name: str, heads: Iterable[int]) -> list[int]:
        """Where heads of a layer are among those that were dynamic, whose keys and errors are held."""
        return [self.heads[name].index(head) for head in heads]

    def _statistics(self, model: nn.Module, name: str) -> LayerStatistics:
        return LayerStatistics.of(layer_calls(model, name, self.fitted_on), len(self.fitted_on))

    def _turned_back(self, name: str, keys: HeadKeys, heads: list[int], rope: Tensor | None) -> HeadKeys:
        """Keys as a layer stores them: not turned by their place."""
        if rope is None:
            return keys
        mixer = attention_at(self.teacher, name)
        full = keys.key.new_zeros(mixer.num_heads, *keys.key.shape[1:])
        full[heads] = keys.key
        return replace(keys, key=turned_back(mixer, full, rope)[heads])

    def choose(self) -> tuple[list[Head], str]:
        """The heads that become static, by layer, and how they were chosen."""
        asked = self.asked
        everything = [(name, head) for name, heads in self.heads.items() for head in heads]
        if asked.heads is not None:
            return named_heads(asked.heads, self.heads), "as named"
        ranked = sorted(everything, key=self._rank) if asked.ranks else everything
        if asked.fraction is not None:
            taken = ranked[: self._count(asked.fraction)]
            return sorted(taken, key=everything.index), f"the smallest by {asked.criterion}"
        if asked.max_drop is None:
            return everything, "all"
        unit = "of output change" if asked.metric is None else "of the metric"
        chosen, cost = largest_within(ranked, asked.max_drop, self._drop, unit)
        note = f"the most within max_drop={asked.max_drop}, at {cost:.4g} {unit}, by {asked.criterion}"
        return sorted(chosen, key=everything.index), note

    def _count(self, fraction: float) -> int:
        """How many heads a share of all is, less those that were static before."""
        total = sum(map(len, self.heads.values())) + self.num_static
        count = round(fraction * total) - self.num_static
        if self.num_static and count < 1:
            raise StaticKeyError(
                f"fraction={fraction} of {total} heads, {self.num_static} of which are static already; ask for more"
            )
        return max(count, 1)

    def _rank(self, head: Head) -> float:
        name, (place,) = head[0], self._places(head[0], [head[1]])
        errors = {"kl": self.errors[name].kl, "output": self.errors[name].output}
        return self.alone[head] if self.asked.criterion == "change" else float(errors[self.asked.criterion][place])

    def _drop(self, heads: Sequence[Head]) -> float:
        return self._cost(self._stage("", self.converted(heads)))

    def _cost(self, stage: Stage) -> float:
        if stage.metric is None or self.metric_before is None:
            return stage.change
        return self.metric_before - stage.metric

    def converted(self, heads: Iterable[Head]) -> nn.Module:
        """A copy of the teacher in which these heads are static, with the surveyed keys."""
        by_layer = _by_layer(heads)
        student = deepcopy(self.teacher)
        for name, own in by_layer.items():
            self._install(student, name, own, self.keys[name].of(self._places(name, own)))
        return student

    def refitted(self, heads: Iterable[Head]) -> nn.Module:
        """A copy of the teacher in which these heads are static, each layer fitted on what those before it give."""
        by_layer = _by_layer(heads)
        student = deepcopy(self.teacher)
        for name in self.names:
            if name in by_layer:
                own = by_layer[name]
                statistics = self._statistics(student, name)
                places = self._places(name, own)
                near = self.fitted[name].of(places)
                keys = fit_heads(statistics, self.asked.fit, self.asked.bias, places, near)
                self._install(student, name, own, self._turned_back(name, keys, own, statistics.rope))
        return student

    def _install(self, model: nn.Module, name: str, heads: list[int], keys: HeadKeys) -> None:
        swap(model, **self._step(name, heads))
        _fill(_static_layer(model, name), heads, keys)

    def _step(self, name: str, heads: list[int]) -> dict[str, Any]:
        """The arguments of ``convert`` that make a layer whose static heads are these."""
        dynamic = [head for head in self.heads[name] if head not in heads]
        if not dynamic and self.asked.layer_bias is None:
            return {"mixer": "ska", "layers": [name]}
        args = {"dynamic_heads": dynamic, "bias": self.asked.layer_bias}
        return {"mixer": "partly_static", "layers": [name], "mixer_args": args}

    def _steps(self, heads: Iterable[Head]) -> list[dict[str, Any]]:
        """Layers of one kind together."""
        steps: list[dict[str, Any]] = []
        for name, own in _by_layer(heads).items():
            step = self._step(name, own)
            same = next((other for other in steps if {**other, "layers": 0} == {**step, "layers": 0}), None)
            if same is None:
                steps.append(step)
            else:
                same["layers"].append(name)
        return steps

    def _apply(
        self, model: nn.Module, steps: Sequence[Mapping[str, Any]], student: nn.Module
    ) -> list[ConversionReport]:
        """Convert a model and give it the student's keys; on any error or interruption it is as it was."""
        names = [name for step in steps for name in step["layers"]]
        with all_or_nothing(model, find_host(model), names):
            reports = [swap(model, **step) for step in steps]
            for name in names:
                layer, source = _static_layer(model, name), _static_layer(student, name)
                with torch.no_grad():
                    for key in layer.grid_parameters:
                        getattr(layer, key).copy_(getattr(source, key))
        return reports

    def _controls(self, student: nn.Module) -> list[Stage]:
        """The student with keys of no use: where it changes as little, keys are not what makes it work."""
        generator = torch.Generator().manual_seed(self.asked.seed)
        mean, shuffled = deepcopy(student), deepcopy(student)
        for layer in _static_layers(mean, self.names):
            assert isinstance(layer.static_key, nn.Parameter)
            layer.static_key.data = layer.static_key.mean(1, keepdim=True).expand_as(layer.static_key).clone()
        for layer in _static_layers(shuffled, self.names):
            order = torch.randperm(layer.num_tokens, generator=generator)
            for name in layer.grid_parameters:
                axis = 2 if name == "map_bias" else 1
                parameter = getattr(layer, name)
                parameter.data = parameter.index_select(axis, order.to(parameter.device))
        return [
            self._stage("control: each key the mean of all", mean),
            self._stage("control: keys of shuffled positions", shuffled),
        ]

    def _stage(self, name: str, model: nn.Module) -> Stage:
        return Stage(name, self._change(model), self.asked.value_of(model))

    def _change(self, model: nn.Module) -> float:
        return change(self.before, outputs(model, self.measured_on))

    def _speed(self, model: nn.Module) -> float:
        """Images a second, the best of three passes over a batch of those kept back."""
        batch = next(batches(self.measured_on))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            outputs(model, batch)
            seconds.append(time.perf_counter() - start)
        return len(batch) / min(seconds)

    def _figures(self, chosen: Sequence[Head]) -> Iterable[HeadFigures]:
        static = {*chosen}
        for name, heads in self.heads.items():
            errors = self.errors[name]
            for place, head in enumerate(heads):
                yield HeadFigures(
                    layer=name,
                    head=head,
                    explained=float(errors.explained[place]),
                    kl=float(errors.kl[place]),
                    output_error=float(errors.output[place]),
                    spread=float(self.spread[name][place]),
                    change=self.alone.get((name, head)),
                    static=(name, head) in static,
                )


def _by_layer(heads: Iterable[Head]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, head in heads:
        found.setdefault(name, []).append(head)
    return {name: sorted(indices) for name, indices in found.items()}


def _static_layers(model: nn.Module, names: Iterable[str]) -> list[StaticKeyAttention]:
    mixers = (next(iter(token_mixers(model.get_submodule(name)).values())) for name in names)
    return [mixer for mixer in mixers if isinstance(mixer, StaticKeyAttention)]


def _static_layer(model: nn.Module, name: str) -> StaticKeyAttention:
    (layer,) = _static_layers(model, [name])
    return layer


def _with_heads_left(site: Site) -> Site:
    """A place with static heads is one to convert while others of its heads are dynamic."""
    mixer = site.module
    left = isinstance(mixer, PartlyStaticAttention) and mixer.dynamic_heads
    return replace(site, replaceable=True) if left else site


@torch.no_grad()
def _fill(layer: StaticKeyAttention, heads: list[int], keys: HeadKeys) -> None:
    """Give heads of a layer their keys and bias; they are centred, which attention does not see."""
    assert isinstance(layer.static_key, nn.Parameter)
    places = [static_heads(layer).index(head) for head in heads]
    layer.static_key[places] = keys.key.to(layer.static_key)
    if isinstance(layer, PartlyStaticAttention):
        if layer.key_bias is not None and keys.key_bias is not None:
            layer.key_bias[places] = (keys.key_bias / float(layer._logit_scale())).to(layer.key_bias)
        if layer.map_bias is not None and keys.map_bias is not None:
            layer.map_bias[places] = keys.map_bias.to(layer.map_bias)
