"""Fewer evaluations of one sample: at some steps its velocity is forecast from the last evaluations, and the error is measured.

What is forecast is not the velocity v but the end point x + (1 - t) v, at which the sample would arrive if v stayed the same: the
end point changes less. The forecast is a polynomial in t through the end points of the last two or three evaluations (order 1 or
2). Its error grows as c (t - t_0) (t - t_1) ..., where t_i are the times of these evaluations. The next evaluation tells what the
forecast for its time would have been wrong by. That costs no evaluation, and it is used for three things: to correct the state
for the errors of the gap that has just ended, to measure c, and to choose the order and the length of the next gap by it.

The gap's rule: the next g steps are forecast, where g is the largest number, up to MOST_SKIPPED, for which the mean of the
estimated errors over these steps and the evaluation behind them is at most the tolerance. An error is relative to the norm of
the velocity. It weighs the tokens that are most wrong (an 8-norm over the tokens), because a single token near a decision can go
to another place than it would have gone; and it counts 1 / sqrt(1 - t) times, because the steps that are left near the end repair
less. docs/sampler.md has what each of these choices gains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ORDERS = (1, 2)
MOST_SKIPPED = 6
EARLY = 4  # so many first steps are always evaluated, and the last one too
_LEAST_DECAY = 0.5  # a measured c never falls faster than by half, because a forecast may be right by chance
_LATE = 0.5  # the power of 1 / (1 - t)
_TOKEN_NORM = 8


def off_reason(schedule: str, sigmas: np.ndarray) -> str | None:
    """Why no step of a schedule can be forecast, None if some can be."""
    if schedule != "flow_match":
        return f"the steps of the schedule {schedule} are too far apart to be forecast"
    if _last_step(sigmas) <= EARLY:
        return f"the first {EARLY} steps and the last one are always evaluated, so {len(sigmas) - 1} steps are too few"
    return None


class Forecast:
    """One sample of a request: which of its steps are evaluated, and its state at every step.

    tolerance: the bound on a gap's mean estimated error. States and velocities are [L, 64] float32.
    """

    def __init__(self, sigmas: np.ndarray, tolerance: float) -> None:
        self._times = [float(time) for time in sigmas]
        self._last = _last_step(sigmas)
        self._tolerance = tolerance
        self._known: list[tuple[float, np.ndarray]] = []  # the times and the end points of the last evaluations
        self._bends: dict[int, float] = {}  # order -> c of its forecasts, relative to the velocity
        self._order = ORDERS[0]  # of the present gap
        self._previous = -1  # the step of the last evaluation
        self._errors = 0.0
        self._state: np.ndarray  # at the last evaluation, corrected
        self.next = 0  # the next step to evaluate
        self.evaluations = 0

    @property
    def error(self) -> float:
        """The mean over all steps of the relative error of the velocities, as measured before the states were corrected."""
        return self._errors / (self._last + 1)

    def receive(self, state: np.ndarray, velocity: np.ndarray) -> None:
        """Takes the state at the step `next` and its velocity, corrects the state, and decides which step is the next."""
        step = self.next
        end_point = state + np.float32(1 - self._times[step]) * velocity
        errors = {order: end_point - self._end_point(order, step) for order in ORDERS if len(self._known) > order}
        self._measure(errors, step, scale=_norm(velocity))
        if shares := self._shares(step):
            state = state + np.float32(self._missing(shares)) * errors[self._order]
        self._state = state
        self._known = [*self._known[-max(ORDERS) :], (self._times[step], end_point)]
        self._previous = step
        self.evaluations += 1
        gap, self._order = max((self._gap(step + 1, order), order) for order in ORDERS)
        self.next = step + 1 + gap

    def state(self, step: int) -> np.ndarray:
        """The state at a step after the last evaluation, up to `next`.

        Each Euler step moves the state towards an end point that is a sum of known end points. So the state after any number of
        them is a sum of the state at the last evaluation and of these end points, and only its weights need the steps in between.
        """
        own, weights = 1.0, [0.0] * len(self._nodes(self._order))
        for before in range(self._previous, step):
            pace = self._pace(before)
            own *= 1 - pace
            forecast = self._weights(self._order, before)
            weights = [(1 - pace) * weight + pace * new for weight, new in zip(weights, forecast, strict=True)]
        return np.float32(own) * self._state + self._sum(weights)

    def _pace(self, step: int) -> float:
        """The share of the way to the end point that a step goes."""
        return (self._times[step + 1] - self._times[step]) / (1 - self._times[step])

    def _nodes(self, order: int) -> list[float]:
        return [time for time, _ in self._known[-order - 1 :]]

    def _weights(self, order: int, step: int) -> list[float]:
        """The weights of the known end points in the polynomial through them, at the time of a step (Lagrange's form)."""
        nodes, now = self._nodes(order), self._times[step]
        others = [nodes[:index] + nodes[index + 1 :] for index in range(len(nodes))]
        return [_product(now, rest) / _product(node, rest) for node, rest in zip(nodes, others, strict=True)]

    def _sum(self, weights: Sequence[float]) -> np.ndarray:
        """The weighted sum of the last end points, as many as there are weights."""
        terms = [
            np.float32(weight) * end_point for weight, (_, end_point) in zip(weights, self._known[-len(weights) :], strict=True)
        ]
        return sum(terms[1:], start=terms[0])

    def _end_point(self, order: int, step: int) -> np.ndarray:
        return self._sum(self._weights(order, step))

    def _measure(self, errors: dict[int, np.ndarray], step: int, *, scale: float) -> None:
        """Updates c of each order, and the errors so far by those of the gap that ends here."""
        for order, error in errors.items():
            relative = _ratio(_token_norm(error) / (1 - self._times[step]), scale)
            if order == self._order:
                self._errors += relative * sum(self._shares(step))
            bend = relative / _product(self._times[step], self._nodes(order))
            self._bends[order] = max(bend, _LEAST_DECAY * self._bends.get(order, 0.0))

    def _shares(self, step: int) -> list[float]:
        """The errors at the forecast steps before this evaluation, as shares of the error that is measured here."""
        nodes = self._nodes(self._order)
        here = _product(self._times[step], nodes)
        return [_product(self._times[skipped], nodes) / here for skipped in range(self._previous + 1, step)]

    def _missing(self, shares: Sequence[float]) -> float:
        """What the state lacks after the gap, as a multiple of the measured error: the gap's errors, summed as Euler's steps do."""
        missing = 0.0
        for skipped, share in enumerate(shares, start=self._previous + 1):
            pace = self._pace(skipped)
            missing = (1 - pace) * missing + pace * share
        return missing

    def _gap(self, first: int, order: int) -> int:
        """How many steps from `first` on can be forecast."""
        if first < EARLY or order not in self._bends:
            return 0
        gap, errors, nodes = 0, 0.0, self._nodes(order)
        while gap < MOST_SKIPPED and first + gap < self._last:
            now = self._times[first + gap]
            errors += self._bends[order] * _product(now, nodes) / (1 - now) ** _LATE
            if not errors / (gap + 2) <= self._tolerance:
                break
            gap += 1
        return gap


def _last_step(sigmas: np.ndarray) -> int:
    """The last step whose size is not zero."""
    return int(np.flatnonzero(np.diff(sigmas))[-1])


def _product(time: float, nodes: Sequence[float]) -> float:
    """The product of (time - node) over all nodes, of which there are at most three."""
    product = 1.0
    for node in nodes:
        product *= time - node
    return product


def _norm(array: np.ndarray) -> float:
    return float(np.sum(_squares(array))) ** 0.5


def _token_norm(array: np.ndarray) -> float:
    """The root mean square if all tokens are equally long, times sqrt(L); longer tokens weigh more."""
    squares = _squares(array)
    return float(np.mean(squares ** (_TOKEN_NORM // 2))) ** (1 / _TOKEN_NORM) * math.sqrt(len(squares))


def _squares(array: np.ndarray) -> np.ndarray:
    """The squared length of each token, [L] float64, without a warning for the lengths of a state that is about to be refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sum(np.square(array), axis=-1, dtype=np.float64)


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale > 0 else 0.0 if value == 0 else math.inf  # inf for NaN too: the next step is evaluated then
