"""Judges: from records to the scores of their responses, by reward models, rules, endpoints, or several of them together."""
