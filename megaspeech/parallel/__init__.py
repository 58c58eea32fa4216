"""How the model is spread: the host, process groups, wrapping, the pipeline schedule, reductions."""
