"""`sttm-kernels evidence`: trains small video Transformers that merge, and says what that costs in accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sttm_kernels.console import InputError, extra, threads
from sttm_kernels.evidence import contenders, jobs, picture, rows, table, train

HELP = "Train and compare ways of merging tokens on a task that needs motion."


def _count(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


_from_zero, _from_one = partial(_count, least=0), partial(_count, least=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one seed, three contenders, fewer steps: some minutes")
    parser.add_argument("--goals", action="store_true", help="only what the goals are judged on")
    parser.add_argument(
        "--choose", action="store_true", help="settings of ToMe and STTM, on clips that no other row is measured on"
    )
    parser.add_argument("--setting", choices=jobs.SETTINGS, help="only rows of this setting")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these contenders")
    parser.add_argument(
        "--percent", type=_from_zero, metavar="N", help="only rows that cut operations by so many percent"
    )
    parser.add_argument("--seed", type=_from_zero, metavar="N", help="only rows of this seed")
    parser.add_argument("--seeds", type=_from_one, default=3, metavar="N", help="where goals are judged (default: 3)")
    parser.add_argument(
        "--steps",
        type=_from_one,
        metavar="N",
        help=f"of training (default: {train.STEPS}; {jobs.QUICK_STEPS} with --quick)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("sttm-evidence"), metavar="DIR",
        help="for evidence.csv, whose rows are not measured again, and the picture (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="where trained networks are kept (default: models/ in --out)"
    )
    parser.add_argument("--threads", type=_from_one, default=1, metavar="N", help="of PyTorch (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="say which rows are missing, and measure nothing")


def run(arguments: argparse.Namespace) -> int:
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        extra(module, package, "evidence", "evidence")
    for name in arguments.only or ():
        if name not in contenders.ALL:
            raise InputError(f"--only must name contenders of {', '.join(contenders.ALL)}, got {name}")
    path = arguments.out / (rows.CHOOSING if arguments.choose else rows.FILE)
    found, wanted = rows.read(path), list(_wanted(arguments))
    missing = [key for key in wanted if key not in found]
    if not wanted:
        raise InputError("no rows are of such a setting, contender, percent and seed")
    if arguments.list:
        for key in missing:
            print(" ".join(map(str, key)))
        print(f"{len(missing)} of {len(wanted)} rows are missing")
        return 0
    print(f"{len(wanted)} rows, {len(missing)} of them to be measured")
    try:
        with threads(arguments.threads):
            _measure(missing, path, arguments.models or arguments.out / "models", arguments.choose)
    except OSError as error:
        raise InputError(f"--out {arguments.out}: {error}") from None

    found, steps = rows.read(path), wanted[0].steps
    print()
    for line in table.lines({key: found[key] for key in wanted}):
        print(line)
    if arguments.quick and steps == jobs.QUICK_STEPS:
        for line in table.beside_expected(found):
            print(line)
        print()
    if arguments.choose:
        return 0
    print(f"goals, trained from scratch at -{jobs.GOAL} % for {steps} steps")
    for line in table.verdicts(found, steps):
        print(line)
    drawn = arguments.out / "evidence.png"
    picture.draw(found, drawn, steps)
    print(f"\n{'rows':<10}{path}\n{'picture':<10}{drawn}")
    return 0


def _wanted(arguments: argparse.Namespace) -> Iterator[rows.Key]:
    seeds = max(arguments.seeds, (arguments.seed or 0) + 1)
    if arguments.quick:
        keys = jobs.quick(arguments.steps or jobs.QUICK_STEPS)
    elif arguments.goals:
        keys = jobs.goals(seeds, arguments.steps or train.STEPS)
    elif arguments.choose:
        keys = jobs.choices(arguments.steps or train.STEPS)
    else:
        keys = jobs.table(seeds, arguments.steps or train.STEPS)
    for key in keys:
        if (
            arguments.setting in (None, key.setting)
            and (not arguments.only or key.contender in arguments.only)
            and arguments.percent in (None, key.percent)
            and arguments.seed in (None, key.seed)
        ):
            yield key


def _measure(missing: Sequence[rows.Key], path: Path, models: Path, choosing: bool) -> None:
    for i, key in enumerate(missing, 1):
        print(f"{i} of {len(missing)}: {key.setting} {key.contender}, {key.percent} %, seed {key.seed}", flush=True)
        split = "choose" if choosing else "report"
        row = jobs.run(key, models, lambda text: print(f"  {text}", flush=True), split)
        rows.append(path, row)
        print(f"  {row['joint']} % right, {row['digit']} % of digits, {row['motion']} % of motions", flush=True)
