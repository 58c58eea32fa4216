"""What a run needs, before it runs: bytes, operations, and the GPUs that have them."""
