"""Code that runs in the Python of an engine, where slimgpt is not installed; the folder is on that Python's path."""
