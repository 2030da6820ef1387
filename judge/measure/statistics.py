"""Small pure functions over samples of seconds."""

import math
import statistics
from collections.abc import Sequence


def median_seconds(samples: Sequence[float]) -> float:
    """Median of positive, finite samples. Raises ValueError for any other."""
    if not samples or not all(math.isfinite(x) and x > 0 for x in samples):
        raise ValueError("a time that is not positive and finite")
    return statistics.median(samples)
