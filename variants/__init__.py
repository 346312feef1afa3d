"""The methods that the paper is discussed with, one small file each.

`dr_grpo.py`, `dapo.py`, `stable_reinforce.py`, `cold_start.py`, `rlpr.py` with `std_filter.py`, `grm.py`, `rrm.py`,
`toy_forms.py`, `scalar_rm.py`."""
