"""Defines the retrieval methods: which soft selections of images an embedding is made of.

With unit vectors g (query), k_j (key), x (place), x_j (place of image j) and values v_j, a *head* is one weighted
mean of the values (a Nadaraya-Watson estimator, the attention of a transformer):

======================= ============================================================ ===========================
head                    weight of image j, up to a factor                            bandwidth
======================= ============================================================ ===========================
semantic:t              exp(t g.k_j)                                                 fixed
geodesic:t              exp(t x.x_j), a Gaussian of the chord, h = t ** -0.5 radians fixed
nearest:k               exp(-|x - x_j|^2 / (2 h(x)^2)), h(x) the chord to the k-th   adaptive: as dense as the
                        nearest image                                                images are
======================= ============================================================ ===========================

- RANGE is semantic:15; RANGE+ is beta * semantic:12 + (1 - beta) * geodesic:40, mixed.
- multi-head sets its heads *side by side*, as multi-head attention does. Each is over the same rotated principal
  components of the standardised values (`compact.Projection.rotated`), so that a probe weighs what each tells.

Light to import, so that parameters can be checked before any work.

Sources: RANGE (CVPR 2025), arXiv 2502.19781; Terrell and Scott (1992), Variable kernel density estimation, for the
bandwidth by the k-th nearest (their balloon estimator).
"""

import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

Name = Literal["multi-head", "range+", "range", "top1", "topk", "none"]
Kind = Literal["semantic", "geodesic", "nearest"]
NAMES: tuple[Name, ...] = get_args(Name)
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPERATURES = {"range": 15.0, "range+": 12.0}
SOFT = ("multi-head", "range+", "range")
TITLES = {"multi-head": "multi-head RANGE", "range+": "RANGE+", "range": "RANGE"}


@dataclass(frozen=True)
class Head:
    """A soft selection of images."""

    kind: Kind
    """By likeness of the embeddings, or by distance: of a fixed temperature, or reaching the k-th nearest image."""
    at: float
    """The temperature, from 0, the mean of all images, upwards; of `nearest` k, a whole number from 1."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a head of kind {self.kind!r} is unknown: use {', '.join(KINDS)}")
        if self.kind == "nearest" and not (self.at >= 1 and float(self.at).is_integer()):
            raise ValueError(f"nearest:{self.at:g} is no number of an image: use whole numbers from 1")
        if not 0 <= self.at < math.inf:
            raise ValueError(f"temperature {self.at} is not a number from 0 (the mean) upwards (the nearest)")

    def __str__(self) -> str:
        """Returns the head as it is given, such as `geodesic:1000`."""
        return f"{self.kind}:{self.at:g}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a head such as `semantic:12`.

        Raises:
            ValueError: It is none.
        """
        kind, _, number = text.partition(":")
        try:
            at = float(number)
        except ValueError:
            raise ValueError(f"{text!r} is no head: give a kind and a number, such as geodesic:1000") from None
        return cls(kind, at)  # type: ignore[arg-type]  # checked in __post_init__

    @property
    def is_additive(self) -> bool:
        """Tells whether its sums over parts of a database add: not where the bandwidth depends on all images."""
        return self.kind != "nearest"


@dataclass(frozen=True)
class Method:
    """A retrieval method."""

    name: Name = "range+"
    """Soft (`multi-head`, `range`, `range+`), hard (`top1`, `topk`) or no retrieval."""
    beta: float = 0.5
    """Share of the semantic half in RANGE+; 1 is purely semantic."""
    k: int = 10
    """Number of images that `topk` averages."""
    temperature: float | None = None
    """Semantic temperature of RANGE and RANGE+; None: the paper's, 15 and 12."""
    geodesic_temperature: float = 40.0
    """Temperature of the geodesic half of RANGE+."""
    side_by_side: tuple[Head, ...] = ()
    """Heads of `multi-head`."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"retrieval method {self.name!r} is unknown: use one of {', '.join(NAMES)}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta {self.beta} is not between 0 (geodesic) and 1 (semantic)")
        if self.k < 1:
            raise ValueError(f"k {self.k} is not positive: topk averages at least one image")
        for value in (self.semantic, self.geodesic_temperature):
            if not 0 <= value < math.inf:
                raise ValueError(f"temperature {value} is not a number from 0 (the mean) upwards (the nearest)")
        if self.is_side_by_side and not self.side_by_side:
            raise ValueError("multi-head needs heads: give one or more, such as semantic:12 and geodesic:1000")
        if len(set(self.side_by_side)) < len(self.side_by_side):
            raise ValueError(f"heads {', '.join(map(str, self.side_by_side))}: give each once")

    @property
    def semantic(self) -> float:
        """Returns the semantic temperature, given or by default."""
        if self.temperature is None:
            return TEMPERATURES.get(self.name, 15.0)
        return self.temperature

    @property
    def is_side_by_side(self) -> bool:
        """Tells whether the heads are set side by side; else they are mixed."""
        return self.name == "multi-head"

    @property
    def heads(self) -> tuple[Head, ...]:
        """Returns the soft selections that the method is made of.

        Raises:
            ValueError: The method selects no weights.
        """
        if self.name not in SOFT:
            raise ValueError(f"{self.name} selects no weights: only {', '.join(SOFT)} have heads")
        if self.is_side_by_side:
            return self.side_by_side
        halves = (Head("semantic", self.semantic), Head("geodesic", self.geodesic_temperature))
        if self.name == "range+" and self.beta < 1:
            return halves
        return halves[:1]

    @property
    def shares(self) -> tuple[float, ...]:
        """Returns the share of each head in what an embedding rests on; they add to 1."""
        count = len(self.heads)
        if self.is_side_by_side or count == 1:
            return (1 / count,) * count
        return (self.beta, 1 - self.beta)

    @property
    def title(self) -> str:
        """Returns the name in titles and tables."""
        return TITLES.get(self.name, self.name)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Returns the names of the parts of a visual part of heads side by side: kinds, where these tell them apart."""
        kinds = [head.kind for head in self.side_by_side]
        return tuple(head.kind if kinds.count(head.kind) == 1 else str(head) for head in self.side_by_side)

    @property
    def width(self) -> int:
        """Returns how many times the length of a value the visual part has."""
        return len(self.side_by_side) if self.is_side_by_side else 1
