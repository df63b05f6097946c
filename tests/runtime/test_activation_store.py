"""Activations kept in a file."""

from __future__ import annotations

import pytest
import torch

from slimgpt.runtime.activation_store import ActivationStore


def test_a_store_in_a_file_gives_back_what_was_put(tmp_path):
    store = ActivationStore("file", torch.device("cpu"), tmp_path)
    for round_number in range(2):
        for number in range(3):
            store.put(number, torch.full((2, 5), float(number + round_number), dtype=torch.bfloat16))
    assert all(torch.equal(store.get(n), torch.full((2, 5), n + 1.0, dtype=torch.bfloat16)) for n in range(3))
    assert store.take(1).sum() == 20
    with pytest.raises(KeyError):
        store.get(1)
