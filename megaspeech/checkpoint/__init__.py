"""What is kept: a run's state, and where it is stored."""
