"""What assembles GPU kernels in this installation."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os

import jax

_PACKAGES = ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12")
_LIBRARIES = ("libnvJitLink.so.13", "libnvJitLink.so.12")


def ignores_setmaxnreg() -> bool:
    """Whether the request to move registers between warpgroups does nothing.

    From jax 0.12 on kernels are assembled by nvJitLink where it is found, in relocatable form: it refuses then
    ("ignored to maintain compatibility across compilation units"), and no option of jax or XLA chooses another
    assembler. Earlier versions call ptxas.
    """
    return jax.__version_info__ >= (0, 12) and _has_nvjitlink()


def _has_nvjitlink() -> bool:
    """Installed as a package, or in this process already: CUDA's sparse library brings it, which jax loads early."""
    return any(map(_installed, _PACKAGES)) or any(map(_loaded, _LIBRARIES))


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True
