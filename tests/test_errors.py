"""Messages for the command line, and what Python shows beside them."""

from __future__ import annotations

import pickle
import traceback

import pytest

import slimgpt
from slimgpt.errors import OutputError, UsageError


def test_python_shows_the_keywords_of_the_options_that_a_message_names():
    with pytest.raises(UsageError) as refused:
        slimgpt.recover("slim", "out", "text", method="full", push_to_hub=None, rank=8)
    error = OutputError("OUT exists; pass --overwrite to replace it, or raise --num-samples (--overwrite)")
    shown = "".join(traceback.format_exception(error))
    assert shown.endswith(
        "In Python, options are keywords: overwrite for --overwrite, num_samples for --num-samples.\n"
    )
    assert "In Python" not in str(error)  # what the command line prints
    assert not hasattr(UsageError("nothing to name"), "__notes__")
    assert not [note for note in getattr(refused.value, "__notes__", []) if "--" not in note]


def test_errors_are_pickled_whole():
    error = pickle.loads(pickle.dumps(UsageError("raise --num-samples")))
    assert str(error) == "raise --num-samples"
    assert error.__notes__ == ["In Python, options are keywords: num_samples for --num-samples."]
