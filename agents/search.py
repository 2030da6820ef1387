"""Search the kernel's TUNABLES with Optuna: every trial is one ./ratchet.sh experiment.

The search rewrites the constants that TUNABLES names, lets the ratchet judge the edit, and tells the sampler the score.
It never runs kernel.py and never decides: what is kept is the ratchet's business. However a run ends, kernel.py equals
HEAD's; run the same command again to go on where it stopped.
"""

import argparse
import collections
import contextlib
import dataclasses
import math
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from agents import CannotSearchError, InterruptedSearchError
from agents.loop import SAME_WITHIN_STUDY, Repo, Result, Stop, run_ratchet
from agents.tunables import Combination, Tunable, body_hash, present_values, read_tunables, rewrite

CHIPS = ("v5e", "v6e", "v5p", "tpu7x")
# Random trials before TPE models the scores. On synthetic landscapes like these (45 and 360 combinations, a third
# infeasible) 5 finds the best in fewer trials than Optuna's 10; the champion's score is a sixth.
STARTUP_TRIALS = 5

EXAMPLES = """\
examples:
  python -m agents.search                                    20 trials with the ratchet's default chip and mode
  python -m agents.search --chip v6e --mode model --trials 40
  python -m agents.search --only KV_BLOCK_PAGES --sampler grid
  python -m agents.search --trials 60                        go on with the same study up to 60 trials

Needs a committed kernel.py. A study holds one kernel body on one chip and mode; edit the kernel and a new one starts.
exit codes: 0 all trials done or nothing left to try, 2 could not judge, 130 interrupted
"""


# --- the space and the samplers -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Space:
    """All combinations of the searched tunables' values."""

    tunables: tuple[Tunable, ...]

    @property
    def size(self) -> int:
        return math.prod(len(tunable.values) for tunable in self.tunables)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Categorical even where values are ordered: with so few trials this found better values (see nearest)."""
        return {tunable.name: CategoricalDistribution(tunable.values) for tunable in self.tunables}

    def combination(self, params: Mapping[str, Any]) -> Combination | None:
        """The combination of an Optuna trial's parameters; None if the trial stopped before it had all."""
        if any(tunable.name not in params for tunable in self.tunables):
            return None
        return tuple(params[tunable.name] for tunable in self.tunables)

    def params(self, combination: Combination) -> dict[str, str]:
        return {tunable.name: value for tunable, value in zip(self.tunables, combination, strict=True)}

    def text(self, combination: Combination) -> str:
        return " ".join(f"{name}={value}" for name, value in self.params(combination).items())

    def neighbours(self, combination: Combination) -> list[Combination]:
        """The combinations one step up or down in one tunable's list of values."""
        result = []
        for axis, tunable in enumerate(self.tunables):
            place = tunable.values.index(combination[axis])
            for step in (place - 1, place + 1):
                if 0 <= step < len(tunable.values):
                    result.append((*combination[:axis], tunable.values[step], *combination[axis + 1 :]))
        return result

    def nearest(self, start: Combination, tried: set[Combination], rng: random.Random) -> Combination:
        """The untried combination fewest steps from ``start``, ties by lot; at least one must be untried.

        A sampler that proposes a known point again wants to be there: its untried neighbour is the next best thing,
        where drawing again mostly repeats the point. Visits no more than the tried combinations and their neighbours.
        """
        queue, seen = collections.deque([start]), {start}
        while queue[0] in tried:
            steps = [step for step in self.neighbours(queue.popleft()) if step not in seen]
            rng.shuffle(steps)
            queue.extend(steps)
            seen.update(steps)
        return queue[0]

    def grid_point(self, index: int) -> Combination:
        """Combination ``index`` of an order that visits each once and spreads any prefix over the whole grid.

        ``index * stride mod size`` with a stride near the golden section and coprime to the size, so that a search
        that stops early has not only seen one corner; read as mixed-radix digits, one per tunable.
        """
        stride = max(1, round(self.size * (math.sqrt(5) - 1) / 2))
        while math.gcd(stride, self.size) > 1:
            stride += 1
        rest, digits = index * stride % self.size, []
        for tunable in reversed(self.tunables):
            rest, digit = divmod(rest, len(tunable.values))
            digits.append(tunable.values[digit])
        return tuple(reversed(digits))


class UntriedSampler(optuna.samplers.BaseSampler):
    """Proposes with TPE, at random or from the grid, but only combinations that are not in ``tried``.

    The generator is seeded anew for every trial from the seed and the number of combinations tried, so that a search
    that was stopped and resumed proposes what an uninterrupted one does.
    """

    def __init__(self, space: Space, kind: str, seed: int | None) -> None:
        self._space = space
        self._kind = kind
        self._seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self.tried: set[Combination] = set()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._kind == "grid":
            return self._space.params(self._next_of_grid())
        rng = random.Random(f"{self._seed} {len(self.tried)}")
        proposed = self._propose(study, trial, search_space, rng.getrandbits(32))
        return self._space.params(self._space.nearest(proposed, self.tried, rng))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is not a tunable of this study")

    def _next_of_grid(self) -> Combination:
        first = random.Random(self._seed).randrange(self._space.size)
        points = (self._space.grid_point(first + step) for step in range(self._space.size))
        return next(point for point in points if point not in self.tried)

    def _propose(
        self, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution], seed: int
    ) -> Combination:
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
        if self._kind == "tpe":
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed, constant_liar=False)
        params = sampler.sample_relative(study, trial, space)
        return tuple(
            params[name] if name in params else sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in space.items()
        )


# --- the search -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Search:
    """One run of the driver: a study, the repository it works in, and what this run has seen."""

    repo: Repo
    space: Space
    study: optuna.Study
    sampler: UntriedSampler
    stop: Stop
    asked: dict[str, str]  # the chip and mode given on the command line
    trials: int
    champion: Combination = ()
    start: float | None = None
    best: float | None = None
    results: list[Result] = dataclasses.field(default_factory=list)

    def done(self) -> int:
        """Experiments of this study that ended with a verdict."""
        return sum("result" in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def run(self) -> None:
        """Experiment until the study has its trials or no combination is left. Raises what stops it earlier."""
        self._finish_killed()
        self._enter_champion()
        self.start = self.best
        _say(f"start: score={_score(self.start)} {self.space.text(self.champion)}")
        done = self.done()
        if done >= self.trials:
            _say(f"the study has its {self.trials} trials already; go on with a higher --trials")
        for number in range(done + 1, self.trials + 1):
            self.stop.check()
            self._enter_champion()
            if len(self.sampler.tried) >= self.space.size:
                _say(f"all {self.space.size} combinations have been tried: stopping early")
                return
            self._trial(number)

    def _finish_killed(self) -> None:
        """Trials whose driver was killed: failed, to be tried again, unless the verdict was already noted."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if fields := trial.user_attrs.get("result"):
                self._finish(trial.number, Result(fields=fields))
            else:
                self.study.tell(trial.number, state=TrialState.FAIL)

    def _enter_champion(self) -> None:
        """Note what has been tried, the champion included, and let the sampler know the champion's score."""
        kernel = self.repo.committed_kernel()
        if body_hash(kernel, self.space.tunables) != self.study.user_attrs["body"]:
            raise CannotSearchError("kernel.py changed in more than its tunables during the search; start a new one")
        self.champion = present_values(kernel, self.space.tunables)
        scores = self._scores()
        if scores.get(self.champion) is None:
            judged = {key: value for key, value in self.asked.items() if value != "auto"} | self._reported()
            scores[self.champion] = score = self.repo.champion_score(judged)
            if score is not None:
                self._add_known(self.champion, score)
        self.best = scores[self.champion]
        self.sampler.tried = set(scores)

    def _scores(self) -> dict[Combination, float | None]:
        """Every combination that has a verdict, with its score where it has one."""
        scores: dict[Combination, float | None] = {}
        for trial in self.study.get_trials(deepcopy=False):
            combination = self.space.combination(trial.params)
            if combination and (trial.state == TrialState.COMPLETE or "result" in trial.user_attrs):
                scores[combination] = trial.value if trial.value is not None else scores.get(combination)
        return scores

    def _add_known(self, combination: Combination, score: float) -> None:
        params, distributions = self.space.params(combination), self.space.distributions()
        known = optuna.trial.create_trial(
            params=params, distributions=distributions, value=score, user_attrs={"from": "results.tsv"}
        )
        self.study.add_trial(known)

    def _trial(self, number: int) -> None:
        trial = self.study.ask(self.space.distributions())
        told = False
        try:
            combination = self.space.combination(trial.params)
            assert combination is not None
            _say(f"trial {number}/{self.trials}: {self.space.text(combination)} ... ", end="")
            result = self._experiment(combination)
            self._tell(trial, result)
            told = True
            self._report(combination, result)
        finally:
            if not told:
                self.study.tell(trial, state=TrialState.FAIL)

    def _experiment(self, combination: Combination) -> Result:
        """The ratchet's verdict on ``combination``. Raises CannotSearchError or InterruptedSearchError without one."""
        head = self.repo.committed_kernel()
        pairs = zip(self.space.tunables, self.champion, combination, strict=True)
        changes = {tunable.name: (old, new) for tunable, old, new in pairs if old != new}
        note = "search: " + ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
        self.stop.check()  # before the ratchet starts: it is easier to stop than one that is setting up its traps
        options = [word for key, value in self.asked.items() for word in (f"--{key}", value)]
        with self.repo.edited(rewrite(head, {name: new for name, (_, new) in changes.items()})):
            result = run_ratchet(self.repo.root, [*options, note], self.stop)
        if not result.kept:
            self.stop.check()  # a stopped ratchet.sh may end like one that rejects; only a kept commit is beyond doubt
        result.check()
        return result

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        self._check_comparable(result)
        trial.set_user_attr("result", dict(result.fields))
        self._finish(trial.number, result)

    def _finish(self, trial_number: int, result: Result) -> None:
        """Tell the sampler the verdict.

        A score is told whether or not the change was kept: the ratchet also refuses a higher score if one workload
        got worse. A failed candidate is told as PRUNED: TPE ranks pruned trials below every score and so learns to
        avoid the region, while a made-up penalty such as 0 would be a score among true ones. A duplicate without a
        score says nothing about its region: FAIL, which every sampler ignores.
        """
        if result.score is not None:
            self.study.tell(trial_number, result.score)
        else:
            state = TrialState.FAIL if result.status == "DUPLICATE" else TrialState.PRUNED
            self.study.tell(trial_number, state=state)

    def _reported(self) -> dict[str, str]:
        return dict(self.study.user_attrs.get("reported", {}))

    def _check_comparable(self, result: Result) -> None:
        reported = self._reported()
        new = {key: result.fields[key] for key in SAME_WITHIN_STUDY if result.fields.get(key)}
        for key in reported.keys() & new.keys():
            if reported[key] != new[key]:
                raise CannotSearchError(
                    f"this study's scores are for {key} {reported[key]}, ratchet.sh now reports {new[key]}: "
                    "pass --chip and --mode, or a new --study"
                )
        if not new.keys() <= reported.keys():
            self.study.set_user_attr("reported", reported | new)

    def _report(self, combination: Combination, result: Result) -> None:
        self.results.append(result)
        if result.kept:
            self.best, self.champion = result.score, combination
        reason = result.fields.get("reason", "")
        reason = f" ({reason[:120]})" if reason else ""
        _say(f"{result.status} score={_score(result.score)} best={_score(self.best)} {_clock(result.seconds)}{reason}")

    def summary(self) -> str:
        """What this run did and where it ended, for people and grep."""
        kept = sum(result.kept for result in self.results)
        failed = sum(result.status.startswith("FAIL") for result in self.results)
        lines = [
            f"trials: {len(self.results)} run, {kept} kept, {failed} failed; study has {self.done()} of {self.trials}",
            f"score: {_score(self.start)} -> {_score(self.best)}{_gain(self.start, self.best)}",
            f"best: {self.space.text(self.champion)}",
        ]
        scored = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        missed = max(scored, key=lambda trial: trial.value or 0.0, default=None)
        if missed and missed.value and self.best and missed.value > self.best:
            text = self.space.text(self.space.combination(missed.params) or ())
            status = missed.user_attrs.get("result", {}).get("status", "")
            lines.append(f"higher, not kept: score={_score(missed.value)} {status} {text}")
        return "\n".join(lines)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def _gain(start: float | None, best: float | None) -> str:
    return f" ({100 * (best / start - 1):+.1f}%)" if start and best else ""


def _clock(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


# --- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    stop = Stop()
    try:
        with stop.installed():
            return _main(args, stop, shlex.join(["python", "-m", "agents.search", *arguments]))
    except CannotSearchError as error:
        print(f"search: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace, stop: Stop, command: str) -> int:
    repo = Repo(Path.cwd())
    with repo.locked():
        if repo.restore():
            _say("kernel.py held the edit of a search that was killed: restored")
        space = _chosen(repo.committed_kernel(), args.only)
        with _opened(args.storage or f"sqlite:///{repo.state / 'studies.db'}") as storage:
            return _run(_search(args, repo, space, storage, stop), command)


def _run(search: Search, command: str) -> int:
    try:
        search.run()
    except InterruptedSearchError:
        _say(f"{search.summary()}\ninterrupted; to go on with study {search.study.study_name}:\n  {command}")
        return 130
    except CannotSearchError:
        _say(f"\n{search.summary()}")
        raise
    _say(search.summary())
    return 0


def _search(
    args: argparse.Namespace, repo: Repo, space: Space, storage: optuna.storages.RDBStorage, stop: Stop
) -> Search:
    asked = {key: value for key, value in (("chip", args.chip), ("mode", args.mode)) if value}
    sampler = UntriedSampler(space, args.sampler, args.seed)
    body = body_hash(repo.committed_kernel(), space.tunables)
    name = args.study or f"{args.chip or 'default'}-{args.mode or 'auto'}-{body[:12]}"
    study = optuna.create_study(
        storage=storage, sampler=sampler, study_name=name, direction="maximize", load_if_exists=True
    )
    for key, value in (("body", body), ("asked", asked)):
        if study.user_attrs.get(key, value) != value:
            raise CannotSearchError(f"study {name} is for another kernel, chip or mode: choose another --study")
        study.set_user_attr(key, value)
    _say(f"study: {name} in {storage.url}, {args.sampler}, {space.size} combinations")
    return Search(repo=repo, space=space, study=study, sampler=sampler, stop=stop, asked=asked, trials=args.trials)


def _chosen(kernel: bytes, only: str | None) -> Space:
    """The tunables to search. Raises CannotSearchError if kernel.py's are not valid or ``only`` names another."""
    tunables = read_tunables(kernel)
    present_values(kernel, tunables)
    if only is None:
        return Space(tunables)
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in (tunable.name for tunable in tunables):
            known = ", ".join(tunable.name for tunable in tunables)
            raise CannotSearchError(f"--only: {name!r} is not in TUNABLES ({known})")
    return Space(tuple(tunable for tunable in tunables if tunable.name in wanted))


@contextlib.contextmanager
def _opened(url: str) -> Iterator[optuna.storages.RDBStorage]:
    try:
        storage = optuna.storages.RDBStorage(url if "://" in url else f"sqlite:///{Path(url).absolute()}")
    except Exception as error:  # whatever the database's driver raises
        raise CannotSearchError(f"cannot open the storage {url}: {error}") from error
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agents.search",
        description="Search the values that kernel.py's TUNABLES allow, one ./ratchet.sh experiment per trial.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trials", type=_positive, default=20, metavar="N", help="trials in the study, earlier runs' included (20)"
    )
    parser.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help="how to propose (tpe)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the proposals repeatable")
    parser.add_argument("--chip", choices=CHIPS, help="passed to ratchet.sh")
    parser.add_argument("--mode", choices=("auto", "model", "chip"), help="passed to ratchet.sh")
    parser.add_argument("--only", metavar="NAME,NAME", help="search these tunables only")
    parser.add_argument("--study", metavar="NAME", help="study name (from chip, mode and a hash of the kernel's body)")
    parser.add_argument(
        "--storage",
        metavar="URL|FILE",
        help="database URL or SQLite file (.ratchet/search/studies.db in the repository)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
