"""A comparison as something to read."""

from typing import TYPE_CHECKING

from minference_jax.compare.comparison import Comparison, LayerDifference
from minference_jax.extras import naming_extra

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["comparison_table", "figure_rows", "name_of_ours"]


def _some(layers: tuple[LayerDifference, ...], count: int = 12) -> list[LayerDifference]:
    """At most `count` layers, evenly spread, and the worst one (relative to its scale)."""
    if len(layers) <= count:
        return list(layers)
    indices = {round(i * (len(layers) - 1) / (count - 1)) for i in range(count)}
    indices.add(max(range(len(layers)), key=lambda i: layers[i].rms / (layers[i].scale or 1)))
    return [layers[i] for i in sorted(indices)]


def name_of_ours(comparison: Comparison) -> str:
    """JAX, and its patterns."""
    return f"JAX, {comparison.patterns}" if comparison.patterns else "JAX"


def figure_rows(comparison: Comparison) -> list[list[str]]:
    """Name, value and bound of each figure of logits and tokens."""
    c, bounds = comparison, comparison.tolerance
    rows: list[list[str]] = []

    def add(name: str, value: str, bound: str = "") -> None:
        rows.append([name, value, bound])

    add("max |logit difference|", f"{c.logit_max:.2e}", "" if bounds.logit_max is None else f"≤ {bounds.logit_max:.0e}")
    add("RMS logit difference", f"{c.logit_rms:.2e}")
    add("RMS of PyTorch's logits", f"{c.logit_scale:.3g}")
    add("mean KL divergence (nats)", f"{c.kl:.2e}")
    same = "" if bounds.argmax is None else f"≥ {bounds.argmax:.1%}"
    add("same most likely token", f"{c.argmax_agreement:.3%}", same)
    if c.argmax_agreement < 1:
        add("largest margin where not", f"{c.largest_lost_margin:.2e}")
    if c.greedy_torch:
        length = len(c.greedy_torch[0])
        agree = f"{c.greedy_agreement * length:.0f} of {length} tokens"
        add("greedy continuation agrees for", agree, "all" if bounds.greedy else "")
    add("perplexity, PyTorch", f"{c.perplexity_torch:.4f}")
    perplexity = "" if bounds.perplexity is None else f"within {bounds.perplexity:.2%}"
    add(f"perplexity, {name_of_ours(c)}", f"{c.perplexity_ours:.4f}", perplexity)
    return rows


def comparison_table(comparison: Comparison) -> "Group":
    """A rich renderable: what was compared, hidden states by layer, and the figures with their bounds."""
    with naming_extra("a table"):
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

    c = comparison
    ours = name_of_ours(c)

    layers = Table(title="Hidden states", box=box.SIMPLE_HEAD)
    for column in ("after", "max |difference|", "RMS difference", "RMS of PyTorch's"):
        layers.add_column(column, justify="left" if column == "after" else "right")
    for layer in _some(c.layers):
        layers.add_row(layer.name, f"{layer.max:.2e}", f"{layer.rms:.2e}", f"{layer.scale:.3g}")

    figures = Table(title="Logits and tokens", box=box.SIMPLE_HEAD)
    for column in ("figure", "value", "bound"):
        figures.add_column(column, justify="left" if column == "figure" else "right")

    for row in figure_rows(c):
        figures.add_row(*row)

    times = Table(title="Seconds", box=box.SIMPLE_HEAD)
    steps = [step for step in ("load", "compile", "prefill", "decode") if step in c.seconds_ours | c.seconds_torch]
    times.add_column("")
    for step in steps:
        times.add_column(step, justify="right")
    for name, seconds in (("PyTorch", c.seconds_torch), (ours, c.seconds_ours)):
        times.add_row(name, *(f"{seconds[step]:.2f}" if step in seconds else "" for step in steps))

    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    head = f"{c.model}, {c.dtype}, {c.tokens} tokens, layers and logits at {c.positions} positions\n{versions}"
    if c.within_tolerance:
        verdict = Text("Within tolerance.", style="green")
    else:
        verdict = Text("\n".join(["Outside tolerance:", *c.failures]), style="red")
    return Group(Text(head), layers, figures, times, verdict)
