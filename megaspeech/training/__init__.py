"""The loop, the forward step, metrics, and what is written while training."""
