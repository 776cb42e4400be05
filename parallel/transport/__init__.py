"""Ways to move tensors between the ranks of a group while the kernels work."""

from ringflash.parallel.transport.send_recv import Pending, PointToPoint

__all__ = ["Pending", "PointToPoint"]
