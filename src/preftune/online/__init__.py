"""Online reinforcement learning: a policy samples, a judge scores, the policy learns from its own responses."""
