"""Sparse attention kernels: arrays in, arrays out, no policy. Importable on its own."""

from pallas_kernels.attention import dense_attention as dense_attention
from pallas_kernels.attention import sparse_attention as sparse_attention
from pallas_kernels.backends import Choice as Choice
from pallas_kernels.backends import choose_implementation as choose_implementation
from pallas_kernels.device import lowering_for as lowering_for
from pallas_kernels.index.masses import tile_masses as tile_masses
from pallas_kernels.pattern_attention import a_shape_attention as a_shape_attention
from pallas_kernels.pattern_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.pattern_attention import vertical_slash_attention as vertical_slash_attention
from pallas_kernels.plan import SparsePlan as SparsePlan
from pallas_kernels.sizes import KEY_TILE as KEY_TILE
from pallas_kernels.sizes import QUERY_TILE as QUERY_TILE
