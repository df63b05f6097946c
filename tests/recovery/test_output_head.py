"""The loss of a recovery from the output head's input, where products are in bfloat16."""

from __future__ import annotations

import pytest
import torch

from slimgpt.recovery.config import RecoverConfig
from slimgpt.recovery.dataset import Example
from slimgpt.recovery.output_head import has_plain_head
from slimgpt.recovery.trainer import RecoveryTrainer, make_trainable
from tests.models.families import tiny_model


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_pieces_are_taken_and_give_the_loss_of_whole_logits(method, dtype, tmp_path):
    ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))
    examples = [Example(row, row) for row in ids]
    config = RecoverConfig(method=method, max_steps=1, micro_batch=2, batch_size=2)
    losses = []
    for plain in (None, False):
        torch.manual_seed(0)
        model = make_trainable(tiny_model("llama").to(dtype), config)
        trainer = RecoveryTrainer(
            model, config, examples[:2], examples[2:], cache=None, folder=tmp_path / str(plain), pad_id=0, bf16=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        trainer._plain_head = plain
        trainer.train()
        assert trainer._plain_head is (plain is None)
        losses.append([entry[key] for entry in trainer.state.log_history for key in entry if key.endswith("loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_head_with_a_cap_is_not_plain_however_small_its_logits_are():
    ids = torch.tensor([[1, 2]])
    assert has_plain_head(tiny_model("llama"), ids)
    assert not has_plain_head(tiny_model("gemma2"), ids)
