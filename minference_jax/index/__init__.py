"""The online index in plain jnp: probe rows, exact selection, and the three patterns' estimates."""

from minference_jax.index.antidiagonal import Antidiagonal as Antidiagonal
from minference_jax.index.build import make_plan as make_plan
from minference_jax.index.query_aware import QueryAware as QueryAware
from minference_jax.index.tiles import tile_budget as tile_budget
