"""Raw preference data -> training files.

`sources.py`, `card.py`, `build_data.py`, `augment.py` (pairs); `distill.py`, `hint.py`, `rstar.py` (traces)."""
