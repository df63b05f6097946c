"""Training after pruning, towards the dense model's predictions."""
