"""A model folder in and out. Takes a module and never imports `model.py`.

`folder.py` (which folder, its config), `tokenizer.py`, `weights.py` (safetensors -> parameters), `export.py`."""
