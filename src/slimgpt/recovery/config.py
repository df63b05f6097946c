"""Settings of a recovery run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from slimgpt.errors import UsageError
from slimgpt.runtime.setting_checks import check_seed


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


@dataclass(frozen=True)
class RecoverConfig:
    """The settings of a recovery run; the defaults are the paper's where it states them.

    Args:
        method: a key of :data:`METHODS`.
        epochs: passes over the data.
        max_steps: end after so many updates; no more of the data is read than they need.
        shares: how many examples the sources give then, in proportion; ``None``: each the same number.
        learning_rate: at its highest; ``None`` means the method's own.
        schedule: how it falls: ``cosine``, ``linear`` or ``constant``.
        warmup: the share of the steps over which it rises.
        max_length: tokens of an example: longer answers are cut, plain text is packed into windows of it.
        batch_size: examples per update, over all devices.
        micro_batch: examples that go through the model together on a device; the rest of a batch is accumulated.
        rank: of the adapters; given with ``distill``, adapters are trained in place of the weights.
        alpha: their scale is ``alpha / rank``; ``None`` means twice the rank.
        dropout: on the way into the adapters.
        train_embeddings: with ``full`` and ``distill``, train the embeddings too.
        weight_decay: of AdamW.
        pack: pack instructions and chats into full windows like plain text.
        distill_weight: weight of the divergence from the teacher; the text's own cross-entropy has weight 1.
        text_weight: weight of that cross-entropy when there is a teacher.
        top_k: the teacher's most likely tokens to keep at every position; the rest counts as one.
        layer_weight: weight of the distance of layer outputs; 0 leaves them out.
        layers: how many layer outputs to compare, evenly spaced, the last among them.
        held_out: examples of the data that are not trained on; 0 means no held-out loss and no early stop.
        evaluations: how often the held-out loss is taken and the state is kept, in all.
        patience: stop after so many evaluations without a lower held-out loss; 0 means never.
        seed: for the order of the data, the adapters and dropout.
        bf16: multiply in bfloat16, weights stay as they are; ``None``: where it is faster.
        gradient_checkpointing: compute activations twice in place of keeping them.

    Raises:
        UsageError: a value outside its range.
    """

    method: str = "lora"
    epochs: float = 1.0
    max_steps: int | None = None
    shares: tuple[float, ...] | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    max_length: int = 256
    batch_size: int = 64
    micro_batch: int = 4
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    train_embeddings: bool = False
    weight_decay: float = 0.0
    pack: bool = False
    distill_weight: float = 1.0
    text_weight: float = 1.0
    top_k: int = 64
    layer_weight: float = 0.0
    layers: int = 4
    held_out: int = 32
    evaluations: int = 10
    patience: int = 3
    seed: int = 0
    bf16: bool | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method '{self.method}' is unknown; choose {', '.join(METHODS)}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise UsageError(f"schedule '{self.schedule}' is unknown; choose cosine, linear or constant")
        for name in ("max_steps", "batch_size", "micro_batch", "rank", "top_k", "layers", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.max_length < 8:
            raise UsageError(f"max_length is {self.max_length}; an example needs at least 8 tokens")
        for name in ("epochs", "learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value}; it must be more than 0")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("weight", "decay", "out", "patience")) and not value >= 0:
                raise UsageError(f"{field.name} is {value}; it must be 0 or more")
        check_seed("seed", self.seed)
        if not 0 <= self.warmup < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"warmup is {self.warmup} and dropout {self.dropout}; both must be in [0, 1)")
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
