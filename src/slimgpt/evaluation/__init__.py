"""What a model is worth: perplexity, accuracy on tasks, memory over long texts, speed."""

from slimgpt.evaluation.leaks import leak_note
from slimgpt.evaluation.long import Passkey, passkey
from slimgpt.evaluation.perplexity import BOS, Perplexity, perplexity
from slimgpt.evaluation.speed import Speed, measure_speed, peak_memory
from slimgpt.evaluation.tasks import ALIASES, TaskScores, evaluate_tasks, task_names
from slimgpt.evaluation.texts import CORPORA, Text, read_text

__all__ = [
    "ALIASES",
    "BOS",
    "CORPORA",
    "Passkey",
    "Perplexity",
    "Speed",
    "TaskScores",
    "Text",
    "evaluate_tasks",
    "leak_note",
    "measure_speed",
    "passkey",
    "peak_memory",
    "perplexity",
    "read_text",
    "task_names",
]
