"""Measurements.

`against_trl.py` (speed and memory against TRL; `ours.py`, `trl_side.py`, `workload.py` and `measure.py` are its
parts), `judge_in_trl.py` (the judge as TRL's reward), `scaling.py` (time and memory against tokens), `where.py`
(an update against the machine), `gpu.py` (what only a card can show), `hostile.py` and `attack.py` (texts of
strangers)."""
