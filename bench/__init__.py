"""Measurements.

`against_trl.py` (speed and memory against TRL; `ours.py`, `trl_side.py`, `workload.py` and `measure.py` are its
parts), `scaling.py` (time and memory against tokens), `where.py` (against the machine), `gpu.py` (what only a card can show), `hostile.py` and
`attack.py` (texts of strangers)."""
