"""The command line: `fuzz` runs a campaign, `replay` judges one case again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import campaign
from .adapters import TARGETS, find
from .campaign import progress, report
from .campaign.asking import load_judge
from .campaign.findings import Stage
from .campaign.shrinker import stage_of
from .campaign.summary import JUDGE, Options
from .campaign.worker import refuse_drift
from .case import MODES, Case
from .case_rules import why_invalid
from .environment import DEVICES, NoDevice, Unusable, choose_device, set_variables
from .shrinking import shrink, symptom_of
from .verdict import ORACLE_FAILED, Outcome, Verdict

ALL_MODES = "all"
AGREES, DIFFERS, UNUSABLE, CANNOT_RUN, INTERNAL, INTERRUPTED = 0, 1, 2, 125, 128, 130

_FUZZ = """Judge the cases that failed before, then cases with all pairs of features, then random ones. What fails is
written down at once and then made as small as it goes."""
_REPLAY = "Judge one case again and say what is wrong, where, and by how much."
_FUZZ_STATUS = """exit status: 0 all cases agree, 1 findings, 2 wrong usage or nothing to run on, 130 interrupted
before anything was found"""
_REPLAY_STATUS = """exit status: 0 agrees, 1 differs, 125 cannot run here (declined, no such device or target, no device
memory, not a case, wrong usage), 128 and above a fault of the oracle itself: what `git bisect run` expects"""


class _Parser(argparse.ArgumentParser):
    """Ends wrong usage with the command's own status for it: `git bisect run` would take a 2 for a difference."""

    usage_status = UNUSABLE

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.usage_status, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # said by the subcommand, whose status it is
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pageproof.oracle", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fuzz = commands.add_parser(
        "fuzz",
        help="judge cases until the time is up",
        description=_FUZZ,
        epilog=_FUZZ_STATUS,
    )
    fuzz.set_defaults(run=_fuzz, parser=fuzz)
    fuzz.add_argument("--seconds", type=positive(float), default=60.0, help="wall clock, start included (60)")
    fuzz.add_argument("--seed", type=natural, default=0, help="the same seed draws the same cases (0)")
    fuzz.add_argument("--cases", type=positive(int), help="stop after so many cases")
    fuzz.add_argument("--workers", type=positive(int), help="processes (one per core; on a GPU 1.5, at most 24)")
    fuzz.add_argument("--json", type=Path, metavar="FILE", help="write the whole summary there")
    fuzz.add_argument(
        "--modes",
        type=modes,
        default=Options.modes,
        metavar="all|MODE,...",
        help=f"execution modes of drawn cases: all that the target offers, or some of {','.join(MODES)} (all)",
    )
    fuzz.add_argument("--nightly", action="store_true", help="cover all triples of features, not only all pairs")
    fuzz.add_argument(
        "--findings", type=Path, default=Path("findings"), metavar="DIR", help="where failing cases go (findings)"
    )
    fuzz.add_argument(
        "--past", type=Path, metavar="DIR", help="where those lie that failed before, judged first (as --findings)"
    )
    fuzz.add_argument(
        "--shrink-seconds",
        type=natural,
        default=60,
        metavar="N",
        help="how much longer, at most, to make findings small (60); 0: leave them as they are",
    )
    replay = commands.add_parser("replay", help="judge one case again", description=_REPLAY, epilog=_REPLAY_STATUS)
    replay.usage_status = CANNOT_RUN
    replay.set_defaults(run=_replay, parser=replay)
    replay.add_argument("case", metavar="CASE.json", help="what fuzz wrote; - for standard input")
    replay.add_argument("--in-process", action="store_true", help="without a process of its own: for debuggers")
    replay.add_argument("--shrink", action="store_true", help="if it fails, print the smallest case that fails alike")
    replay.add_argument("--shrink-seconds", type=positive(int), default=300, metavar="N", help="for --shrink (300)")
    for command in (fuzz, replay):
        command.add_argument("--target", default="ours", metavar="NAME", help=f"{TARGETS} (ours)")
        command.add_argument("--device", choices=DEVICES, help="where to run (a GPU where there is one)")
    return parser


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """For argparse: a number of this kind above zero."""

    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"found {text}, expected more than 0")
        return value

    return number


def natural(text: str) -> int:
    """For argparse: a whole number, zero included."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected at least 0")
    return value


def modes(text: str) -> tuple[str, ...]:
    """For argparse: names of execution modes with commas between them, or "all"."""
    named = MODES if text == ALL_MODES else tuple(text.split(","))
    unknown = [name for name in named if name not in MODES]
    if unknown:
        known = ", ".join(MODES)
        raise argparse.ArgumentTypeError(f"found {', '.join(unknown)!r}, expected {ALL_MODES}, or some of {known}")
    return named


def _fuzz(arguments: argparse.Namespace) -> int:
    names = ("target", "device", "seconds", "seed", "workers", "cases", "findings", "past", "modes", "nightly")
    options = Options(**{name: getattr(arguments, name) for name in (*names, "shrink_seconds")})
    if arguments.json is not None and not arguments.json.parent.is_dir():
        return _stop("fuzz", f"--json: there is no folder {arguments.json.parent}", UNUSABLE)
    if arguments.json is not None and arguments.json.is_dir():
        return _stop("fuzz", f"--json: found the folder {arguments.json}, expected a file", UNUSABLE)
    if arguments.findings.exists() and not arguments.findings.is_dir():
        return _stop("fuzz", f"--findings: found the file {arguments.findings}, expected a folder", UNUSABLE)
    if arguments.past is not None and not arguments.past.is_dir():
        return _stop("fuzz", f"--past: there is no folder {arguments.past}", UNUSABLE)
    try:
        with progress.make() as watch:
            summary = campaign.run(options, watch)
    except Unusable as error:
        return _stop("fuzz", error, UNUSABLE)
    print(f"\n{report.closing(summary)}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(report.to_json(summary))
    if summary.broken:
        return _stop("fuzz", summary.broken, UNUSABLE)
    if len(summary.findings):
        return DIFFERS
    if summary.interrupted:
        return INTERRUPTED
    return AGREES if summary.tally.cases else _stop("fuzz", "no case was judged in this time", UNUSABLE)


def _replay(arguments: argparse.Namespace) -> int:
    try:
        case = _read(arguments.case)
        device = choose_device(arguments.device)
        judge = _judge_here if arguments.in_process else _judge_apart
        verdict, smaller = judge(case, arguments.target, device, arguments.shrink_seconds * arguments.shrink)
    except (Unusable, OSError, ValueError) as error:
        return _stop("replay", error, CANNOT_RUN)
    except KeyboardInterrupt:
        return _stop("replay", "interrupted", INTERRUPTED)
    except Exception:
        traceback.print_exc()
        return INTERNAL
    print(verdict.explain())
    if smaller is not None:
        print(f"\nThe case, {smaller[0].value}:\n{smaller[1].to_json()}", end="")
    if verdict.outcome in (Outcome.DECLINED, Outcome.NOT_JUDGED):
        return CANNOT_RUN
    if verdict.reason.startswith(ORACLE_FAILED):
        return INTERNAL
    return DIFFERS if verdict.failed else AGREES


def _read(name: str) -> Case:
    """The case in a file or on standard input; a ValueError says what is wrong with it."""
    text = sys.stdin.read() if name == "-" else Path(name).read_text()
    try:
        case = Case.from_json(text)
        reason = why_invalid(case)
    except (TypeError, AttributeError) as error:  # a number where there should be a list, and the like
        raise ValueError(f"{name}: {error}") from error
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    return case


Smaller = tuple[Stage, Case] | None  # what shrinking came to, where it was asked for and the case fails


def _judge_apart(case: Case, target: str, device: str, shrink_seconds: float) -> tuple[Verdict, Smaller]:
    """In a process of its own, so that a crash or a hang is a verdict as well."""
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings"
        options = Options(target=target, device=device, given=(case,), findings=findings, shrink_seconds=shrink_seconds)
        summary = campaign.run(options)
        if summary.interrupted:
            raise KeyboardInterrupt
        found = next(iter(summary.findings), None) if shrink_seconds else None
        return summary.verdicts[0], None if found is None else (found.stage, found.failure.case)


def _judge_here(case: Case, target: str, device: str, shrink_seconds: float) -> tuple[Verdict, Smaller]:
    set_variables(device)
    refuse_drift(device)
    try:
        candidate = find(target)
    except Exception as error:
        raise Unusable(f"--target {target}: {type(error).__name__}: {error}") from error
    judge = load_judge(JUDGE)
    try:
        verdict = judge(case, candidate, device)
        if not (verdict.failed and shrink_seconds):
            return verdict, None
        symptom = symptom_of(verdict)
        search = shrink(
            case, lambda trial: symptom_of(judge(trial, candidate, device)) == symptom, seconds=shrink_seconds
        )
    except Exception as error:
        raise RuntimeError(ORACLE_FAILED) from error
    return verdict, (stage_of(search), search.best)


def _stop(command: str, reason: object, status: int) -> int:
    if isinstance(reason, NoDevice):
        reason = f"{reason}; --device cpu goes on without one, through the Triton interpreter"
    print(f"{command}: {reason}", file=sys.stderr)
    return status
