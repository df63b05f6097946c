"""Reports of a pruned layer and of a pruned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimgpt.calibration.documents import hub_dataset
from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.calibration.mixture import parse_mixture
from slimgpt.calibration.windows import digest
from slimgpt.config import PruneConfig
from slimgpt.models.slicing import State
from slimgpt.planning.few_widths import widths_text
from slimgpt.planning.plan import Plan
from slimgpt.pruning.plot import widths_figure
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.memory import Placement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mask_of(kept: Sequence[int], units: int) -> str:
    """Unit ids as a hexadecimal number whose bit ``j`` says that unit ``j`` stays; short where there are many."""
    number = sum(1 << unit for unit in kept)
    return f"{number:0{-(-units // 4)}x}"


def units_of(mask: str) -> list[int]:
    """The unit ids that :func:`mask_of` was given, ascending."""
    number = int(mask, 16)
    return [unit for unit in range(number.bit_length()) if number >> unit & 1]


@dataclass(frozen=True)
class ExpertsReport:
    """The experts of one pruned layer.

    Args:
        kept: the experts that stay, by their number in the dense layer; all further lists are in this order.
        tokens: calibration tokens that the router sent to each.
        fallback: those (by their dense number) that saw fewer tokens than they have channels: their Hessian also has
            tokens of the whole layer. Empty where no channels go.
        scales: what the output of each was multiplied by once other experts were gone; empty if none are.
        channels: the channels that each keeps, as :func:`mask_of` writes them; empty if all stay.
    """

    kept: list[int]
    tokens: list[int]
    fallback: list[int]
    scales: list[float]
    channels: list[str]


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Args:
        layer: its index.
        sizes: its widths now.
        kept: kept unit ids of the dense layer, by ``heads`` and ``channels``; heads count KV heads or query heads
            as the plan's ``head_unit`` says.
        error: ``E||Wx - W'x_K||^2 / E||Wx||^2`` of each structure on the calibration tokens.
        parameters_before: its parameters before.
        parameters: its parameters now.
        seconds: wall time by part: ``load``, ``forward``, ``hessian``, ``solver``.
        experts: what was done to its experts; ``None`` for a layer without.
    """

    layer: int
    sizes: dict[str, int]
    kept: dict[str, list[int]]
    error: dict[str, float]
    parameters_before: int
    parameters: int
    seconds: dict[str, float]
    experts: ExpertsReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    def percent(self, name: str, digits: int = 2) -> str:
        """The error of a structure for people; a dash where the layer has none that can be removed."""
        return f"{self.error[name]:.{digits}%}" if name in self.error else "-"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerReport:
        """The report that :meth:`to_json` was made from.

        Raises:
            TypeError: a field that is not known, or one that lacks.
        """
        experts = values.get("experts")
        return cls(**{**values, "experts": None if experts is None else ExpertsReport(**experts)})


@dataclass(frozen=True, repr=False)
class PruneReport:
    """A whole run, enough to repeat it; what ``slimgpt.json`` holds.

    Args:
        base_model: the model that was pruned, as the user named it.
        settings: what was asked for.
        plan: what was decided before.
        dense_sizes: the widths of every layer before.
        layers: what was done.
        calibration: source, its id if it is a data set on the hub, number and length of the windows, and the SHA-256 of
            their token ids.
        versions: of Python and the libraries.
        seconds: of the whole loop.
        evaluation: figures added afterwards, shown in the model card.
        execution: how it ran: type of the forward passes, where activations were kept, processes.
        request: SHA-256 of everything that decides the result; empty for a model pruned in memory.
        allocation: where widths were chosen by what they cost: what every structure contributed, and the seconds.
        distillation: of the training that belongs to pruning: tokens, steps, the divergence per token from the dense
            model on held-out windows before and after, and whether it was kept.
        divergence: how far the pruned model's predictions are from the dense model's, by text: ``held_out`` of the
            calibration and ``bundled``; a text lacks where there was none, and its figures where they are NaN. Empty if
            it was not measured.
        recovery: every training run after pruning: settings, data, losses by step.
        quantization: how the base model was quantised and what it was read as; empty if it was not.
        speed: where a speed was asked for: how many times as fast was asked, promised by the table of times, and
            reached when the result was timed in turn with the dense model; the seconds of both; the table.
    """

    base_model: str
    model_type: str
    settings: PruneConfig
    plan: Plan
    dense_sizes: tuple[dict[str, int], ...]
    layers: tuple[LayerReport, ...]
    calibration: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    evaluation: dict[str, Any] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)
    request: str = ""
    allocation: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    recovery: tuple[dict[str, Any], ...] = ()
    quantization: dict[str, str] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"<{name} of {self.base_model}: {self.plan.achieved:.2%} of the decoder layers removed>"

    def summary(self) -> str:
        """The removed parts and the losses in words, a line each."""
        rows = self._facts()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts())
        return f"<table>{''.join(rows)}</table>"

    def plot(self) -> Figure:
        """Heads and FFN channels of every layer before and after, as a matplotlib figure."""
        return widths_figure(self.dense_sizes, self.plan.layers)

    def asked(self) -> str:
        """The target as people read it: a share, or a speed."""
        speedup = self.settings.speedup
        return f"{self.plan.ratio:.2%}" if speedup is None else f"{speedup:g} times as fast"

    def speed_text(self) -> str:
        """The speedup that was asked for, promised and reached."""
        speed = self.speed
        reached = "not timed: " + speed["not_timed"] if speed["reached"] is None else f"{speed['reached']:.2f} reached"
        return (
            f"{speed['asked']:g} times as fast asked, {speed['promised']:.2f} promised, {reached} ({speed['engine']}, "
            f"batch {speed['batch']}, {speed['prompt']} + {speed['new_tokens']} tokens)"
            + (f"; {speed['note']}" if "note" in speed else "")
        )

    def _facts(self) -> list[tuple[str, str]]:
        plan, data = self.plan, self.calibration
        facts = [
            ("base model", f"{self.base_model} ({self.model_type})"),
            ("method", self.settings.method),
            ("removed", f"{plan.achieved:.2%} of the decoder layers (asked: {self.asked()})"),
            ("parameters", f"{plan.parameters_before:,} -> {plan.parameters:,}"),
            ("calibration", f"{data['num_samples']} x {data['seq_len']} tokens of {data['source']}"),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        if tried := self.allocation.get("experts"):
            facts.append(("experts", trials_text(tried)))
        if self.settings.num_widths is not None:
            facts.append(("widths", widths_text(plan)))
        if self.speed:
            facts.append(("speed", self.speed_text()))
        if info := self.distillation:
            far = info["divergence"]
            facts.append(
                ("training", f"{info['tokens']:,} tokens, KL {far['before']:.3f} -> {far['after']:.3f} nats per token")
            )
        for name, text in FOR_PEOPLE.items():
            values = self.divergence.get(name, {})
            if "kl" in values:
                perplexity = values["perplexity"]
                facts.append(
                    (
                        f"on {text}",
                        f"KL {values['kl']['mean']:.3f} ± {values['kl']['stderr']:.3f} nats per token, same top token "
                        f"{values['same_top']:.1%}, perplexity {perplexity['before']:.2f} -> {perplexity['after']:.2f}",
                    )
                )
        return facts

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {**asdict(self), "recovery": list(self.recovery)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PruneReport:
        """The report that :meth:`to_json` was made from.

        Raises:
            TypeError: a field that is not known, or one that lacks.
        """
        settings = dict(values["settings"])
        for name in ("schedule", "skip_layers"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        plan: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values["plan"].items()
        }
        return cls(
            **{
                **values,
                "settings": PruneConfig(**settings),
                "plan": Plan(**plan),
                "dense_sizes": tuple(values["dense_sizes"]),
                "layers": tuple(LayerReport.from_json(layer) for layer in values["layers"]),
                "recovery": tuple(values.get("recovery", ())),
            }
        )


def trials_text(experts: dict[str, Any]) -> str:
    """The trials of whole experts in one line.

    Args:
        experts: the entry ``experts`` of :attr:`PruneReport.allocation`.
    """
    names = {0.0: "channels", 0.5: "half whole", 1.0: "whole"}
    tried = [f"{names[each['share']]}{' and nothing else' if each['routed_only'] else ''}" for each in experts["tried"]]
    losses = [
        f"{name} {each['cross_entropy']:.3f} (KL {each['divergence']:.3f})"
        for name, each in zip(tried, experts["tried"], strict=True)
    ]
    kept = " to ".join(map(str, experts["tried"][experts["chosen"]]["experts"]))
    return (
        f"{tried[experts['chosen']]}, {kept} a layer stay; cross-entropy of trials: {', '.join(losses)} nats per "
        f"token; {experts['processor_seconds']:.0f} processor seconds"
    )


def total_seconds(layers: Sequence[LayerReport]) -> dict[str, float]:
    """The seconds of all layers by part."""
    parts = {part: 0.0 for layer in layers for part in layer.seconds}
    for layer in layers:
        for part, seconds in layer.seconds.items():
            parts[part] += seconds
    return parts


@dataclass(frozen=True)
class PrunedLayer:
    """A layer that is pruned: what was decided, and the state dict of the narrower layer on the CPU."""

    report: LayerReport
    state: State


def described(windows: Tensor, source: str) -> dict[str, Any]:
    """The entry of the calibration tokens in a report; of a mixture also every source with its share."""
    parts = parse_mixture(source)
    mixture = [
        {"source": part.source, "share": float(part.share), "dataset": hub_dataset(part.source)} for part in parts
    ]
    return {
        "source": source,
        "dataset": mixture[0]["dataset"] if len(parts) == 1 else None,
        **({"mixture": mixture} if len(parts) > 1 else {}),
        "num_samples": windows.shape[0],
        "seq_len": windows.shape[1],
        "sha256": digest(windows),
    }


def execution(
    dtype: torch.dtype, placement: Placement, processes: int = 1, processor_seconds: float = 0.0
) -> dict[str, Any]:
    """The entry of a run's device, dtype, placement and times in a report.

    Args:
        processor_seconds: of the loop over the layers, in the first process; of a resumed run its last part.
    """
    return {
        "forward_dtype": dtype_name(dtype),
        "placement": {"stream": placement.stream, "kept": placement.kept, "gram": placement.gram},
        "processes": processes,
        "processor_seconds": processor_seconds,
    }


def with_evaluation(report: PruneReport, **evaluation: Any) -> PruneReport:
    """A report with figures added that were taken after pruning."""
    return replace(report, evaluation={**report.evaluation, **evaluation})
