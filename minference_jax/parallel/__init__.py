"""One model on many devices: meshes, which device holds which slice of a parameter, what devices send each other."""

from minference_jax.parallel.mesh import make_mesh as make_mesh
