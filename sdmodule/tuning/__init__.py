"""What is trained of a model: all of it, adapters, words, or a ControlNet."""
