"""The divergence from the dense model, on a terminal."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.table import Table

from slimgpt.cli.console import out, show

if TYPE_CHECKING:
    from slimgpt.evaluation.divergence import Divergence
    from slimgpt.evaluation.perplexity import Perplexity


def print_divergence(divergence: Divergence, result: Perplexity) -> None:
    """The figures of llama.cpp's ``--kl-divergence``, then the divergence by position."""
    kl, delta = divergence.kl, divergence.delta_p
    out.print(
        f"divergence from {show(divergence.base)}: KL [bold]{kl.mean:.4f}[/] ± {kl.stderr:.4f} nats per token "
        f"({divergence.bits_per_byte:.4f} bits per byte), same most likely token "
        f"[bold]{divergence.same_top:.2%}[/] ± {divergence.same_top_stderr:.2%}\n"
        f"perplexity {divergence.base_perplexity:.4f} -> {result.perplexity:.4f}, ln of the ratio "
        f"{divergence.log_perplexity_ratio:+.4f} ± {divergence.log_perplexity_ratio_stderr:.4f}, correlation of ln p "
        f"{divergence.correlation:.2%}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "KL, nats", "Δp of the text's token")
    table.add_row("mean", f"{kl.mean:.6f} ± {kl.stderr:.6f}", f"{delta.mean:.3%} ± {delta.stderr:.3%}")
    table.add_row("RMS", f"{kl.rms:.6f}", f"{delta.rms:.3%}")
    table.add_row("maximum", f"{kl.maximum:.6f}", f"{delta.maximum:.3%}")
    for percent in reversed(kl.quantiles):
        name = "median" if percent == "50%" else percent
        table.add_row(name, f"{kl.quantiles[percent]:.6f}", f"{delta.quantiles[percent]:.3%}")
    table.add_row("minimum", f"{kl.minimum:.6f}", f"{delta.minimum:.3%}")
    out.print(table)
    positions = Table("position", "tokens", "KL, nats", "same top")
    for first, row in divergence.by_position.items():
        last = min(2 * first, result.window) - 1
        positions.add_row(f"{first}-{last}", f"{row.tokens:,}", f"{row.kl:.4f}", f"{row.same_top:.2%}")
    out.print(positions)


def print_dense_comparison(divergence: dict[str, Any]) -> None:
    """Print a report's divergence of the pruned model from the dense one, a row per text."""
    from slimgpt.calibration.evaluation_text import FOR_PEOPLE

    measured = {name: divergence[name] for name in FOR_PEOPLE if name in divergence}
    if not measured:
        return
    table = Table(title="how far from the dense model", title_justify="left")
    for column in ("text", "KL, nats", "bits/byte", "same top", "perplexity"):  # 80 columns are enough
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, values in measured.items():
        table.add_row(FOR_PEOPLE[name], *_cells(values))
    out.print(table)


def _cells(values: dict[str, Any]) -> list[str]:
    if "kl" not in values:
        return ["NaN or infinity", "", "", ""]
    perplexity = values["perplexity"]
    return [
        f"{values['kl']['mean']:.3f} ± {values['kl']['stderr']:.3f}",
        f"{values['bits_per_byte']:.3f}",
        f"{values['same_top']:.1%} ± {values['same_top_stderr']:.1%}",
        f"{perplexity['before']:.2f} -> {perplexity['after']:.2f}",
    ]


def print_next(model: str, folder: object) -> None:
    """The commands that one runs after a pruning."""
    base, slim = shlex.quote(model), shlex.quote(str(folder))
    trained = shlex.quote(f"{folder}-recovered")
    commands = (
        ("the same on a text of yours", f"slimgpt evaluate {slim} --against {base} --text FILE --window 512"),
        ("perplexity, speed and memory side by side", f"slimgpt compare {base} {slim}"),
        ("train it for a while", f"slimgpt recover {slim} {trained} --data FILE"),
        ("talk to it", f"slimgpt chat {slim}"),
    )
    out.print("next:")
    for purpose, command in commands:
        out.print_commands(f"  {command}   # {purpose}" if len(command) + len(purpose) < 70 else f"  {command}")
