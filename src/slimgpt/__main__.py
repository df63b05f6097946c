"""``python -m slimgpt``."""

from slimgpt.cli import main

main()
