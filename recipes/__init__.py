"""Published runs and the miniature.

A script for each published run and one for a single GPU, `miniature.py` (the paper's experiments in the tiny world,
as rows of commands), `miniature_results.py` (their numbers, tables and plot), `judge_as_reward.py` (a judge as the
reward of another model), `smollm2.py` (a small real model), `relevance.py` (its pairs)."""
