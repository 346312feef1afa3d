"""Benchmarks and probes.

`benchmarks.py` (published files -> pairs, verdicts -> scores), `outcomes.py` (logs -> outcomes), `silent.py` (outputs
without a verdict), `tables.py`, `probes.py`, `published.json` (the paper's numbers)."""
