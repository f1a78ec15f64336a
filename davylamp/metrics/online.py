"""Learning from experts online: exponential weights, fixed share, discounting; their regret bounds; a monitor of drift.

Source: Cesa-Bianchi & Lugosi, "Prediction, Learning, and Games" (2006), sections 2.2-2.3 and 2.11, 5.2; Herbster & Warmuth 1998 (fixed
share); Freund, Schapire, Singer & Warmuth 1997 (experts that abstain); arXiv:2404.05993 uses the family for moderation, its learning rate
and loss are not given there: those here are the specification's.

One round: N experts say p in [0, 1]^N, the forecast is q = sum w p over those that did not abstain, then the label y in {0, 1} comes.
The guarantee that holds for every sequence, however it was made (all terms are kept while it runs):

    sum (loss(q) - loss_i) over the rounds in which i spoke  <=  ln(N) / eta_T  +  sum eta_t c_t^2 / 8

with c_t the weight of the round (1, or 1/propensity), for a loss that is convex in the forecast and in [0, 1]. Proof in two lines: the
mix loss m = -ln(sum w exp(-eta l)) / eta is at least loss(q) - eta c^2 / 8 (Hoeffding), and no weight exceeds 1, so
sum (m - l_i) <= ln(N) / eta; an expert that abstains keeps its weight, and a falling rate only helps (power means).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from davylamp.core.errors import InputError

METHODS = ("hedge", "fixed_share", "discounted")
LOSSES = ("absolute", "squared", "log", "zero_one")
CLIP = 1e-3  # forecasts are kept this far from 0 and 1 under the log loss, which is then divided by -ln(CLIP)

Method = Literal["hedge", "fixed_share", "discounted"]
Loss = Literal["absolute", "squared", "log", "zero_one"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a learner learns. Raises InputError on values outside their ranges.

    method: hedge | fixed_share (after each round, share alpha of the weight is spread evenly) | discounted (losses fade by gamma a round).
    eta: the learning rate (> 0), or None: sqrt(8 ln N / horizon) where a horizon is given, sqrt(8 ln N / t) for hedge without one, 0.5 for
    the other two.  horizon: rounds expected (0: unknown).  alpha: in [0, 1), default 0.01 (expected switches / rounds).
    gamma: in (0, 1].  loss: absolute | squared | log (forecasts clipped) | zero_one (at threshold; its bound is that of a drawn expert).
    threshold: in (0, 1): a forecast above it says unsafe.  most: the largest weight 1/propensity a round may have (>= 1).
    """

    method: Method = "hedge"
    eta: float | None = None
    horizon: int = 0
    alpha: float = 0.01
    gamma: float = 0.99
    loss: Loss = "absolute"
    threshold: float = 0.5
    most: float = 50.0

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.loss not in LOSSES:
            raise InputError(
                f"method must be one of {', '.join(METHODS)} and loss one of {', '.join(LOSSES)}, got {self.method!r}, {self.loss!r}"
            )
        for name, ok, wanted in (
            ("eta", self.eta is None or 0 < self.eta < math.inf, "a number above 0, or none"),
            ("horizon", self.horizon >= 0, "0 (unknown) or more"),
            ("alpha", 0 <= self.alpha < 1, "in [0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("threshold", 0 < self.threshold < 1, "in (0, 1)"),
            ("most", 1 <= self.most < math.inf, "1 or more"),
        ):
            if not ok:
                raise InputError(f"{name} must be {wanted}, got {getattr(self, name)}")


def losses(p: np.ndarray | Sequence[float], y: int, *, loss: str = "absolute", threshold: float = 0.5) -> np.ndarray:
    """The loss in [0, 1] of each forecast p in [0, 1] against the label y; NaN stays NaN.

    >>> losses([0.2, 0.9], 1).round(2).tolist(), losses([0.2, 0.9], 1, loss="squared").round(2).tolist()
    ([0.8, 0.1], [0.64, 0.01])
    """
    x = np.asarray(p, dtype=float)
    if loss == "absolute":
        return np.abs(x - y)
    if loss == "squared":
        return (x - y) ** 2
    if loss == "log":
        right = np.clip(x if y else 1 - x, CLIP, 1 - CLIP)
        return np.clip(np.log(right / (1 - CLIP)) / math.log(CLIP / (1 - CLIP)), 0.0, 1.0)  # 0 at best, 1 at worst
    return np.where(np.isnan(x), np.nan, ((x > threshold) != bool(y)).astype(float))


class Learner:
    """Weights over `n` experts (>= 1), and what is guaranteed of them. Kept as logarithms, so that none is lost to underflow.

    >>> one = Learner(2, Settings(eta=1.0))
    >>> for _ in range(3): one.update([0.9, 0.2], 1)
    >>> one.weights().round(2).tolist(), one.report()["regret"] <= one.report()["bound"]
    ([0.89, 0.11], True)
    """

    def __init__(self, n: int, settings: Settings | None = None):
        if n < 1:
            raise InputError(f"a learner needs one expert or more, got {n}")
        self.n, self.settings = n, settings or Settings()
        self.rounds = 0
        self.gap = 0.0  # sum of eta_t c_t^2 / 8, faded as the losses are
        self.behind = (
            0.0  # head start of the best expert over the worst when the count began, in losses; 0 from equal weights
        )
        self.ahead = np.zeros(n)  # our loss minus each expert's, over the rounds in which it spoke
        self.own = 0.0  # our loss, of the forecast made with the weights of that moment
        self.given = 0.0  # our loss, of the forecasts that were really given (earlier weights, where feedback is late)
        self.total = np.zeros(n)  # the experts' losses
        self.spoke = np.zeros(n)  # weight of the rounds in which each spoke
        self._log = np.zeros(n) - math.log(
            n
        )  # log weights; for a falling rate: minus the relative losses, without the rate

    @property
    def falling(self) -> bool:
        """Whether the learning rate falls with time, because the horizon is unknown."""
        return self.settings.eta is None and not self.settings.horizon and self.settings.method == "hedge"

    def rate(self, rounds: int | None = None) -> float:
        """The learning rate of the next round, or of the round that follows `rounds` others."""
        if self.settings.eta is not None:
            return self.settings.eta
        size = math.log(max(self.n, 2))
        if self.settings.horizon:
            return math.sqrt(8 * size / self.settings.horizon)
        if self.settings.method != "hedge":
            return 0.5
        return math.sqrt(8 * size / ((self.rounds if rounds is None else rounds) + 1))

    def weights(self) -> np.ndarray:
        """(n,) on the simplex."""
        return self._shares(np.ones(self.n, dtype=bool))

    def _shares(self, awake: np.ndarray) -> np.ndarray:
        """(n,) weights over those awake (one or more), the others 0. From logarithms, so that it works however small their weights are."""
        log = np.where(awake, self._log * (self.rate() if self.falling else 1.0), -math.inf)
        raw = np.exp(log - log.max())
        return raw / raw.sum()

    def forecast(self, p: Sequence[float] | np.ndarray) -> float | None:
        """sum w p over the experts that gave a number; None if none did. p: (n,) in [0, 1] or NaN."""
        x = self._checked(p)
        awake = ~np.isnan(x)
        if not awake.any():
            return None
        return float(np.clip(self._shares(awake)[awake] @ x[awake], 0.0, 1.0))

    def update(
        self, p: Sequence[float] | np.ndarray, y: int, *, propensity: float = 1.0, given: float | None = None
    ) -> None:
        """One label y in {0, 1} for forecasts p (n,), NaN = abstained. A round in which all abstained changes nothing.

        propensity: chance in (0, 1] that this item was to be reviewed at all; its loss counts 1/propensity, at most `most`.
        given: the forecast that was really given, where it was made with earlier weights.
        """
        x = self._checked(p)
        if y not in (0, 1):
            raise InputError(f"a label must be 0 or 1, got {y!r}")
        if not 0 < propensity <= 1:
            raise InputError(f"propensity must be in (0, 1], got {propensity}")
        awake = ~np.isnan(x)
        forecast = self.forecast(x)
        if forecast is None:
            return
        s, eta, c = self.settings, self.rate(), min(1 / propensity, self.settings.most)
        each = np.where(awake, c * losses(x, y, loss=s.loss, threshold=s.threshold), 0.0)
        share = self._shares(awake)
        if s.loss == "zero_one":
            own = float(share @ each)  # not convex: the guarantee is for an expert drawn by its weight
        else:
            own = c * float(losses([forecast], y, loss=s.loss)[0])
        late = own if given is None or s.loss == "zero_one" else c * float(losses([given], y, loss=s.loss)[0])
        mixed = self._mix(share, each, eta)  # m of the module's head
        relative = np.where(awake, each - mixed, 0.0)  # an expert that abstains keeps exactly its weight
        fade = s.gamma if s.method == "discounted" else 1.0
        self.gap, self.behind = fade * self.gap + eta * c * c / 8, fade * self.behind
        self.ahead = fade * self.ahead + np.where(awake, own - each, 0.0)
        self.own, self.given, self.total = self.own + own, self.given + late, self.total + each
        self.spoke = self.spoke + np.where(awake, c, 0.0)
        self.rounds += 1
        self._log = self._log - (relative if self.falling else eta * relative)
        if s.method == "discounted":
            self._log = s.gamma * self._log
        if s.method == "fixed_share" and s.alpha:
            self._log = np.log((1 - s.alpha) * self.weights() + s.alpha / self.n)
        self._log = self._log - self._log.max()

    @staticmethod
    def _mix(share: np.ndarray, each: np.ndarray, eta: float) -> float:
        on = share > 0
        z = np.log(share[on]) - eta * each[on]
        return -(float(z.max()) + math.log(float(np.exp(z - z.max()).sum()))) / eta

    def discount(self, factor: float) -> None:
        """Forget part of what was learnt: log weights times `factor` in [0, 1]; 0 makes all weights equal. Counts start anew.

        >>> one = Learner(2, Settings(eta=1.0)); one.update([1.0, 0.0], 1); one.discount(0.0); one.weights().tolist()
        [0.5, 0.5]
        """
        if not 0 <= factor <= 1:
            raise InputError(f"the factor of a discount must be in [0, 1], got {factor}")
        log = factor * (self._log - self._log.max())
        self.__init__(self.n, self.settings)  # type: ignore[misc]
        per = (
            1.0
            if self.falling
            else self.rate() * (self.settings.gamma if self.settings.method == "discounted" else 1.0)
        )
        self._log, self.behind = log, float(-log.min()) / per

    def report(self) -> dict[str, Any]:
        """Regret to the best single expert, its bound, and their ratio; the losses; plain types.

        regret: our loss minus an expert's over the rounds in which it spoke, the largest over experts (discounted: faded alike).
        bound: what it cannot exceed. Both are of the forecasts with the weights of the moment when the label came, and count anew after
        `discount`; `delay_cost` is what was lost because the forecasts really given were others (earlier weights, a reserved share).
        """
        bound = self.bound()
        regret = float(self.ahead.max())
        return {
            "rounds": self.rounds,
            "regret": regret,
            "bound": bound,
            "ratio": regret / bound if bound else None,
            "loss": self.own,
            "delay_cost": self.given - self.own,
            "expert_loss": self.total.tolist(),
            "spoke": self.spoke.tolist(),
            "of": "an expert drawn by its weight" if self.settings.loss == "zero_one" else "the weighted mean",
        }

    def bound(self, switches: int = 0) -> float:
        """What the regret cannot exceed after the rounds so far. switches: of the sequence of experts compared with (fixed share only).

        >>> one = Learner(4, Settings(horizon=100)); [one.update([0, 0, 0, 1], 1) for _ in range(100)][0]
        >>> round(one.bound(), 6), round((100 * math.log(4) / 2) ** 0.5, 6)
        (8.325546, 8.325546)
        """
        if not self.rounds:
            return 0.0
        s, eta = self.settings, self.rate(self.rounds - 1)
        if s.method == "fixed_share":
            n, alpha = self.n, s.alpha
            if switches and not alpha:
                return math.inf
            stay = self.rounds - 1 - switches
            if switches < 0 or stay < 0:
                raise InputError(f"{switches} switches do not fit {self.rounds} rounds")
            cost = math.log(n) - stay * math.log(1 - alpha + alpha / n)  # -ln of the sequence's prior weight
            return (cost + (switches * math.log(n / alpha) if switches else 0.0)) / eta + self.gap + self.behind
        if switches:
            raise InputError("only fixed share has a bound against sequences of experts")
        return math.log(self.n) / eta + self.gap + self.behind

    def json(self) -> dict[str, Any]:
        """All of it in plain types; `Learner.from_json` gives the same learner, bit for bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("ahead", "total", "spoke", "_log")}
        numbers = {name: getattr(self, name) for name in ("n", "rounds", "gap", "behind", "own", "given")}
        return {"settings": asdict(self.settings), **numbers, **arrays}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Learner:
        out = cls(row["n"], Settings(**row["settings"]))
        for name in ("rounds", "gap", "behind", "own", "given"):
            setattr(out, name, row[name])
        for name in ("ahead", "total", "spoke", "_log"):
            setattr(out, name, np.array(row[name], dtype=float))
        return out

    def _checked(self, p: Sequence[float] | np.ndarray) -> np.ndarray:
        x = np.asarray(p, dtype=float)
        if x.shape != (self.n,):
            raise InputError(f"expected {self.n} forecasts, one an expert, got shape {x.shape}")
        if bool((~np.isnan(x) & ~((x >= 0) & (x <= 1))).any()):
            raise InputError(f"a forecast must be in [0, 1] or NaN (abstained), got {x.tolist()}")
        return x


# --- closed forms and brute force ---------------------------------------------------------------------------------------------------------
def hedge_bound(n: int, rounds: int, eta: float | None = None) -> float:
    """ln(n)/eta + eta T/8; with the best eta for a known T: sqrt(T ln(n) / 2) (Cesa-Bianchi & Lugosi 2006, theorem 2.2).

    >>> round(hedge_bound(4, 3000), 1)
    45.6
    """
    if eta is None:
        return math.sqrt(rounds * math.log(n) / 2)
    return math.log(n) / eta + eta * rounds / 8


def anytime_bound(n: int, rounds: int) -> float:
    """2 sqrt(T ln(n) / 2) + sqrt(ln(n) / 8), for eta_t = sqrt(8 ln(n) / t) (the same, theorem 2.3)."""
    return 2 * math.sqrt(rounds * math.log(n) / 2) + math.sqrt(math.log(n) / 8)


def delay_bound(n: int, rounds: int, eta: float, missed: float) -> float:
    """The bound of hedge where labels come late: `missed` is the sum, over items, of the updates an item's forecast did not know of yet.

    One update moves the weights by at most tanh(eta/4) in total variation (all weight on two experts with losses 0 and 1), so a forecast
    that is k updates old loses at most k tanh(eta/4) to a fresh one.
    """
    return hedge_bound(n, rounds, eta) + missed * math.tanh(eta / 4)


def best_sequence(table: np.ndarray, switches: int) -> float:
    """The least total loss of a sequence of experts that changes expert at most `switches` times. table: (rounds, experts) losses.

    >>> best_sequence(np.array([[0., 1], [0, 1], [1, 0]]), 0), best_sequence(np.array([[0., 1], [0, 1], [1, 0]]), 1)
    (1.0, 0.0)
    """
    best = np.full((switches + 1, table.shape[1]), math.inf)
    best[0] = 0.0
    for row in table:
        moved = np.vstack(
            [np.full(table.shape[1], math.inf), np.repeat(best.min(axis=1)[:-1, None], table.shape[1], 1)]
        )
        best = np.minimum(best, moved) + row
    return float(best.min())


class PageHinkley:
    """Says when the mean of a stream in [0, 1] has risen: the cumulated excess over the mean so far, less `slack`, passes `limit`.

    Source: Page 1954. Defaults of ours: on a steady stream of losses (rate up to 0.3) it is silent over 3,000 items in most runs, and a
    rise by 0.2 shows within about 150 items (measured in the tests).

    >>> monitor = PageHinkley()
    >>> any(monitor.add(0.1) for _ in range(1000)), any(monitor.add(0.6) for _ in range(100))
    (False, True)
    """

    def __init__(self, *, slack: float = 0.05, limit: float = 20.0):
        self.slack, self.limit = slack, limit
        self.count, self.mean, self.sum, self.least = 0, 0.0, 0.0, 0.0

    def add(self, value: float) -> bool:
        """Take one value; True if the mean has risen. After an alarm the count starts anew."""
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.sum += value - self.mean - self.slack
        self.least = min(self.least, self.sum)
        if self.sum - self.least > self.limit:
            self.__init__(slack=self.slack, limit=self.limit)  # type: ignore[misc]
            return True
        return False
