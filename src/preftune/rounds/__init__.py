"""Iterated methods: rounds of sampling, scoring, selecting and training."""
