"""The tiny world, in which both stages run on a laptop in minutes.

`world.py` (questions, answers, traces), `files.py` (tokenizer, model, data files), `oracle.py` (a teacher behind a
server), `probe.py` (what a trained judge has learnt)."""
