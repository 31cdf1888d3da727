"""Tokens in, prefix-shared batches out: chat rendering, trees, micro-batches, data order."""
