"""Benchmarks and probes.

`benchmarks.py` (published files -> pairs, verdicts -> scores), `outcomes.py` (logs -> outcomes), `tables.py`,
`probes.py`, `published.json` (the paper's numbers)."""
