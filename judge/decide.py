"""The only keep-or-discard rule. It fails closed: whatever is missing, not finite or not clearly better is not kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from judge.roofline import Figures

PASS, REGRESSION, DUPLICATE = "PASS", "REGRESSION", "DUPLICATE"
FAILURES = (
    "FAIL_CONTRACT",
    "FAIL_COMPILE",
    "FAIL_CORRECTNESS",
    "FAIL_RACE",
    "FAIL_ROOFLINE",
    "FAIL_TIMEOUT",
    "FAIL_CRASH",
)
STATUSES = (PASS, REGRESSION, DUPLICATE, *FAILURES)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Fractions: the score must rise by more than `min_gain`, no workload's time by more than `max_loss`."""

    min_gain: float
    max_loss: float


# Predictions repeat to the digit, but a schedule that is 0.1 % shorter in the model is not one that is faster.
# Medians of 30 measured calls repeat within about 1 %.
RULES = {"model": Rule(min_gain=0.001, max_loss=0.01), "chip": Rule(min_gain=0.01, max_loss=0.03)}


# What two predictions of one kernel must differ by, as fractions of the time they concern. The model's errors (see
# docs/cycle-model.md: about 1 % where bundles issue, 3 % where copies are waited for) are mostly the same on both sides
# of a comparison; a fifth and a third of them are taken not to be.
ISSUE_RESOLUTION = 0.002
COPY_RESOLUTION = 0.01


def model_resolution(waiting: Iterable[float]) -> float:
    """The fraction of its time that a predicted candidate must gain, on average over its workloads.

    `waiting`: each workload's share of time spent waiting for copies, 0 to 1.
    """
    shares = [min(1.0, max(0.0, share)) for share in waiting]
    return sum(ISSUE_RESOLUTION + (COPY_RESOLUTION - ISSUE_RESOLUTION) * share for share in shares) / max(
        1, len(shares)
    )


@dataclass(frozen=True, kw_only=True)
class Decision:
    status: str
    reason: str


def decide(
    candidate: Figures,
    workload_ms: Mapping[str, float],
    champion: Mapping[str, float] | None,
    *,
    mode: str,
    resolution: float = 0.0,
) -> Decision:
    """PASS or REGRESSION for a correct candidate.

    `workload_ms` and `champion`: each workload's time in milliseconds, the candidate's and the champion's; None where
    there is no champion, which makes the candidate the baseline. The gain compared is that of the score, the squared
    geometric mean of the time ratios, since FLOPs, bytes and peaks are the same on both sides. `resolution`: the
    fraction of time that the measure cannot tell apart (model_resolution).
    """
    if not candidate.finite() or not _are_times(workload_ms):
        return Decision(status="FAIL_CRASH", reason="a figure is not finite")
    if champion is None:
        return Decision(status=PASS, reason="baseline of its lineage")
    if set(workload_ms) != set(champion):
        return Decision(
            status=REGRESSION,
            reason=f"judged on workloads {sorted(workload_ms)}, the champion on {sorted(champion)}: not comparable",
        )
    if not _are_times(champion):
        return Decision(status=REGRESSION, reason=f"the champion's times are {dict(champion)}: not comparable")
    rule = RULES[mode]
    slower = {name: ms / champion[name] - 1 for name, ms in workload_ms.items() if ms > champion[name]}
    worst = max(slower, key=lambda name: slower[name], default="")
    if worst and slower[worst] > rule.max_loss:
        return Decision(
            status=REGRESSION,
            reason=f"{worst} takes {workload_ms[worst]:.6g} ms, {100 * slower[worst]:.1f} % more than the champion's "
            f"{champion[worst]:.6g} ms",
        )
    ratio = 1.0
    for name, ms in workload_ms.items():
        ratio *= (champion[name] / ms) ** (2 / len(workload_ms))
    needed = max(rule.min_gain, (1 - resolution) ** -2 - 1)
    if not ratio > 1 + needed:
        return Decision(
            status=REGRESSION,
            reason=f"the score changes by {100 * (ratio - 1):+.3f} %; a win needs more than {100 * needed:.3g} %",
        )
    return Decision(status=PASS, reason=f"the score rises by {100 * (ratio - 1):.2f} %")


def _are_times(workload_ms: Mapping[str, float]) -> bool:
    return bool(workload_ms) and all(0 < ms < float("inf") for ms in workload_ms.values())
