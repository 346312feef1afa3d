"""A pair -> a verdict, and what many verdicts say.

`verdicts.py` (judge_pairs, majority, tally), `ranking.py`, `pointwise.py`, `scalar.py` (reward models that give one
number), `endpoint.py` (servers)."""
