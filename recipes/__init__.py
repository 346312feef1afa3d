"""Published runs and the miniature: the paper's experiments in the tiny world."""
