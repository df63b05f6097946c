"""Evaluation of models: perplexity, accuracy on tasks, pass-key retrieval, speed."""

from slimgpt.evaluation.contamination import contamination_note
from slimgpt.evaluation.corpora import CORPORA, Text, read_text
from slimgpt.evaluation.divergence import Distribution, Divergence
from slimgpt.evaluation.llama_cpp import load_gguf
from slimgpt.evaluation.passkey_retrieval import Passkey, passkey
from slimgpt.evaluation.perplexity import Perplexity, check_protocol, perplexity
from slimgpt.evaluation.samples import Sample, write_samples
from slimgpt.evaluation.speed import Speed, check_generation, measure_speed, peak_memory
from slimgpt.evaluation.tasks import ALIASES, TaskScores, check_tasks, evaluate_tasks, task_names

__all__ = [
    "ALIASES",
    "CORPORA",
    "Distribution",
    "Divergence",
    "Passkey",
    "Perplexity",
    "Sample",
    "Speed",
    "TaskScores",
    "Text",
    "check_generation",
    "check_protocol",
    "check_tasks",
    "contamination_note",
    "evaluate_tasks",
    "load_gguf",
    "measure_speed",
    "passkey",
    "peak_memory",
    "perplexity",
    "read_text",
    "task_names",
    "write_samples",
]
