"""Ways to move tensors between the ranks of a group while the kernels work."""

from ringflash.parallel.transport.point_to_point import Pending, PointToPoint

__all__ = ["Pending", "PointToPoint"]
