"""How many tokens a layer merges away: a number, a share of what is there, or a step toward what shall be left.

A layer asks its `Amount` at every call, so that a share and a step hold for inputs of any size. "Tokens that may merge"
are all but the prefix and the protected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sttm_kernels import partition


@dataclass(frozen=True)
class Share:
    """numerator / denominator of the tokens that may merge, rounded down."""

    numerator: int
    denominator: int

    def __call__(self, tokens: int) -> int:
        return tokens * self.numerator // self.denominator


@dataclass(frozen=True)
class Toward:
    """What leads to `keep` of the tokens that may merge in `layers` steps, this one the first.

    The steps are equal, the first ones greater by one where they must; greater still where the later ones, each of
    which can merge half of its tokens, would not suffice.
    """

    keep: int
    layers: int

    def __call__(self, tokens: int) -> int:
        within_reach = self.keep * 2 ** min(self.layers - 1, 20)
        return max(0, (tokens - self.keep + self.layers - 1) // self.layers, tokens - within_reach)


Amount = int | Share | Toward


def of_tokens(amount: Amount, tokens: int) -> int:
    """How many of so many tokens that may merge an amount is; `match` clamps it."""
    return amount if isinstance(amount, int) else amount(tokens)


def merges(amount: Amount) -> bool:
    return not isinstance(amount, int) or amount > 0


def toward(keep: int, layers: int) -> list[Amount]:
    """For each of so many merging layers, down to `keep` tokens that may merge."""
    return [Toward(keep, layers - done) for done in range(layers)]


@dataclass(frozen=True)
class Tokens:
    """The tokens of an input of known size.

    Attributes:
        count: how many, `prefix` and `protected` included.
        prefix, protected: which never merge.
    """

    count: int
    prefix: int
    protected: tuple[int, ...] = ()

    @property
    def fixed(self) -> int:
        return self.prefix + len(self.protected)

    def after(self, amounts: Sequence[Amount]) -> list[int]:
        """How many are there after each layer."""
        left, count, prefix, protected = [], self.count, self.prefix, self.protected
        for amount in amounts:
            if merges(amount):
                r = of_tokens(amount, count - self.fixed)
                num_dst = partition.num_destinations("alternate", count, prefix, None, (1, 1), protected)
                count -= partition.clamped(r, "alternate", count, prefix, num_dst, None, protected)
                prefix, protected = self.fixed, ()  # merging puts the protected tokens behind the prefix
            left.append(count)
        return left

    def fewest(self, layers: int) -> int:
        """The fewest that so many merging layers can leave, prefix aside."""
        return self.after([Toward(0, 1)] * layers)[-1] - self.prefix if layers else self.count - self.prefix


def described(amount: Amount, planned: tuple[int, int] | None) -> str:
    """For `repr`: `planned` is how many tokens come and go for the input that the model is configured for."""
    if planned is not None:
        return f"r={planned[0] - planned[1]}, tokens={planned[0]} -> {planned[1]}"
    if isinstance(amount, Share):
        return f"r={amount.numerator / amount.denominator:g} of the tokens"
    return f"r={amount}" if isinstance(amount, int) else f"r toward {amount.keep} tokens that may merge"


def nearest(target: float, least: int, most: int, cost: Callable[[int], float]) -> int:
    """The number in [least, most] of cost nearest to `target`; `cost` rises and is asked few times, for it is slow."""
    below, above, steps = (least, cost(least)), (most, cost(most)), 0
    if target <= below[1]:
        return least
    if target >= above[1]:
        return most
    while above[0] - below[0] > 1:
        part = 0.5 if steps % 3 == 2 else (target - below[1]) / (above[1] - below[1])
        at = min(max(round(below[0] + part * (above[0] - below[0])), below[0] + 1), above[0] - 1)
        found, steps = (at, cost(at)), steps + 1
        below, above = (found, above) if found[1] <= target else (below, found)
    return below[0] if target - below[1] <= above[1] - target else above[0]
