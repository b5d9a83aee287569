"""What a backend asks of the device that a call will run on, and how to trace for a device that is not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

GPUS = {
    "8.0": ("NVIDIA A100-SXM4-80GB", 108),
    "8.6": ("NVIDIA A10", 72),
    "8.9": ("NVIDIA GeForce RTX 4090", 128),
    "9.0": ("NVIDIA H100 80GB HBM3", 132),
    "10.0": ("NVIDIA B200", 148),
    "12.0": ("NVIDIA RTX PRO 6000", 188),
}
"""One GPU of each compute capability that there are kernels for: a name by which JAX knows it, and its
multiprocessors."""

DEFAULT_MULTIPROCESSORS = 132
"""Multiprocessors of an H100 SXM or H200: assumed where no GPU can be asked (ahead-of-time lowering)."""


@dataclasses.dataclass(frozen=True)
class _Target(jax.sharding.AbstractDevice):
    """A device that programs are made for, with what Pallas asks a GPU: which instructions there are."""

    compute_capability: str

    @property
    def core_count(self) -> int | None:
        """Multiprocessors, by the name that devices have for them."""
        return self.num_cores


@contextmanager
def lowering_for(capability: str) -> Iterator[None]:
    """Programs traced and lowered inside are for NVIDIA GPUs of a compute capability, whatever device is here.

        triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
        with lowering_for("8.0"):
            exported = jax.export.export(jax.jit(prefill), platforms=["cuda"], disabled_checks=[triton])(*shapes)

    Some kernels are Triton's. `jax.export` refuses them without that check disabled: another version of JAX may read
    them otherwise, so load what is exported with the version that made it.

    Without it a program is made for the default device: on a machine without a GPU it holds no kernels.

    **Arguments:** `capability`: such as "8.0", one of `GPUS`.

    **Raises:** ValueError for any other.
    """
    if capability not in GPUS:
        raise ValueError(f"capability must be one of {', '.join(GPUS)}; got {capability!r}")
    kind, multiprocessors = GPUS[capability]
    target = _Target(kind, multiprocessors, "gpu", capability)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=target)):
        yield


def target() -> Any:
    """The device that programs are made for: that of `lowering_for`, else the default one."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    return named if isinstance(named, _Target) else jax.devices()[0]


def on_target(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """A mesh for `jax.shard_map`, inside which `target` is what it is outside."""
    device = target()
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    return abstract.update(abstract_device=device) if isinstance(device, _Target) else mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device: what decides whether a kernel can run on it.

    - `platform`: JAX's name, such as "cpu" or "gpu".
    - `capability`: CUDA's compute capability, such as "9.0"; None where there is none.
    - `here`: whether this process has it, or only makes programs for it.

    Tests make one to ask how a call would be served on a device that is not there.
    """

    platform: str
    capability: str | None = None
    here: bool = True

    @staticmethod
    def default() -> Device:
        """The device that programs are made for: that of `lowering_for`, else the default one of this process."""
        device = target()
        if device.platform != "gpu":
            return Device(device.platform)
        return Device("gpu", str(getattr(device, "compute_capability", "unknown")), not isinstance(device, _Target))

    @property
    def version(self) -> tuple[int, ...]:
        """The compute capability as numbers; () where there is none."""
        return tuple(int(part) for part in (self.capability or "").split(".") if part.isdigit())

    def reason_against_fp8(self) -> str | None:
        """Why kernels on the device can't read e4m3 numbers, in words; None if they can, or if there is no GPU.

        Where there is none, kernels are traced only, and for a GPU that can: name another one by `lowering_for`.
        """
        if self.platform != "gpu" or self.version >= (8, 9):
            return None
        return f"8-bit floats need compute capability 8.9 or later; the default device has {self.capability}"

    def reason_against(self, kernel: str, capabilities: Sequence[str] | None = None) -> str | None:
        """Why the device cannot run a kernel, in words; None if it can.

        **Arguments:** `kernel`: its name in a sentence, such as "the Hopper kernel". `capabilities`: the compute
        capabilities that it is made for; None for any GPU.
        """
        if self.platform != "gpu":
            return f"the default device is {self.platform}, not a GPU"
        if capabilities is not None and self.capability not in capabilities:
            wanted = " or ".join(capabilities)
            return f"{kernel} needs compute capability {wanted}; the default device has {self.capability}"
        return None


def multiprocessors() -> int:
    """Multiprocessors of the GPU that programs are made for, or those of an H100 where there is none."""
    return int(getattr(target(), "core_count", DEFAULT_MULTIPROCESSORS))
