"""What is kept: a run's state, where it is stored, and its forms in other runtimes."""
