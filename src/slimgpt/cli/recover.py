"""``slimgpt recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimgpt.cli.console import app, handle_errors, out, print_uploaded, show, silence_libraries
from slimgpt.cli.options import (
    DeviceOption,
    DtypeOption,
    PrivateOption,
    PushOption,
    TrustOption,
    help_panels,
    setting_options,
)
from slimgpt.cli.progress import phases
from slimgpt.recovery.config import RecoverConfig

if TYPE_CHECKING:
    from slimgpt.recovery.run import Recovery
    from slimgpt.recovery.trainer import Step

EXAMPLES = """Examples:

slimgpt recover slim slim-lora --data alpaca.jsonl

slimgpt recover slim slim-taught --data my.txt --method distill --teacher MODEL

Several GPUs: torchrun --nproc-per-node 8 -m slimgpt recover slim OUT --data my.txt
"""


@app.command(epilog=EXAMPLES)
@handle_errors
@help_panels(
    {
        "Data": "data shares pack max_length held_out seed",
        "Method": "method teacher rank alpha dropout train_embeddings",
        "Training": "epochs max_steps learning_rate schedule warmup weight_decay batch_size patience evaluations",
        "Distillation": "distill_weight text_weight top_k layer_weight layers",
        "Resources": "device dtype bf16 micro_batch gradient_checkpointing shard",
        "Output": "report_to push_to_hub private resume overwrite",
    }
)
@setting_options(RecoverConfig, "recover", before={"teacher": ""})
def recover(
    slim: Annotated[Path, typer.Argument(metavar="SLIM", help="The folder that `slimgpt prune` wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="A .txt, .jsonl, .json or .parquet file, a folder, a datasets id, or 'demo'; may be repeated.",
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option(help="The dense model (distill).", show_default="SLIM's base model")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a killed run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
    **settings: Any,
) -> None:
    """Train SLIM to recover quality, and write the result to the folder OUT.

    Plain text is packed; of instructions and chats only the answers are trained on.
    """
    RecoverConfig(**settings)  # before torch is imported: what is wrong in it is said at once
    from slimgpt.recovery.run import recover as run

    silence_libraries()
    with phases() as shown:
        shown.step("reading", 0, None)

        def begin() -> None:
            shown.step("reading", 1, 1)

        def on_teacher(done: int, total: int) -> None:
            begin()
            shown.step("teacher", done, total)

        def on_step(step: Step) -> None:
            begin()
            shown.step("training", step.step, step.steps, state=_losses(step), unit="step")

        recovery = run(
            slim,
            output,
            data,
            teacher=teacher,
            device=device,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_teacher=on_teacher,
            on_step=on_step,
            push_to_hub=push_to_hub,
            private=private,
            **settings,
        )
    _print(recovery)
    print_uploaded(push_to_hub)


def _losses(step: Step) -> str:
    parts = [f"loss {step.loss:.3f}"] if step.loss is not None else []
    parts += [f"held out {step.held_out:.3f}"] if step.held_out is not None else []
    return ", ".join(parts)


def _print(recovery: Recovery) -> None:
    """Print the losses before and after, and the folder."""
    curve, seconds = recovery.curve, recovery.seconds
    if curve.held_out:
        first, best = curve.held_out[0][1], min(loss for _, loss in curve.held_out)
        out.print(
            f"held-out loss [bold]{first:.4f}[/] before, [bold]{best:.4f}[/] after "
            f"(step {curve.kept} of {curve.steps} was kept)",
            highlight=False,
        )
    spent = ", ".join(f"{part} {value:,.0f} s" for part, value in seconds.items())
    out.print(
        f"wrote {show(recovery.folder)} ({spent}); the curve is in recovery.json and recovery.png\n"
        f"next: slimgpt evaluate {show(shlex.quote(str(recovery.folder)))} --against BASE --text FILE --update-card",
        soft_wrap=True,
    )
