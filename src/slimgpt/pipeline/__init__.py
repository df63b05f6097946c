"""A whole run: request, stages, result."""
