"""File readers and the published row layouts, dict to dict.

`readers.py` (files and hub data sets -> rows), `layouts.py` (a row of any known layout -> the fields of a pair)."""
