"""The offline search: which pattern and which budget each head of a model gets."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Int

from minference_jax.models.capture import capture_qkv
from minference_jax.models.checks import check_tokens
from minference_jax.models.llama import Llama
from minference_jax.patterns import HeadPatterns, Pattern
from minference_jax.patterns.files import save_patterns
from minference_jax.runs.files import check_output_file
from minference_jax.runs.identity import content_digest, package_version, weights_digest
from minference_jax.runs.lock import locked
from minference_jax.search.candidates import check_candidates, default_candidates
from minference_jax.search.choose import allocate, best_at_equal_cost
from minference_jax.search.cost import CostKind, CostModel, Target
from minference_jax.search.measure import LayerMeter, LayerRecord
from minference_jax.search.score import ROWS
from minference_jax.search.settings import Settings
from minference_jax.search.state import SearchState

Progress = Callable[[int, int], None]


def search_patterns(
    model: Llama,
    samples: Int[Array, "b t"],
    *,
    lengths: Int[Array, " b"] | None = None,
    target: Target = None,
    candidates: Sequence[Pattern | str] | None = None,
    cost: CostKind = "visited",
    objective: Literal["mean", "worst"] = "mean",
    budgets: Literal["per-head", "equal"] = "per-head",
    query_tiles: int = 16,
    end_tiles: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> HeadPatterns:
    """Finds each head's pattern and budgets for a model, on sample prompts.

    It goes layer by layer, with the queries, keys and values that the layer has in a dense run:

    1. In each head, the budgets of every candidate are scaled until its plan for the samples costs the target.
    2. The head's output under that plan is compared with that of dense attention, at 16 rows of each of `query_tiles`
       query tiles, which are spread evenly over each sample.
    3. The candidate of the least error is the head's pattern; of equals, the cheaper one.

    **Arguments:**

    - `samples`: int32 `[b, t]`, prompts, padded on the right; `lengths`: int32 `[b]`, at least 128 each. They may be of
      very unequal length: each has rows of its own, and counts the same in the error. In the density it counts by its
      cells.
    - `target`: what a layer may cost. A density (visited / causal cells) in (0, 1); an `AShape`, for what that costs; a
      `Latency`, with `cost="measured"`. None: an A-shape of 1,024 sinks and a window of 4,096, both in proportion for
      samples shorter than 32,768 tokens.
    - `candidates`: patterns, or their texts. Only the proportions of their budgets matter, not the size. None: the
      original's, and what each family adds. Of `PerTile` the threshold is what is scaled: give it about the size that
      goes with the original's budgets, 2e-5.
    - `cost`: `"visited"` counts the keys that the kernel visits. `"measured"` times each candidate on this device, in
      the first layer; timings vary, so two such searches may differ.
    - `objective`: the error of a head is its mean over the samples, or that of its worst sample.
    - `budgets`: `"equal"` keeps all heads at the target, as the original does. `"per-head"` also measures every
      candidate at 1/4 to 3 times these budgets, and spends the same total where it lowers the sum of the errors most.
    - `end_tiles`: if not 0, so many query tiles at each sample's end are scored too, and their error counts as much as
      that of the sample. For samples that end in a question.
    - `state`: a file that keeps what is measured, layer by layer. An interrupted search goes on with it and ends with
      the same result. It stays when the search is done.
    - `progress(done, total)`: called at the beginning and after each layer.

    **Returns:** `HeadPatterns` with `scores` (the relative error of each head's output), `densities` and `recalls`.

    **Raises:** ValueError and TypeError for arguments that do not fit, among them a `state` of another search;
    `LockedError` with the process id where another process uses the same `state`.

    Memory: one layer's queries, keys and values, and a bit for each option, head, sample, scored query tile and key;
    nothing of size t × t.

    Source: MInference (arXiv 2407.02490) §3.2, Algorithm 1 and Table 7. Budgets per head are ours.
    """
    tried = default_candidates() if candidates is None else check_candidates(candidates)
    settings = Settings(target, tried, cost, objective, budgets, query_tiles, end_tiles)
    search = Search(model, samples, lengths, settings)
    if state is None:
        return search.run(SearchState(None, search.identity()), progress)
    with locked(state):
        return search.run(SearchState(Path(state), search.identity()), progress)


def search_to_file(
    model: Llama,
    samples: Int[Array, "b t"],
    path: str | Path,
    *,
    lengths: Int[Array, " b"] | None = None,
    settings: Settings | None = None,
    about: dict[str, Any] | None = None,
    restart: bool = False,
    wait: bool = False,
    progress: Progress | None = None,
) -> HeadPatterns:
    """`search_patterns`, written to a pattern file together with what was searched, on what, and when.

    **Arguments:**

    - `model`, `samples`, `lengths`, `progress`: as for `search_patterns`.
    - `path`: the file to write. What is measured is kept beside it, as `path` with the suffix `.partial`, until it is
      written; the same call goes on from there.
    - `settings`: all other arguments of `search_patterns`; by default its defaults.
    - `about`: more to say in the file, such as the model's name.
    - `restart`: forget what was measured before.
    - `wait`: where another process searches for the same file, wait for it instead of raising.

    **Raises:** ValueError before the search where `path` can't be written; `LockedError` with the process id of another
    search for the same file; what `search_patterns` raises.
    """
    path = Path(path)
    check_output_file(path)
    with locked(path, wait=wait):
        return _search_to_file(Search(model, samples, lengths, settings or Settings()), path, about, restart, progress)


def _search_to_file(
    search: Search, path: Path, about: dict[str, Any] | None, restart: bool, progress: Progress | None
) -> HeadPatterns:
    partial = path.with_name(path.name + ".partial")
    if restart:
        partial.unlink(missing_ok=True)
    identity = search.identity()
    state = SearchState(partial, identity)
    patterns = search.run(state, progress)
    assert state.calibration is not None  # every search calibrates
    means = {"output error": patterns.scores, "density": patterns.densities, "recall": patterns.recalls}
    figures = {f"mean {name}": round(float(np.mean(np.asarray(table))), 6) for name, table in means.items()}
    figures["target cost"] = state.calibration[1]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    versions = {"minference-jax": package_version(), "jax": jax.__version__, "platform": jax.default_backend()}
    save_patterns(patterns, path, about={**(about or {}), "date": today, **identity, "versions": versions, **figures})
    state.finish()
    return patterns


class Search:
    """A search's inputs, checked, and the loop over layers."""

    def __init__(self, model: Llama, samples: Array, lengths: Array | None, settings: Settings):
        self.model, self.settings = model, settings
        self.tokens, self.lengths = check_tokens(samples, lengths)
        check_samples(np.asarray(self.lengths).tolist())

    def identity(self) -> dict[str, Any]:
        """What makes this search this one, as JSON: shapes, dtype, config, weights, samples, settings, version."""
        config = self.model.config
        rows = zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        return {
            "shape": {"layers": config.num_layers, "heads": config.num_heads, "kv heads": config.num_kv_heads},
            "dtype": str(self.model.dtype),
            "config sha256": content_digest(config),
            "weights sha256": weights_digest(self.model.params()),
            "samples": [
                {"tokens": int(n), "sha256": hashlib.sha256(row[:n].astype("<i4").tobytes()).hexdigest()}
                for row, n in rows
            ],
            **self.settings.describe(),
            "rows": ROWS * (self.settings.query_tiles + self.settings.end_tiles),
            "version": package_version(),
        }

    def run(self, state: SearchState, progress: Progress | None = None) -> HeadPatterns:
        """Measures the layers that `state` does not have yet, and chooses."""
        layers = self.model.config.num_layers
        meter = LayerMeter(self.settings, self.lengths, self.tokens.shape[1])
        if progress is not None:
            progress(len(state.layers), layers)
        if len(state.layers) < layers:
            for index, qkv in enumerate(capture_qkv(self.model, self.tokens, self.lengths)):
                if state.calibration is None:
                    state.set_calibration(*meter.calibrate(qkv))
                assert state.calibration is not None
                if index not in state.layers:
                    state.add(index, meter.measure(qkv, *state.calibration))
                    if progress is not None:
                        progress(len(state.layers), layers)
                del qkv
        assert state.calibration is not None
        records = [state.layers[index] for index in range(layers)]
        return choose(records, *state.calibration, self.settings, self.tokens.shape[1])


def check_samples(lengths: Sequence[int]) -> None:
    """Raises `ValueError` for samples of these lengths that are too short to be searched on."""
    if min(lengths) < 128:
        raise ValueError(f"samples must have at least 128 tokens each, got {min(lengths)}")


def choose(
    records: Sequence[LayerRecord], model: CostModel, target: float, settings: Settings, tokens: int
) -> HeadPatterns:
    """One pattern for each head, from the measurements of all layers."""
    steps, layers, heads = len(settings.ladder), len(records), records[0].factors.shape[1]
    over_samples = np.mean if settings.objective == "mean" else np.max
    density = np.concatenate([r.density.T for r in records])  # [layers · heads, options]
    error = np.concatenate([over_samples(r.error, axis=1).T for r in records])
    recall = np.concatenate([r.recall.mean(1).T for r in records])
    cost = np.stack([model.of(o // steps, density[:, o]) for o in range(density.shape[1])], axis=1)
    if settings.budgets == "per-head":
        chosen = allocate(cost, error, target * len(cost))
    else:
        chosen = best_at_equal_cost(cost, error, target)
    patterns = []
    for i, option in enumerate(chosen):
        candidate, step = divmod(int(option), steps)
        factor = records[i // heads].factors[candidate, i % heads] * settings.ladder[step]
        patterns.append(settings.candidates[candidate].scaled(float(factor), tokens))

    def table(values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(values[i * heads : (i + 1) * heads]) for i in range(layers))

    rows = np.arange(len(chosen))
    return HeadPatterns(
        table(patterns),
        scores=table(error[rows, chosen].round(6).tolist()),
        densities=table(density[rows, chosen].round(6).tolist()),
        recalls=table(recall[rows, chosen].round(6).tolist()),
    )
