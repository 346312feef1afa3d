"""What every run stands on.

`errors.py`, `cli.py` (flags, start and end of a script), `ranks.py`, `seeds.py`, `disk.py` (files whole or not at
all), `run_folder.py`, `states.py` (resume), `steps.py`, `metrics.py`, `sizes.py` (`--dry-run`)."""
