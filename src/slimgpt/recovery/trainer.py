"""The transformers Trainer with our losses, states without pickle, and a halt at the first NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slimgpt.errors import NumericalError
from slimgpt.losses.distillation import layer_distance, predicted, text_loss, text_loss_and_divergence
from slimgpt.losses.linear import PieceLoss, linear_loss
from slimgpt.recovery import train_state as states
from slimgpt.recovery.config import RecoverConfig
from slimgpt.recovery.dataset import Example, collate
from slimgpt.recovery.output_head import has_plain_head, head_operands
from slimgpt.recovery.sharding import full_tensor, is_sharded, max_over_ranks
from slimgpt.recovery.teacher_cache import TeacherCache, layer_numbers
from slimgpt.runtime.distributed import ALONE, Ranks

MAX_GRADIENT_NORM = 1.0
SEEDS_OF_NUMPY = 2**32
"""Seeds are below it where transformers sets them, which gives them to NumPy too."""

MAX_CURVE_POINTS = 500
"""Approximate number of training losses in the curve of a long run."""


@dataclass(frozen=True)
class Step:
    """Progress of a run: update, planned updates, and the last losses."""

    step: int
    steps: int
    loss: float | None
    held_out: float | None


OnStep = Callable[[Step], None]


class IndexDataset(Dataset):
    """Dataset of example indices, which the collator looks up."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class _Steps(TrainerCallback):
    """Reports every step; evaluates and saves the last one."""

    def __init__(self, measure: bool, on_step: OnStep | None):
        self.measure, self.on_step = measure, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step >= state.max_steps:
            control.should_evaluate, control.should_save = self.measure, True
        if self.on_step:
            self.on_step(Step(state.global_step, state.max_steps, *latest(state.log_history)))


def latest(history: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The last training loss and the last held-out loss."""
    return tuple(  # type: ignore[return-value]
        next((entry[name] for entry in reversed(history) if name in entry), None) for name in ("loss", "held_out_loss")
    )


def should_stop_early(history: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the held-out loss has not fallen for ``patience`` evaluations; never for a patience of 0."""
    losses = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry]
    return bool(losses and patience) and len(losses) - 1 - losses.index(min(losses)) >= patience


class RecoveryTrainer(Trainer):
    """Trains a slim model on examples; see :class:`RecoverConfig` for what it minimises.

    Args:
        config: the settings.
        training: examples to learn.
        held_out: examples to measure on.
        cache: the teacher's predictions for ``training``, if there is a teacher.
        folder: where states are kept.
        pad_id: any token id; padded positions are masked.
        bf16: multiply in bfloat16.
        device: where to train.
        ranks: the processes that train together.
        logs: folder of tensorboard's files.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RecoverConfig,
        training: Sequence[Example],
        held_out: Sequence[Example],
        *,
        cache: TeacherCache | None,
        folder: Path,
        pad_id: int,
        bf16: bool,
        device: torch.device,
        ranks: Ranks = ALONE,
        logs: Path | None = None,
        on_step: OnStep | None = None,
    ):
        self.learner, self.config, self.cache, self.folder = model, config, cache, folder
        self.training, self.held_out, self.pad_id = training, held_out, pad_id
        self.ranks, self.sharded = ranks, is_sharded(model)
        self._plain_head: bool | None = None  # not known yet
        accumulate = config.batch_size // (config.micro_batch * ranks.world)
        steps = total_steps(config, len(training))
        evaluate_every = max(1, steps // config.evaluations)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=config.micro_batch,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=config.epochs,
            max_steps=steps,
            learning_rate=config.peak_learning_rate,
            lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
            warmup_steps=int(config.warmup * steps),
            weight_decay=config.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=MAX_GRADIENT_NORM,
            bf16=bf16,
            use_cpu=device.type == "cpu",
            seed=config.seed % SEEDS_OF_NUMPY,
            logging_steps=max(1, steps // MAX_CURVE_POINTS),
            logging_nan_inf_filter=False,
            eval_strategy="steps" if held_out else "no",
            eval_steps=evaluate_every,
            save_strategy="steps",
            save_steps=evaluate_every,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="wandb" if config.report_to == "wandb" else "none",
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=False,
        )
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=arguments,
            train_dataset=IndexDataset(len(training)),
            eval_dataset=IndexDataset(len(held_out)),
            data_collator=self._collate,
            callbacks=[_Steps(bool(held_out), on_step)],
        )
        self.remove_callback(PrinterCallback)
        if config.report_to == "tensorboard" and ranks.main:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations.integration_utils import TensorBoardCallback

            self.add_callback(TensorBoardCallback(SummaryWriter(logs)))  # its own folder ends with the run's
        self.model_accepts_loss_kwargs = True  # so that tokens are counted over a whole batch, on all devices
        if self.sharded:  # FSDP2 adds gradients up, so accelerate must not wrap the model in DDP
            self.accelerator.prepare_model = partial(  # type: ignore[method-assign]
                self.accelerator.prepare_model, device_placement=False, evaluation_mode=True
            )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # else every process has its part where it belongs
            super()._move_model_to_device(model, device)

    def _collate(self, numbers: list[int]) -> dict[str, Any]:
        batch = collate([self.training[number] for number in numbers], self.pad_id)
        return batch | (self.cache.rows(numbers) if self.cache is not None else {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, as its share of the mean over all predicted tokens of the batch."""
        config, labels = self.config, inputs["labels"]
        compare = "teacher_layers" in inputs
        tokens = labels[:, 1:][labels[:, 1:] != -100]

        def loss_of(logits: Tensor, place: slice) -> Tensor:
            if self.cache is None:
                return text_loss(logits, tokens[place])
            teacher = [inputs[name][place] for name in ("teacher_tokens", "teacher_log_p")]
            text, kl = text_loss_and_divergence(logits, tokens[place], *teacher)
            return config.text_weight * text + config.distill_weight * kl

        total, outputs = self._summed_loss(model, inputs, labels, loss_of, compare)
        if compare:
            numbers = layer_numbers(inputs["teacher_layers"].shape[1], len(outputs.hidden_states) - 1)
            own = torch.stack([predicted(outputs.hidden_states[number], labels)[0] for number in numbers], 1)
            total = total + config.layer_weight * layer_distance(own, inputs["teacher_layers"])
        count = num_items_in_batch if num_items_in_batch is not None else max(1, len(tokens))
        loss = total / count * (self.accelerator.num_processes if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    def _summed_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, loss_of: PieceLoss, states_too: bool = False
    ) -> tuple[Tensor, Any]:
        """A loss of all predicted tokens, and the model's outputs; logits are computed in pieces where the head is
        nothing but a matrix."""
        if self._plain_head is None:
            self._plain_head = has_plain_head(self.learner, inputs["input_ids"][:1, :2], self.args.bf16)
        few: dict[str, Any] = {"output_hidden_states": True, "logits_to_keep": 1} if self._plain_head else {}
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            **{"output_hidden_states": states_too, **few},
        )
        if not self._plain_head:
            logits, _ = predicted(outputs.logits, labels)
            return loss_of(logits, slice(None)), outputs
        head: Any = self.learner.get_output_embeddings()  # type: ignore[operator]
        hidden, _ = predicted(outputs.hidden_states[-1], labels)
        return linear_loss(*head_operands(hidden, head, self.args.bf16), loss_of), outputs

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean cross-entropy of the held-out tokens; every process takes a share of the examples."""
        self.learner.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        examples = self.held_out[self.args.process_index :: self.args.world_size]
        size = self.config.micro_batch
        batches = [examples[start : start + size] for start in range(0, len(examples), size)]
        count = max_over_ranks(self.ranks, len(batches)) if self.sharded else len(batches)
        with self.compute_loss_context_manager():
            for number in range(count):  # through a divided model all processes go equally often
                counted = number < len(batches)
                batch = collate(batches[number] if counted else self.held_out[:1], self.pad_id)
                batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                labels = batch.pop("labels")
                tokens = labels[:, 1:][labels[:, 1:] != -100]

                def loss_of(logits: Tensor, place: slice, tokens: Tensor = tokens) -> Tensor:
                    return text_loss(logits, tokens[place])

                total, _ = self._summed_loss(self.learner, batch, labels, loss_of)
                if counted:
                    sums += torch.tensor([float(total), len(tokens)], device=sums.device)
        self.learner.train()
        total, count = self.accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
        metrics = {"held_out_loss": total / max(count, 1)}
        if count:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            if should_stop_early(self.state.log_history, self.config.patience):
                self.control.should_training_stop = True
        return metrics

    @property
    def best_step(self) -> int:
        """The step with the lowest held-out loss, whose state is kept; the last one where nothing is held out."""
        history = self.state.log_history
        losses = {int(e["step"]): e["held_out_loss"] for e in history if "held_out_loss" in e and e["step"]}
        return min(losses, key=losses.__getitem__) if losses else self.state.global_step

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As in transformers; a gradient that is no number ends the run before it reaches the weights.

        Gradients are summed over all processes before this, so all of them see it.
        """
        norm: Any = super()._clip_grad_norm(model)
        norm = full_tensor(norm)
        if not math.isfinite(float(norm)):
            self._save_checkpoint(model, None)
            done = self.state.global_step
            raise NumericalError(
                f"the loss or its gradient is {float(norm)} at step {done + 1}; the state after step {done} is kept in "
                f"{self.folder}. Go on from it with --resume and a lower --learning-rate"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        optimizer: Any = self.optimizer
        if self.args.should_save:
            states.write_state(self.folder, self.learner, optimizer, self.lr_scheduler, self.state)
            states.keep_only(self.folder, {self.state.global_step, self.best_step})
        elif self.sharded:
            states.send_state(self.learner, optimizer)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        states.load_weights(Path(resume_from_checkpoint), model or self.learner)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer: Any = self.optimizer
            states.load_optimizer(Path(checkpoint), optimizer, self.lr_scheduler, self.config.peak_learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states.load_generators(Path(checkpoint))


def total_steps(config: RecoverConfig, examples: int) -> int:
    """Updates of a run: what the epochs give, at most ``max_steps``."""
    steps = max(1, math.ceil(config.epochs * math.ceil(examples / config.batch_size) - 1e-9))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def needed_examples(config: RecoverConfig) -> int | None:
    """Examples that ``max_steps`` updates can use in the given epochs; ``None`` where all are used."""
    if config.max_steps is None:
        return None
    return math.ceil(config.max_steps * config.batch_size / config.epochs)


def make_trainable(model: PreTrainedModel, config: RecoverConfig) -> nn.Module:
    """The model with its trainable parameters: LoRA adapters are added, or the embeddings frozen.

    ``checks.check_request`` has made sure that peft is installed where adapters are trained.
    """
    if config.gradient_checkpointing:
        turn_on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        turn_on()
        model.enable_input_require_grads()  # else nothing before the first adapter would have a gradient
    if not config.adapters:
        model.requires_grad_(True)
        if not config.train_embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.requires_grad_(False)  # type: ignore[union-attr]
        return model
    from peft import LoraConfig, get_peft_model

    rank = config.rank or 8
    adapters = LoraConfig(
        r=rank,
        lora_alpha=config.alpha or 2 * rank,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


__all__ = ["OnStep", "RecoveryTrainer", "Step", "make_trainable", "needed_examples", "total_steps"]
