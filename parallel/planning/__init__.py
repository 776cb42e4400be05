"""From a mask and a partition to what one rank does: moves, launches, and the proof that they are right."""
