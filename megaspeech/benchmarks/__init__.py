"""How fast a whole training step is, where its time goes, and what people would pick instead takes for the same."""
