"""Measurements: speed and memory, hostile inputs, long runs."""
