"""Attention over a plan in plain jnp: runs anywhere, differentiable; one query tile after another."""
