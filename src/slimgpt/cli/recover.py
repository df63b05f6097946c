"""``slimgpt recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.cli.options import DeviceOption, DtypeOption, PrivateOption, PushOption, TrustOption, help_panels
from slimgpt.cli.progress import phases
from slimgpt.errors import UsageError

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
        "Resources": "device dtype bf16 micro_batch gradient_checkpointing",
        "Output": "push_to_hub private resume overwrite",
    }
)
def recover(
    slim: Annotated[Path, typer.Argument(metavar="SLIM", help="The folder that `slimgpt prune` wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="A .txt, .jsonl, .json or .parquet file, a folder, a datasets id, or 'demo'; may be repeated.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(help="lora, full (all weights) or distill (from a teacher)."),
    ] = "lora",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="With --max-steps: proportions of the sources, such as 4,1.", show_default="equal"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="1e-4 for lora, else 5e-4")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Learning rate schedule: cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Warm-up, as a share of the steps.")] = 0.05,
    max_length: Annotated[int, typer.Option(help="Tokens of an example at most.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all devices.")] = 64,
    micro_batch: Annotated[int, typer.Option(help="Examples per device and forward pass.")] = 4,
    rank: Annotated[
        int | None, typer.Option(help="LoRA rank; with distill: train adapters.", show_default="8 with lora")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.", show_default="twice the rank")] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.0,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="Train the embeddings too (full, distill).")
    ] = False,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    pack: Annotated[bool, typer.Option("--pack", help="Pack instructions and chats, too.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model (distill).", show_default="SLIM's base model")
    ] = None,
    distill_weight: Annotated[float, typer.Option(help="Weight of the KL divergence from the teacher.")] = 1.0,
    text_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy of the text.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Most likely tokens of the teacher that are kept.")] = 64,
    layer_weight: Annotated[float, typer.Option(help="Weight of the distance of layer outputs.")] = 0.0,
    layers: Annotated[int, typer.Option(help="Layer outputs that are compared.")] = 4,
    held_out: Annotated[int, typer.Option(help="Examples held out for evaluation; 0: none.")] = 32,
    evaluations: Annotated[int, typer.Option(help="Evaluations, each with a checkpoint.")] = 10,
    patience: Annotated[int, typer.Option(help="Early stopping after so many evaluations; 0: none.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapters.")] = 0,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast.", show_default="where it is faster")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train SLIM to win back what pruning lost, and save the result as the folder OUT.

    Plain text is packed; of instructions and chats the answers are learned.
    """
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
            method=method,
            epochs=epochs,
            max_steps=max_steps,
            shares=_numbers(shares),
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            max_length=max_length,
            batch_size=batch_size,
            micro_batch=micro_batch,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            train_embeddings=train_embeddings,
            weight_decay=weight_decay,
            pack=pack,
            distill_weight=distill_weight,
            text_weight=text_weight,
            top_k=top_k,
            layer_weight=layer_weight,
            layers=layers,
            held_out=held_out,
            evaluations=evaluations,
            patience=patience,
            seed=seed,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        )
    _print(recovery)
    if push_to_hub is not None:
        out.print(f"uploaded to {show(push_to_hub)}", soft_wrap=True, highlight=False)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"shares '{text}' is no list of numbers such as 4,1") from None


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
