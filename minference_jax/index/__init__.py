"""The online index in plain jnp: probe rows, exact selection, and the three patterns' estimates."""

from minference_jax.index.tiles import tile_budget as tile_budget
