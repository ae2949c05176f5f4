"""Measures the speed of training."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    """Speed of the steps since the last reading, and the time left."""

    seconds_per_step: float
    waiting: float  # Share of the time for which the devices waited for data.
    seconds_left: float | None  # None after the first step alone, which compiles.


class StepTimer:
    """Measures steps. Evaluations and checkpoints do not count toward the speed, but toward the time left.

    The first step does not count toward the time left, because it compiles.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.steps = 0  # Taken by this process.
        self._clock, self._last_reading = clock, clock()
        self._waited, self._counted = 0.0, 0  # Since the last reading.
        self._step_seconds, self._step_count = 0.0, 0  # At all readings, without the first step.
        self._other_seconds = 0.0

    def count_step(self, waited: float) -> None:
        """Counts a step for whose batch the devices waited `waited` seconds."""
        self.steps += 1
        self._counted += 1
        self._waited += waited

    def read(self, steps_left: int) -> Timing:
        """Returns the timing of the steps since the last reading."""
        now = self._clock()
        seconds, counted, waited = now - self._last_reading, self._counted, self._waited
        self._last_reading, self._counted, self._waited = now, 0, 0.0
        if self.steps > counted:  # Not the first step.
            self._step_seconds += seconds
            self._step_count += counted
        per_step = seconds / max(counted, 1)
        left = None
        if self._step_count:
            average = self._step_seconds / self._step_count
            left = steps_left * (average + self._other_seconds / self.steps)
        return Timing(per_step, waited / max(seconds, 1e-9), left)

    def count_other_work(self) -> None:
        """Attributes the time since the last reading to evaluations and checkpoints."""
        now = self._clock()
        self._other_seconds += now - self._last_reading
        self._last_reading = now
