"""From codes to batches: tasks, the tokenizer, shards, their mixture, loading."""
