"""Tables of times that no machine has measured."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from slimgpt.models.architecture import CHANNELS, HEADS
from slimgpt.models.lookup import layer_sizes
from slimgpt.planning.speed_table import LayerTimes, SpeedTable, table_model


def table_of(
    config: PreTrainedConfig,
    seconds: Callable[[int, int], float],
    rest: float = 1e-3,
    *,
    head_unit: str = "query",
    heads: tuple[int, ...] = (),
    channels: tuple[int, ...] = (),
) -> SpeedTable:
    """A table whose times are a function of heads and channels, the same for all layers, half of it for the prompt."""
    dense = layer_sizes(config)[0]
    new_tokens = 4

    def row(**sizes: int) -> dict[str, float]:
        each = seconds(sizes.get("heads", dense[HEADS]), sizes.get("channels", dense[CHANNELS]))
        return {**sizes, "prompt": each / 2, "token": each / 2 / new_tokens}

    group = dense[HEADS] // dense["num_key_value_heads"]
    kv = dense["num_key_value_heads"]
    return SpeedTable(
        engine="transformers",
        model=table_model(config),
        head_unit=head_unit,
        batch=1,
        prompt=16,
        new_tokens=new_tokens,
        rest={"prompt": rest / 2, "token": rest / 2 / new_tokens},
        kinds=(
            LayerTimes(
                tuple(range(config.num_hidden_layers)),
                tuple(
                    row(heads=h, kv_heads=kv if head_unit == "query" and h else h // group)
                    for h in (dense[HEADS], *heads)
                ),
                tuple(row(channels=c) for c in (dense[CHANNELS], *channels)),
            ),
        ),
        machine={},
    )
