"""The course.

`handout.py` (a student's copy), `grade.py` and `worker.py` (submissions and the processes they run in), `patched.py`
(exercises and faults as patches), `equations.py` (the paper's equations, their code, their tests), `notebook.py`
(one round, step by step)."""
