"""What an index asks of a GPU: the softmax mass that probe rows give to every key tile, with its plain jnp twin; the
sums of their weights by key and by distance; counts and lists of keys."""
