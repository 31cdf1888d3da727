"""Models: loading and saving, tree attention, chunked log-probabilities, reward head, LoRA."""
