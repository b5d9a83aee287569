"""A family of patterns is one file and one line of the registry: a toy family gets everything that the others have."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import AShape, Dense, HeadPatterns, VerticalSlash, load_patterns, parse_pattern, save_patterns
from minference_jax import sparse_attention as attention
from minference_jax.attention import make_plan
from minference_jax.models.config import LlamaConfig
from minference_jax.patterns import Budgets, Pattern, Where, registry
from minference_jax.patterns.base import check_budget, members, pairs, scaled_budget, table
from minference_jax.patterns.text import format_pattern
from minference_jax.planning.cost import choose_attention
from minference_jax.planning.memory import memory_need
from minference_jax.search import default_candidates
from minference_jax.search.candidates import arrays, check_candidates
from pallas_kernels import SparsePlan

ROOT = Path(__file__).parents[1]


# The file of the family.


@dataclasses.dataclass(frozen=True)
class Near(Pattern):
    """The `tiles` key tiles before each query tile."""

    name: ClassVar[str] = "near-tiles"

    tiles: int = 2

    def __post_init__(self):
        check_budget("Near", "tiles", self.tiles, 1)

    @classmethod
    def budgets(cls, heads):
        return NearBudgets(table(heads, lambda p: p.tiles, np.int32, 0), max(p.tiles for p in members(heads)))

    def visited(self, rows, keys, rates):
        return pairs(rows, keys, 64 * self.tiles)

    def index_bytes(self, rows, keys, heads, itemsize=2):
        return 4 * heads * self.tiles

    def scaled(self, factor, keys):
        return Near(scaled_budget(self.tiles, factor, -(-keys // 64), least=1))

    @classmethod
    def candidates(cls):
        return (Near(8),)

    def budget(self):
        return 64 * self.tiles


@partial(jax.tree_util.register_dataclass, data_fields=["tiles"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class NearBudgets(Budgets):
    tiles: jax.Array
    width: int

    def index(self, q, k, where: Where) -> SparsePlan:
        lead = q.shape[0], q.shape[2]
        bands = jnp.broadcast_to(64 * jnp.arange(1, self.width + 1, dtype=jnp.int32), (*lead, self.width))
        return SparsePlan(bands=bands, band_count=jnp.broadcast_to(self.tiles, lead), band_multiple=64, clean=True)

    def widest(self, keys):
        return dataclasses.replace(self, width=-(-keys // 64))


# And one line of the registry.


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, Near.name, Near)


def test_it_shares_a_launch_with_other_heads(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 500, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    heads = (Near(1), Near(3), VerticalSlash(20, 40), Dense())
    plan = jax.jit(lambda q, k: make_plan(q, k, heads))(q, k)
    mask = np.asarray(plan.to_mask(500, 500))[0]
    alone = np.asarray(make_plan(q, k, Near(3)).to_mask(500, 500))[0]
    np.testing.assert_array_equal(mask[1], alone[1])
    np.testing.assert_array_equal(mask[3], np.tri(500, dtype=bool))
    np.testing.assert_array_equal(mask[0, 300], [192 <= key <= 300 for key in range(500)])  # its tile starts at 256
    out, info = jax.jit(lambda *qkv: attention(*qkv, heads, return_info=True))(q, k, v)
    expected = attention(q, k, v, heads, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(info.density[0, 0], mask[0].sum() / np.tri(500).sum(), rtol=1e-5)


def test_files_and_text(tmp_path):
    patterns = HeadPatterns(((Near(), AShape(4, 64)), (Near(5), Near(1))))
    save_patterns(patterns, tmp_path / "p.json")
    assert load_patterns(tmp_path / "p.json") == patterns
    assert '"near_tiles"' in (tmp_path / "p.json").read_text()
    assert parse_pattern("near-tiles:tiles=5") == Near(5) and format_pattern(Near(5)) == "near-tiles:tiles=5"
    with pytest.raises(ValueError, match="Near: tiles"):
        parse_pattern("near-tiles:tiles=0")
    with pytest.raises(ValueError, match="no form in the official format"):
        save_patterns(patterns, tmp_path / "p.json", official=True)


def test_cost_and_memory():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=4096,
        intermediate_size=64,
        num_layers=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    )
    near, far = (HeadPatterns.uniform(Near(tiles), 1, 32) for tiles in (2, 2000))
    choice = partial(choose_attention, config, rows=1 << 17, keys=1 << 17, device="NVIDIA H100 80GB HBM3")
    assert not choice(near).dense and choice(far).dense
    need = [memory_need(config, tokens=1 << 17, patterns=pattern).activations for pattern in (None, Near(2))]
    assert need[1] - need[0] in (0, 4 * 32 * 2)  # the MLP may need more than attention


def test_picture_has_its_label(tmp_path):
    pytest.importorskip("matplotlib")
    from minference_jax.viz import plot_patterns

    plot_patterns(HeadPatterns(((Near(), AShape(4, 64)),)), tmp_path / "map.svg")
    assert "near-tiles" in (tmp_path / "map.svg").read_text()


def test_search_tries_it():
    assert Near(8) in check_candidates(default_candidates())
    one, other = (arrays([Near(8).scaled(factor, 1024)] * 3, 1024) for factor in (0.2, 1.5))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [int(x.budgets[0].tiles[0]) for x in (one, other)] == [2, 12]


# What makes it so.


def test_nothing_outside_the_folder_asks_which_family_a_pattern_is_of():
    families = "|".join(family.__name__ for family in registry.FAMILIES.values())
    asks = re.compile(
        rf"isinstance\([^()]*\b(?:{families})\b|type\([^()]*\) (?:is|==|in)[^\n]*\b(?:{families})\b|\.kind =="
    )
    sources = [p for p in (ROOT / "minference_jax").rglob("*.py") if "patterns" not in p.relative_to(ROOT).parts]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if asks.search(line) and "rope" not in line and "self.kind" not in line
    ]
    assert not found, "\n".join(found)
