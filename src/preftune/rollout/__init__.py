"""Responses sampled from a model, many at once."""
