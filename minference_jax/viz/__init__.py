"""Pictures of head patterns and of what a plan leaves out. matplotlib is imported when a picture is made."""

from minference_jax.viz.head import HeadPicture as HeadPicture
from minference_jax.viz.head import head_figure as head_figure
from minference_jax.viz.head import head_picture as head_picture
from minference_jax.viz.head import plot_head as plot_head
from minference_jax.viz.patterns import plot_patterns as plot_patterns
