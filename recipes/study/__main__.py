"""A study: arms that train alike but for their attention, measured alike.

    python recipes/study prepare STUDY --novels FOLDER     text, once
    python recipes/study run STUDY --minutes 10            train and measure; again to go on
    python recipes/study summary STUDY                     tables and figures of what there is
    python recipes/study publish STUDY NAME ARCHIVE...     the same into benchmarks/results and docs

`--plan learn.yaml` is another study of the same kind, `--smoke` all of it on a CPU in minutes, `--small` a plan at the
scale of a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from arms import Plan, read_plan, saved_plan

from mtraining.errors import SAVED, UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; bad input is one sentence and status 2, a time limit `SAVED`."""
    args = _parser().parse_args(arguments)
    try:
        result: int = args.command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return result


def _asked(args: argparse.Namespace) -> Plan:
    return read_plan(args.plan, args.size, args.set or [])


def _prepare(args: argparse.Namespace) -> int:
    plan = _asked(args)
    if plan.corpus.get("kind") == "associative":
        from associative import make as make_associative

        print(make_associative(args.study, plan.corpus, plan.config["train"]["seq_len"]))
        return 0
    from corpus import make

    print(make(args.study, plan.corpus, plan.config["train"]["seq_len"], args.novels))
    return 0


def _run(args: argparse.Namespace) -> int:
    from archive import note, pack, unpack
    from pieces import GRACE, Runner, pieces_of

    whole = _asked(args)
    unpack(args.before, args.study)
    if not (args.study / "corpus" / "held-out").is_dir():
        raise UserError(f"{args.study} has no corpus; run the command prepare first, with the same --plan.")
    plan = whole.chosen(args.arms.split(",") if args.arms else [], args.seeds)
    plan.check(args.study)
    whole.save(args.study)
    note(args.study)
    found = pieces_of(plan, args.study, not args.train_only, args.arm_seconds, args.tasks_again)

    def keep() -> None:
        if args.results is not None:
            pack(args.study, args.results)

    runner = Runner(
        args.study,
        places(args.gpus, args.processes),
        args.minutes,
        lambda line: print(line, flush=True),
        ended=keep,
        fresh=args.fresh,
        grace=GRACE if args.grace is None else args.grace,
    )
    # A request to stop is passed on: pieces save what they have.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    try:
        complete = runner.run(found)
    finally:
        keep()
        _summary(args)
        keep()
    if not complete:
        print("not everything is done; the same command goes on from here")
    return 0 if complete else SAVED


def _summary(args: argparse.Namespace) -> int:
    from tables import summarise

    print(summarise(args.study, _done(args.study)))
    return 0


def _publish(args: argparse.Namespace) -> int:
    from archive import unpack
    from publish import publish

    unpack(args.archive, args.study)
    for path in publish(args.study, _done(args.study), args.name, Path(__file__).parents[2]):
        print(path)
    return 0


def _done(study: Path) -> Plan:
    """The plan that a study was run with."""
    plan = saved_plan(study)
    if plan is None:
        raise UserError(
            f"{study} has no plan.yaml, so nothing was run there; give the folder that `run` was given."
        )
    return plan


def places(gpus: int | None, processes: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each process that may run at one time; None is the CPU.

    Args:
        gpus: None takes those there are.
        processes: at one time, on each GPU; or in all, where there is none.
    """
    if gpus is None:
        gpus = 0
        if shutil.which("nvidia-smi"):
            import torch

            gpus = torch.cuda.device_count()
    # Those that this command may use are the first of those that it was given.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(gpus)] if given is None else given.split(",")[:gpus]
    if len(names) < gpus:
        raise UserError(
            f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={given} names fewer; name more, or lower --gpus."
        )
    # Every GPU has its first process before any has a second.
    return [name.strip() for _ in range(processes) for name in names] or [None] * processes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("study", type=Path, help="folder of the study")
    common = argparse.ArgumentParser(add_help=False, parents=[folder])
    common.add_argument(
        "--plan", default="extend.yaml", help="extend.yaml, pilot.yaml, learn.yaml or a file of yours"
    )
    sizes = common.add_mutually_exclusive_group()
    only = {"dest": "size", "action": "store_const", "default": ""}
    sizes.add_argument("--smoke", **only, const="smoke", help="every arm, tiny, on a CPU")
    sizes.add_argument("--small", **only, const="small", help="learn.yaml at the scale of a CPU")
    common.add_argument("--set", action="append", metavar="A.B=VALUE", help="such as config.train.steps=8")

    def command(name: str, function: Any, about: str, parent: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[parent], help=about, description=about)
        made.set_defaults(command=function)
        return made

    prepare = command("prepare", _prepare, "write the corpus", common)
    prepare.add_argument("--novels", type=Path, help="folder of .txt files, one a novel")
    run = command("run", _run, "train and measure every arm, or go on", common)
    run.add_argument(
        "--arms", default="", help="such as dense,frozen or dense:1,frozen:0: these, in this order"
    )
    run.add_argument("--seeds", type=int, help="at most so many seeds of each arm")
    run.add_argument("--minutes", type=float, help="stop after so many minutes, with everything saved")
    run.add_argument("--arm-seconds", type=float, default=0.0, help="no arm begins when less time is left")
    run.add_argument("--grace", type=float, help="seconds to save in, after --minutes; default: 60")
    run.add_argument("--gpus", type=int, help="how many to use; default: all")
    run.add_argument("--processes", type=int, default=1, help="at one time, on each GPU or on the CPU")
    run.add_argument("--fresh", action="store_true", help="a new interpreter for each piece, not a fork")
    run.add_argument("--train-only", action="store_true", help="leave out the measurements after training")
    run.add_argument(
        "--tasks-again",
        action="store_true",
        help="train again where weights are gone and tasks alone are missing",
    )
    run.add_argument("--results", type=Path, help="archive of all tables, written anew after each piece")
    run.add_argument(
        "--before", type=Path, action="append", default=[], help="archive of an earlier run, to go on from"
    )
    command("summary", _summary, "tables and figures of what there is", folder)
    publish = command("publish", _publish, "tables and figures into benchmarks/results and docs", folder)
    publish.add_argument("name", help="of this campaign, such as h100-2026-11-27")
    publish.add_argument("archive", type=Path, nargs="*", help="what `run --results` wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
