"""Meshes of two axes, `rows` and `heads`, and which of them fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from minference_jax.models.config import LlamaConfig

ROWS, HEADS = "rows", "heads"
AXES = (ROWS, HEADS)


def make_mesh(
    rows: int = 1, heads: int | None = None, *, config: LlamaConfig | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `rows` × `heads` devices for `Llama.on` and `Llama.from_pretrained`.

    Outside attention every device holds a slice of a prompt's rows. Inside it the devices along `heads` hold different
    heads, and those along `rows` different query tiles of the same heads.

    **Arguments:**

    - `rows`: devices for each group of heads, by default 1.
    - `heads`: groups of heads, a divisor of the model's KV heads. By default all devices divided by `rows`; with
      `config`, no more than fit that model.
    - `devices`: by default all of all processes, in JAX's order; more than `rows` × `heads` are left out.

    Raises `ValueError` where there are fewer devices, or where the mesh does not fit the `config`.
    """
    found = list(jax.devices() if devices is None else devices)
    if rows < 1 or (heads is not None and heads < 1):
        raise ValueError(f"rows and heads must be at least 1, got rows={rows}, heads={heads}")
    if heads is None:
        heads = max(len(found) // rows, 1)
        if config is not None:
            heads = max(size for size in range(1, heads + 1) if config.num_kv_heads % size == 0)
    if rows * heads > len(found):
        raise ValueError(f"a mesh of rows={rows}, heads={heads} needs {rows * heads} devices; there are {len(found)}")
    mesh = jax.make_mesh((rows, heads), AXES, (AxisType.Auto,) * 2, devices=found[: rows * heads])
    return mesh if config is None else fitted(mesh, config)


def parse_mesh(text: str) -> dict[str, int]:
    """`rows=2,heads=8` or `heads=8` as `make_mesh` takes it. Raises `ValueError` for anything else."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal() or not int(size):
            raise ValueError(f"a mesh is written heads=8 or rows=2,heads=8, got {text!r}")
        sizes[name] = int(size)
    return sizes


def fitted(mesh: Mesh, config: LlamaConfig) -> Mesh:
    """The mesh, its axes in automatic mode: the mode of a caller's own mesh makes no difference here.

    Raises `ValueError` for other axes than `rows` and `heads`, or for heads that they do not divide; it names the
    meshes of as many devices that would do.
    """
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh must have the axes {AXES}, as make_mesh gives it, got {mesh.axis_names}")
    check_heads(mesh, config)
    return Mesh(mesh.devices, AXES, axis_types=(AxisType.Auto,) * 2)


def abstract_mesh(text: str, config: LlamaConfig) -> AbstractMesh:
    """The mesh that `text` means (`parse_mesh`), without devices: for what can be said beforehand."""
    sizes = {ROWS: 1, HEADS: 1} | parse_mesh(text)
    mesh = AbstractMesh((sizes[ROWS], sizes[HEADS]), AXES)
    check_heads(mesh, config)
    return mesh


def check_heads(mesh: Mesh | AbstractMesh, config: LlamaConfig) -> None:
    """Raises `ValueError` where the mesh does not divide the heads, and names those that would."""
    rows, heads = (mesh.shape[name] for name in AXES)
    if config.num_kv_heads % heads:
        fits = [size for size in range(1, mesh.size + 1) if config.num_kv_heads % size == 0 and mesh.size % size == 0]
        others = ", ".join(f"rows={mesh.size // size},heads={size}" for size in reversed(fits))
        raise ValueError(
            f"mesh rows={rows},heads={heads}: {config.num_heads} query and {config.num_kv_heads} KV heads cannot be "
            f"divided by heads={heads}; of {mesh.size} devices these fit: {others}"
        )
