"""What the policy computes with.

`attention.py` (who sees whom, on each device), `head.py` (hidden states -> log-probs, in chunks), `decode.py`
(sampling with a KV cache)."""
