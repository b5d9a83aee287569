"""Heads dealt to devices so that attention takes all of them as long.

Searched patterns differ from head to head, and a device that has the dense ones would be waited for. KV groups are
sorted by predicted cost and each is given to the device with the least so far that has room. The weights stay in order:
only q, k and v of a prompt are exchanged in another one, and the results put back.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from minference_jax.models.config import LlamaConfig
from minference_jax.patterns.heads import HeadPatterns
from minference_jax.patterns.rates import rates_of
from pallas_kernels.device import target

GAIN = 0.05
"""By so much the slowest devices' attention must become shorter to be worth an order: a cache, which is in the model's
order, then needs keys and values to be exchanged once more."""


def deal(
    config: LlamaConfig, patterns: HeadPatterns | None, tokens: int, devices: int
) -> Int[np.ndarray, "layers k"] | None:
    """For each layer the KV groups in the order of the devices that attend for them; None where it would not pay.

    `tokens`: of the prompt, for which costs are predicted. Device i takes the i-th share of the groups in that order.
    """
    if devices == 1 or patterns is None or len(patterns.distinct()) == 1:
        return None
    rates = rates_of(target().device_kind)
    cells = {id(pattern): pattern.visited(tokens, tokens, rates) for pattern in patterns.distinct()}
    costs = np.asarray([[cells[id(pattern)] for pattern in layer] for layer in patterns])
    costs = costs.reshape(config.num_layers, config.num_kv_heads, -1).sum(-1)
    order = np.stack([_balanced(layer, devices) for layer in costs])
    if slowest(costs, order, devices) > (1 - GAIN) * slowest(costs, None, devices):
        return None
    return order.astype(np.int32)


def slowest(costs: np.ndarray, order: np.ndarray | None, devices: int) -> float:
    """The sum over layers of the largest cost `[layers, k]` that a device has, in that order."""
    dealt = costs if order is None else np.take_along_axis(costs, order, axis=1)
    return float(dealt.reshape(len(costs), devices, -1).sum(-1).max(-1).sum())


def _balanced(costs: np.ndarray, devices: int) -> np.ndarray:
    room, load = len(costs) // devices, np.zeros(devices)
    groups: list[list[int]] = [[] for _ in range(devices)]
    for group in np.argsort(-costs, kind="stable"):
        device = min((i for i in range(devices) if len(groups[i]) < room), key=lambda i: load[i])
        groups[device].append(int(group))
        load[device] += costs[group]
    return np.concatenate([sorted(own) for own in groups])
