"""A growing set of positions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from ringflash.parallel.positions.segments import Segments


class Union:
    """A set of positions that others are added to and looked up in, each in time that does not grow with the set's."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, segments: Segments) -> None:
        """Add positions."""
        starts, stops = self._starts, self._stops
        for start, stop in segments:
            first = bisect_left(stops, start)  # the first interval that reaches this one
            last = bisect_right(starts, stop, first)  # one behind the last that it reaches
            if first < last:
                if last == first + 1 and starts[first] <= start and stop <= stops[first]:
                    continue
                start, stop = min(start, starts[first]), max(stop, stops[last - 1])
            starts[first:last], stops[first:last] = (start,), (stop,)

    def intersect(self, segments: Segments) -> Segments:
        """The part of other positions that lies in this set."""
        starts, stops = self._starts, self._stops
        common = []
        for start, stop in segments:
            index = bisect_right(stops, start)
            while index < len(starts) and starts[index] < stop:
                common.append((max(start, starts[index]), min(stop, stops[index])))
                index += 1
        return tuple(common)
