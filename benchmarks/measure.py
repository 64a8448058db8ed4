"""Rivals take turns and are compared pair by pair, so that a noisy neighbour slows both."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

WARM_UP = 2  # turns at the start that are not counted


@dataclass(frozen=True)
class Figure:
    """What `ours` and `theirs` came to, turn by turn. `target`: the ratio that ours should stay under; None where there is none."""

    what: str
    unit: str
    name: str
    ours: Sequence[float]
    rival: str
    theirs: Sequence[float]
    target: float | None = None

    @property
    def quartiles(self) -> list[float]:
        """Of the ratios of the pairs: a quarter of them lie below the first, half below the second, three quarters below the third."""
        ratios = [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]
        return statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, ratio, high = self.quartiles
        return {"what": self.what, "unit": self.unit, "ours": self.name, "median": statistics.median(self.ours), "rival": self.rival,
                "rival_median": statistics.median(self.theirs), "ratio": ratio, "ratio_quartiles": [low, high], "turns": len(self.ours),
                "target": self.target}


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def in_turn(turns: int, *rivals: Callable[[], float]) -> list[list[float]]:
    """What each rival returns in each of `turns` turns (A B A B …), after those of the warm-up."""
    rounds = [[rival() for rival in rivals] for _ in range(WARM_UP + turns)]
    return [list(values) for values in zip(*rounds[WARM_UP:], strict=True)]


class TakeTurns:
    """A callback that puts loops written by hand between the steps of a run: after every `block` steps of the run, each rival
    makes as many. A block of ours holds all that a step costs, the records that are written included."""

    def __init__(self, block: int, *rivals: Any):
        self.block, self.rivals = block, rivals  # iterators: one step at each `next`
        self.rounds: list[list[float]] = []
        self.mark = 0.0

    def on_epoch_start(self, epoch: int, state: object) -> None:
        self.mark = time.perf_counter()

    def on_step_end(self, step: int, state: object) -> None:
        if step % self.block == 0:
            ours = time.perf_counter() - self.mark
            theirs = [timed(lambda: sum(1 for _ in islice(rival, self.block))) for rival in self.rivals]  # noqa: B023
            self.rounds.append([seconds / self.block for seconds in (ours, *theirs)])
            self.mark = time.perf_counter()

    def times(self) -> list[list[float]]:
        """Seconds a step, turn by turn: ours, then each rival's."""
        return [list(values) for values in zip(*self.rounds[WARM_UP:], strict=True)]
