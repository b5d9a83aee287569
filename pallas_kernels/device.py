"""What a backend asks of the device that a call will run on, and how to trace for a device that is not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

GPUS = {
    "8.0": ("NVIDIA A100-SXM4-80GB", 108),
    "8.6": ("NVIDIA A10", 72),
    "8.9": ("NVIDIA L40S", 142),
    "9.0": ("NVIDIA H100 80GB HBM3", 132),
    "10.0": ("NVIDIA B200", 148),
    "12.0": ("NVIDIA GeForce RTX 5090", 170),
}
"""One GPU of each compute capability that there are kernels for: its name in JAX, and its multiprocessors."""


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

        with lowering_for("8.0"):
            exported = jax.export.export(jax.jit(prefill), platforms=["cuda"])(*shapes)

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


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device: what decides whether a kernel can run on it.

    - `platform`: JAX's name, such as "cpu" or "gpu".
    - `capability`: CUDA's compute capability, such as "9.0"; None where there is none.

    Tests make one to ask how a call would be served on a device that is not there.
    """

    platform: str
    capability: str | None = None

    @staticmethod
    def default() -> Device:
        """The device that programs are made for: that of `lowering_for`, else the default one of this process."""
        device = target()
        if device.platform != "gpu":
            return Device(device.platform)
        return Device(device.platform, str(getattr(device, "compute_capability", "unknown")))

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
