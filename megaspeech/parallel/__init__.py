"""How the model is spread, and how its ranks live and end: groups, wrapping, schedule, reductions; launch, watchdog."""
