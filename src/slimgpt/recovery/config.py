"""Settings of a recovery run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from slimgpt.errors import UsageError
from slimgpt.runtime import settings
from slimgpt.runtime.setting_checks import (
    check_at_least_one,
    check_not_negative,
    check_positive,
    check_seed,
    check_share_below_one,
)


@dataclass(frozen=True)
class Method:
    """Defaults of a recovery method: learning rate, LoRA adapters or all weights, with or without a teacher."""

    learning_rate: float
    adapters: bool
    teacher: bool
    summary: str


METHODS: dict[str, Method] = {
    "lora": Method(1e-4, True, False, "adapters on every linear layer, merged at the end (the paper's)"),
    "full": Method(5e-4, False, False, "every weight but the embeddings"),
    "distill": Method(5e-4, False, True, "as full, towards the dense model's predictions as well as the text"),
}


SCHEDULES = ("cosine", "linear", "constant")
TRACKERS = ("none", "tensorboard", "wandb")

setting = partial(settings.setting, commands=("recover",))


def check_method(name: str, value: str) -> None:
    """Refuse a method that there is not."""
    if value not in METHODS:
        raise UsageError(f"{name} '{value}' is unknown; choose {', '.join(METHODS)}")


def check_schedule(name: str, value: str) -> None:
    """Refuse a schedule that there is not."""
    if value not in SCHEDULES:
        raise UsageError(f"{name} '{value}' is unknown; choose cosine, linear or constant")


def check_report_to(name: str, value: str) -> None:
    """Refuse a tracker that is unknown or not installed."""
    if value not in TRACKERS:
        raise UsageError(f"{name} '{value}' is unknown; choose {', '.join(TRACKERS)}")
    if value != "none" and find_spec(value) is None:
        raise UsageError(f"{name} {value} needs the package: pip install {value}")


def check_max_length(name: str, value: int) -> None:
    """Refuse examples of a few tokens."""
    if value < 8:
        raise UsageError(f"{name} is {value}; an example needs at least 8 tokens")


@dataclass(frozen=True)
class RecoverConfig:
    """The settings of a recovery run; the defaults are the paper's where it states them.

    Args:
        **settings: one line each, from the fields below.

    Raises:
        UsageError: a value outside its range, or settings that exclude each other.
    """

    method: str = setting("lora", "lora, full (all weights) or distill (from a teacher).", check=check_method)
    epochs: float = setting(1.0, "Passes over the data.", check=check_positive)
    max_steps: int | None = setting(
        None,
        "Optimizer steps, in place of epochs.",
        detail="No more of the data is read than they need.",
        check=check_at_least_one,
    )
    shares: str | tuple[float, ...] | None = setting(
        None, "With --max-steps: proportions of the sources, such as 4,1.", unset="equal"
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate.", unset="1e-4 for lora, else 5e-4", check=check_positive
    )
    schedule: str = setting("cosine", "Learning rate schedule: cosine, linear or constant.", check=check_schedule)
    warmup: float = setting(0.05, "Warm-up, as a share of the steps.", check=check_share_below_one)
    max_length: int = setting(
        256,
        "Tokens of an example at most.",
        detail="Longer answers are cut; plain text is packed into windows of it.",
        check=check_max_length,
    )
    batch_size: int = setting(64, "Examples per step, over all devices.", check=check_at_least_one)
    micro_batch: int = setting(
        4,
        "Examples per device and forward pass.",
        detail="The rest of a batch is accumulated.",
        check=check_at_least_one,
    )
    rank: int | None = setting(
        None, "LoRA rank; with distill: train adapters.", unset="8 with lora", check=check_at_least_one
    )
    alpha: float | None = setting(
        None,
        "LoRA alpha.",
        detail="Adapters are scaled by alpha / rank.",
        unset="twice the rank",
        check=check_positive,
    )
    dropout: float = setting(0.0, "LoRA dropout.", check=check_share_below_one)
    train_embeddings: bool = setting(False, "Train the embeddings too (full, distill).")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", check=check_not_negative)
    pack: bool = setting(False, "Pack instructions and chats, too.", detail="Into full windows, like plain text.")
    distill_weight: float = setting(1.0, "Weight of the KL divergence from the teacher.", check=check_not_negative)
    text_weight: float = setting(
        1.0,
        "Weight of the cross-entropy of the text.",
        detail="Where there is a teacher; else it is the loss.",
        check=check_not_negative,
    )
    top_k: int = setting(
        64,
        "Most likely tokens of the teacher that are kept.",
        detail="At every position; the rest counts as one.",
        check=check_at_least_one,
    )
    layer_weight: float = setting(
        0.0, "Weight of the distance of layer outputs.", detail="0 leaves them out.", check=check_not_negative
    )
    layers: int = setting(
        4,
        "Layer outputs that are compared.",
        detail="Evenly spaced, the last among them.",
        check=check_at_least_one,
    )
    held_out: int = setting(
        32,
        "Examples held out for evaluation; 0: none.",
        detail="Then there is no held-out loss and no early stopping.",
        check=check_not_negative,
    )
    evaluations: int = setting(10, "Evaluations, each with a checkpoint.", check=check_at_least_one)
    patience: int = setting(
        3,
        "Early stopping after so many evaluations; 0: none.",
        detail="Evaluations without a lower held-out loss.",
        check=check_not_negative,
    )
    seed: int = setting(0, "Seed of data order and adapters.", detail="And of dropout.", check=check_seed)
    bf16: bool | None = setting(
        None, "bfloat16 autocast.", detail="Weights stay as they are.", unset="where it is faster"
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations to save memory.")
    shard: bool = setting(
        False,
        "Divide the model among the processes (FSDP2).",
        detail="Weights, gradients, Adam's moments and the teacher, by torchrun; else every process has all of them.",
    )
    report_to: str = setting("none", "Where losses are logged: tensorboard, wandb or none.", check=check_report_to)

    def __post_init__(self) -> None:
        settings.run_checks(self)
        object.__setattr__(self, "shares", parse_shares(self.shares))
        if self.batch_size % self.micro_batch:
            raise UsageError(f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}")
        if self.method == "full" and self.rank is not None:
            raise UsageError("method full trains the weights themselves: leave out rank, or take method lora")
        if METHODS[self.method].teacher and not (self.distill_weight or self.text_weight or self.layer_weight):
            raise UsageError("distill_weight, text_weight and layer_weight are all 0: nothing would be learned")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate asked for, or the method's own; that of ``lora`` where adapters are trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        return METHODS["lora" if self.adapters else self.method].learning_rate

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained in place of the weights."""
        return METHODS[self.method].adapters or self.rank is not None

    @property
    def teacher(self) -> bool:
        """Whether the loss compares with a teacher, the dense model."""
        return METHODS[self.method].teacher


settings.documents_settings(RecoverConfig)


def parse_shares(shares: str | Iterable[float] | None) -> tuple[float, ...] | None:
    """Proportions from the command line, such as ``4,1``, or from Python.

    Raises:
        UsageError: something in it is no number.
    """
    if shares is None:
        return None
    try:
        return tuple(float(part) for part in (shares.split(",") if isinstance(shares, str) else shares))
    except (TypeError, ValueError):
        raise UsageError(f"shares '{shares}' is no list of numbers such as 4,1") from None
