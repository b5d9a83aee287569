"""What a backend asks of the device that a call will run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax


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
        """The default device of this process."""
        platform = jax.default_backend()
        if platform != "gpu":
            return Device(platform)
        return Device(platform, str(getattr(jax.devices()[0], "compute_capability", "unknown")))

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
