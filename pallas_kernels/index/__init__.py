"""What an index asks of a GPU: the softmax mass that probe rows give to every key tile, and its plain jnp twin."""
