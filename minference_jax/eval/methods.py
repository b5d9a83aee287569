"""The methods that an evaluation compares, each at (nearly) the same share of visited keys.

A method says which patterns a model should have for prompts of a length: the budgets are chosen so that the plan visits
`density` of the causal cells. For a fixed mask that is exact up to a tile; for an index it is an estimate, since the
prompt decides where columns and tiles lie, unless it is measured on another prompt (`Method.measured`). Where even the
smallest budget visits more (short prompts), it is that. What was visited is measured with every sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from minference_jax.eval.baselines import BigBird, Dilated, Longformer, StaticPlan, TopKOracle
from minference_jax.models.llama import Llama
from minference_jax.patterns import AShape, BlockSparse, Pattern, SharedDensity, VerticalSlash
from minference_jax.patterns.resolve import Patterns, resolve_patterns
from minference_jax.search.density import scale_to_density, share_among_layers
from pallas_kernels.plan import KEY_TILE, QUERY_TILE, num_key_tiles, num_query_tiles

Chooser = Callable[[Llama, int, float], Patterns]
"""The patterns of a method for a model, a prompt length in tokens and a density."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A name for reports and what it stands for."""

    name: str
    choose: Chooser

    @classmethod
    def fixed(cls, name: str, patterns: Patterns) -> Method:
        """The same patterns for every length, whatever the density."""
        return cls(name, lambda model, length, density: patterns)

    @classmethod
    def measured(cls, name: str, patterns: Chooser | Patterns, tokens: Sequence[int]) -> Method:
        """Patterns with all budgets times one factor, so that they visit the density on another prompt: `tokens`.

        Of those the first as many as a length has are run, from the beginning again where there are fewer. Patterns of
        a search serve any length so; a rule such as `METHODS["minference"]`, whose budgets are an estimate of what
        they visit, keeps to the density. A pattern that has a density is shared among the layers by that prompt.
        """

        def choose(model: Llama, length: int, density: float) -> Patterns:
            prompt = jnp.asarray(np.resize(np.asarray(tokens, np.int32), (1, length)))
            found = patterns(model, length, density) if callable(patterns) else patterns
            if isinstance(found, Pattern) and found.share() is not None:
                return share_among_layers(model, prompt, found)
            found = resolve_patterns(found, model.config.num_layers, model.config.num_heads)
            if found is None or found.builders:
                raise TypeError(f"{name}: {found!r} has no budgets to scale")
            return scale_to_density(model, prompt, found, density)

        return cls(name, choose)


def plan_density(
    length: int,
    *,
    bands: Sequence[int] = (),
    sink: int = 0,
    columns: int = 0,
    blocks: int = 0,
    question: int = 0,
) -> float:
    """Visited share of the causal cells of `length` tokens, without making a plan.

    - `bands`: distances, multiples of 64. `sink`: keys from the first on. `columns`: keys spread evenly over the rest.
    - `blocks`: key tiles per query tile besides, taken not to overlap with the bands. `question`: last rows that see
      everything, rounded out to query tiles.
    """
    first = QUERY_TILE * np.arange(num_query_tiles(length))
    rows = np.minimum(length - first, QUERY_TILE)
    tile = np.arange(num_key_tiles(length))
    seen = np.isin((first[:, None] - KEY_TILE * tile) // KEY_TILE * KEY_TILE, np.asarray(bands, int))
    past = KEY_TILE * tile < first[:, None]
    listed = np.minimum(np.clip(sink - KEY_TILE * tile, 0, KEY_TILE) + columns * KEY_TILE / length, KEY_TILE)
    keys = np.where(seen & past, KEY_TILE, np.where(past, listed, 0)).sum(1)
    keys = np.minimum(keys + KEY_TILE * blocks, first)
    keys = np.where((first + QUERY_TILE > length - question) & (question > 0), first, keys)
    diagonal = (rows * (rows + 1) // 2).sum()
    return float((keys * rows).sum() + diagonal) / (length * (length + 1) / 2)


def _largest(visits: Callable[[int], float], most: int, density: float) -> int:
    """The largest budget in 0 … most at which `visits` stays within the density (0 if none does)."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if visits(middle) <= density else (low, middle - 1)
    return low


def near_bands(tiles: int) -> list[int]:
    """The distances of the `tiles` key tiles before a query tile."""
    return [KEY_TILE * i for i in range(1, tiles + 1)]


def vertical_slash_for(length: int, density: float, *, columns: int | None = None) -> VerticalSlash:
    """As many tiles as a density allows beside the columns: three columns in 32 tokens, or as many as given.

    What the tiles, which come in large steps, leave over goes to the columns, unless they were given.
    """
    least = max(32, 3 * length // 32) if columns is None else columns

    def visits(tiles: int, columns: int) -> float:
        return plan_density(length, bands=near_bands(tiles), columns=columns)

    tiles = max(1, _largest(lambda n: visits(n, least), num_key_tiles(length), density))
    if columns is None:
        least = max(4, _largest(lambda n: visits(tiles, n), 2 * least, density))
    return VerticalSlash(columns=least, tiles=tiles, probes="spread")


def per_tile_for(length: int, density: float) -> SharedDensity:
    """For short prompts: the keys most worth a visit, at one threshold a layer, by a probe in every row of up to 2,048
    tokens, in every second of up to 4,096, and so on up to every eighth. No prompt exceeds the density."""
    every = 1
    while every < 8 and every * 2048 < length:
        every *= 2
    return SharedDensity(density, every)


def question_for(length: int, density: float) -> SharedDensity:
    """For long prompts that end in a question: a tenth of the keys by what its rows attend to, and for the rest one
    threshold a layer, by a probe in every row of less than 4,096 tokens, in every second of less than 8,192, and so on
    up to every sixteenth. No prompt of nearly this length exceeds the density, if that is well above a tenth."""
    every = 1
    while every < 16 and every * 4096 <= length:
        every *= 2
    return SharedDensity(density, every, question=length // 10)


def _window(length: int, density: float, sink: int, question: int = 0, random: int = 0) -> int:
    """The window, in whole tiles, that a density leaves beside sinks, question rows and random tiles."""

    def visits(tiles: int) -> float:
        return plan_density(length, bands=near_bands(tiles), sink=sink, blocks=random, question=question)

    return KEY_TILE * _largest(visits, num_key_tiles(length), density) + 1


def _sink(length: int) -> int:
    # StreamingLLM's share of sinks in MInference's comparison is a fifth; that many leave no window for short prompts.
    return min(64, length // 32)


def _a_shape(model: Llama, length: int, density: float) -> Patterns:
    return AShape(sink=_sink(length), window=_window(length, density, _sink(length)))


def _vertical_only(model: Llama, length: int, density: float) -> Patterns:
    columns = _largest(lambda n: plan_density(length, bands=near_bands(1), columns=n), length, density)
    return VerticalSlash(columns=max(columns, 4), tiles=1, probes="spread")


def _block_sparse(model: Llama, length: int, density: float) -> Patterns:
    return BlockSparse(2 + _largest(lambda n: plan_density(length, blocks=n), num_key_tiles(length), density))


def _dilated(near_share: float) -> Chooser:
    def choose(model: Llama, length: int, density: float) -> Patterns:
        sink = _sink(length)

        def pattern(tiles: int) -> Dilated:
            near = round(near_share * tiles) * KEY_TILE
            return Dilated(sink=sink, near=near, far=tiles * KEY_TILE - near, stride=2)

        def visits(tiles: int) -> float:
            return plan_density(length, bands=pattern(tiles).bands(), sink=sink)

        return pattern(max(2, _largest(visits, num_key_tiles(length), density)))

    return choose


def _longformer(model: Llama, length: int, density: float) -> Patterns:
    sink = _sink(length)
    return Longformer(window=_window(length, density, sink, question=64), sink=sink)


def _big_bird(model: Llama, length: int, density: float) -> Patterns:
    # A quarter of the tiles of a query tile, about, are random ones.
    sink, random = _sink(length), max(1, round(density * num_key_tiles(length) / 8))
    return BigBird(window=_window(length, density, sink, question=64, random=random), sink=sink, random=random)


def static_from(tokens: Sequence[int]) -> Chooser:
    """The index of minference's pattern on the first tokens of another prompt, for every prompt of that length."""

    def choose(model: Llama, length: int, density: float) -> Patterns:
        if len(tokens) < length:
            raise ValueError(f"static: its prompt has {len(tokens)} tokens, fewer than {length}")
        return StaticPlan.of_prompt(model, jnp.asarray([tokens[:length]]), vertical_slash_for(length, density))

    return choose


METHODS: dict[str, Chooser] = {
    "dense": lambda model, length, density: None,
    "minference": lambda model, length, density: vertical_slash_for(length, density),
    "minference-per-tile": lambda model, length, density: per_tile_for(length, density),
    "minference-question": lambda model, length, density: question_for(length, density),
    "a-shape": _a_shape,
    "vertical-only": _vertical_only,
    "slash-only": lambda model, length, density: vertical_slash_for(length, density, columns=4),
    "block-sparse": _block_sparse,
    "dilated": _dilated(0.0),
    "strided": _dilated(1 / 3),
    "longformer": _longformer,
    "bigbird": _big_bird,
    "oracle": lambda model, length, density: TopKOracle(density),
}
"""Methods by name. `static` needs a prompt, see `static_from`."""

ESTIMATED = ("minference", "minference-per-tile", "vertical-only", "slash-only", "block-sparse")
"""Those of `METHODS` whose budgets only estimate what they visit, or that are the same in layers that differ:
`Method.measured` brings them to the density. (minference-question was measured with the same density in all layers.)"""

BUILT = ("dilated", "strided", "longformer", "bigbird", "oracle", "static")
"""Those that are plan builders, which see all heads of a layer: not for a mesh that divides heads."""

ABOUT: dict[str, str] = {
    "dense": "every earlier key",
    "minference": "columns and near tiles by the last rows' attention",
    "minference-per-tile": "tiles by probe rows, one threshold a layer",
    "minference-question": "the same, with a tenth of the keys by what the question attends to",
    "a-shape": "the first keys and a window (StreamingLLM)",
    "vertical-only": "columns alone",
    "slash-only": "near tiles alone",
    "block-sparse": "tiles by mean-pooled queries and keys",
    "dilated": "every second tile of a window",
    "strided": "a window, and every second tile of a longer one",
    "longformer": "a window, the first keys, and a question that sees everything",
    "bigbird": "the same, and random tiles",
    "oracle": "the keys that dense attention likes best, row by row",
    "static": "minference's choice on another prompt",
}
"""What each method visits, in a few words."""
