"""The sparse patterns that a head can follow: one family a file, each with all that is known of it.

`base` says what a family is made of; `registry` lists them; `heads` gives each head of a model its own; `files` and
`text` read and write them.
"""

from minference_jax.patterns.a_shape import AShape as AShape
from minference_jax.patterns.antidiagonal import Antidiagonal as Antidiagonal
from minference_jax.patterns.base import Budgets as Budgets
from minference_jax.patterns.base import Pattern as Pattern
from minference_jax.patterns.base import PlanBuilder as PlanBuilder
from minference_jax.patterns.base import Where as Where
from minference_jax.patterns.block_sparse import BlockSparse as BlockSparse
from minference_jax.patterns.dense import Dense as Dense
from minference_jax.patterns.heads import HeadPatterns as HeadPatterns
from minference_jax.patterns.heads import LayerPatterns as LayerPatterns
from minference_jax.patterns.heads import layer_patterns as layer_patterns
from minference_jax.patterns.per_tile import PerTile as PerTile
from minference_jax.patterns.query_aware import QueryAware as QueryAware
from minference_jax.patterns.registry import register as register
from minference_jax.patterns.shared_density import SharedDensity as SharedDensity
from minference_jax.patterns.vertical_slash import VerticalSlash as VerticalSlash
