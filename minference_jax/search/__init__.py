"""Offline search for each head's pattern and budgets, by the error of the attention output at equal kernel cost."""

from minference_jax.search.candidates import PAPER as PAPER
from minference_jax.search.candidates import default_candidates as default_candidates
from minference_jax.search.cost import Latency as Latency
from minference_jax.search.density import scale_to_density as scale_to_density
from minference_jax.search.density import share_among_layers as share_among_layers
from minference_jax.search.driver import search_patterns as search_patterns
from minference_jax.search.driver import search_to_file as search_to_file
from minference_jax.search.settings import Settings as Settings
