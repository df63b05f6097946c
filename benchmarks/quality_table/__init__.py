"""What `benchmarks/quality.py` is made of: models, texts, rows that are kept one by one, the report."""
