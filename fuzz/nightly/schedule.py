"""Who gets the next slice of a night: half of the time goes to all jobs alike, the rest to those that still gain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kernelfuzz.fuzz.job import Job

FLOOR = 0.5
"""The part of a night that is shared out equally."""

SHORTEST_SECONDS = 20.0
"""A slice beyond the floor pays for loading its kernel if it is this long."""

PARTS = 4
"""How many slices, on the average, a job gets of the other part."""

_FORGETTING = 0.25
"""What a slice counts for after each further one of its job."""

_HOPE = 0.2
"""The gain that a job is good for whatever its last slices brought, the less the more time it has had."""


@dataclass
class _Share:
    """What a job has had.

    - job; running: lanes that run it now; granted: seconds it was given, those of running slices among them
    - gain, seconds: of its slices, the older the less they count
    """

    job: Job
    running: int = 0
    granted: float = 0.0
    gain: float = 0.0
    seconds: float = 0.0

    @property
    def promise(self) -> float:
        """How much gain a second is expected to bring."""
        return self.gain / max(self.seconds, 1.0) + _HOPE / max(self.granted, 1.0)


class Schedule:
    """Shares out `seconds` of wall time, in which so many `lanes` of each device kind run at once.

    First each job gets its floor, an equal part of FLOOR of what its kind's lanes have; then slices go to the jobs that
    promise most, by what their last slices brought for each second. A job is run on two lanes at a time only where
    there is no other one.
    """

    def __init__(self, jobs: Sequence[Job], lanes: Mapping[str, int], seconds: float) -> None:
        self._shares = {str(job): _Share(job) for job in jobs}
        self._lanes = lanes
        self._seconds = seconds

    def next(self, kind: str, remaining: float) -> tuple[Job, float] | None:
        """Return the job that a lane of that kind is to run now, and for how many seconds, of the wall time that
        remains; None where there is no job of that kind, or no time."""
        shares = [share for share in self._shares.values() if share.job.device.type == kind]
        if not shares or remaining <= 0:
            return None
        fewest = min(share.running for share in shares)
        free = [share for share in shares if share.running == fewest]
        lanes = max(1, self._lanes.get(kind, 1))
        floor = FLOOR * lanes * self._seconds / len(shares)
        below = [share for share in free if share.granted < 0.99 * floor]
        if below:
            share = min(below, key=lambda each: each.granted)
            seconds = floor - share.granted
            if lanes > len(shares):  # several lanes run it at the same time
                seconds = min(seconds, FLOOR * self._seconds)
        else:
            share = max(free, key=lambda each: each.promise)
            seconds = max((1 - FLOOR) * lanes * self._seconds / len(shares) / PARTS, SHORTEST_SECONDS)
            if remaining < seconds + SHORTEST_SECONDS:  # what would be left does not pay for another slice
                seconds = remaining
        seconds = min(seconds, remaining)
        share.running += 1
        share.granted += seconds
        return share.job, seconds

    def finished(self, job: Job, granted: float, seconds: float, gain: float) -> None:
        """Take back a slice that was given so many seconds, took so many, and brought so much."""
        share = self._shares.get(str(job))
        if share is None:
            return
        share.running -= 1
        share.granted += seconds - granted
        share.gain = _FORGETTING * share.gain + gain
        share.seconds = _FORGETTING * share.seconds + seconds

    def drop(self, job: Job) -> None:
        """Give a job no further slices."""
        self._shares.pop(str(job), None)
