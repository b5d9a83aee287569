"""Former home of `load_checkpoint`, kept because scripts import it from here; see `minference_jax.checkpoints`."""

from minference_jax.checkpoints.convert import load_checkpoint as load_checkpoint
