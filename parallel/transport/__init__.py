"""Ways to move tensors between the ranks of a group while the kernels work."""
