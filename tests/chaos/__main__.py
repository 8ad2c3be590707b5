"""Run trials of every kind, or a soak, and write its table into `docs/faults.md`.

python -m tests.chaos --trials 10 --seed 0 --write docs/faults.md
python -m tests.chaos --soak 30 --seed 0 --write docs/faults.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos import soak, trials
from tests.chaos.trials import Outcome

TRIALS = ("<!-- table -->", "<!-- end of table -->")
SOAK = ("<!-- soak -->", "<!-- end of soak -->")


def main() -> int:
    """Run the trials or the soak; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10, help="trials of each kind")
    parser.add_argument("--launched", type=int, default=2, help="of the slowest kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the kinds' names")
    parser.add_argument("--write", type=Path, help="document with the table")
    parser.add_argument(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="instead: one process that runs over and over must not grow; less than "
        "5 minutes leave out what starts interpreters",
    )
    arguments = parser.parse_args()
    if arguments.soak is not None:
        return run_soak(arguments)
    return run_trials(arguments)


def run_soak(arguments: argparse.Namespace) -> int:
    """The exit code says whether all ended as they should, and nothing has grown."""
    soak.alone(sys.argv[1:])
    left_out = soak.SLOW if arguments.soak < 5 else []
    kinds = [k for k in soak.KINDS if arguments.only in k and k not in left_out]
    found = soak.soak(arguments.soak, arguments.seed, kinds)
    text = soak.table(found, arguments.seed)
    print(text, *found.grown(), sep="\n")
    if arguments.write:
        write(arguments.write, text, SOAK)
    return int(bool(found.failed or found.grown()))


def run_trials(arguments: argparse.Namespace) -> int:
    """The exit code says whether all passed."""
    found: dict[str, list[Outcome | str]] = {}
    begin = time.monotonic()
    kinds = [kind for kind in trials.KINDS if arguments.only in kind]
    for number in range(arguments.trials):
        for kind in kinds:
            if kind in trials.LAUNCHED and number >= arguments.launched:
                continue
            outcome = attempt(kind, arguments.seed + number)
            found.setdefault(kind, []).append(outcome)
            text = outcome if isinstance(outcome, str) else outcome.text or "passed"
            seconds = time.monotonic() - begin
            print(f"{seconds:6.0f} s  {kind} {number}: {text}", flush=True)
        if arguments.write:  # after each round, as all of them take an hour
            write(arguments.write, table(found), TRIALS)
    return int(any(isinstance(o, str) for outcomes in found.values() for o in outcomes))


def attempt(kind: str, seed: int) -> Outcome | str:
    """The outcome of a trial, or the first line of what failed."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            return trials.run(kind, seed, Path(folder))
        except Exception as error:
            traceback.print_exc()
            lines = f"{type(error).__name__}: {error}".splitlines()
            return f"FAILED, seed {seed}: {lines[0][:80]}"


def table(found: dict[str, list[Outcome | str]]) -> str:
    """Fault, trials, steps lost, time to notice, outcome."""
    rows = [
        "| fault | trials | passed | steps lost, most | seconds to notice (median / "
        "most) |",
        "|---|---|---|---|---|",
    ]
    for kind, outcomes in found.items():
        good = [o for o in outcomes if isinstance(o, Outcome)]
        seconds = [o.noticed for o in good if o.noticed is not None]
        noticed = (
            f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else "–"
        )
        lost = max((o.lost for o in good), default=0)
        rows.append(f"| {kind} | {len(outcomes)} | {len(good)} | {lost} | {noticed} |")
    count = sum(map(len, found.values()))
    passed = sum(isinstance(o, Outcome) for outs in found.values() for o in outs)
    rows.append(f"| **all** | **{count}** | **{passed}** | | |")
    return "\n".join(rows)


def write(path: Path, text: str, marks: tuple[str, str]) -> None:
    """Replace the table between two marks of a document."""
    begin, end = marks
    before = path.read_text() if path.exists() else f"{begin}\n{end}\n"
    head, _, rest = before.partition(begin)
    tail = rest.partition(end)[2]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


if __name__ == "__main__":
    sys.exit(main())
