"""The course.

`handout.py` (a student's copy), `grade.py` and `worker.py` (submissions and the processes they run in), `patched.py`
(exercises and faults as patches), `notebook.py` (one round, step by step)."""
