"""What a model is worth: perplexity, speed and memory."""

from slimgpt.evaluation.perplexity import Perplexity, perplexity
from slimgpt.evaluation.speed import Speed, measure_speed, peak_memory

__all__ = ["Perplexity", "Speed", "measure_speed", "peak_memory", "perplexity"]
