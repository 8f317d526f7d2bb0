"""A study: arms that train alike but for their attention, measured alike.

    python recipes/study prepare STUDY --novels FOLDER     text, once
    python recipes/study run STUDY --minutes 10            train and measure; again to go on
    python recipes/study summary STUDY                     tables and figures of what there is

`--plan learn.yaml` is another study of the same kind, `--smoke` all of it on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from arms import Plan, read_plan

from mtraining.errors import SAVED, UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; bad input is one sentence and status 2, a time limit `SAVED`."""
    args = _parser().parse_args(arguments)
    try:
        plan = read_plan(args.plan, args.smoke, args.set or [])
        result: int = args.command(plan, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return result


def _prepare(plan: Plan, args: argparse.Namespace) -> int:
    if plan.corpus.get("kind") == "associative":
        from associative import make as make_associative

        print(make_associative(args.study, plan.corpus, plan.config["train"]["seq_len"]))
        return 0
    from corpus import make

    print(make(args.study, plan.corpus, plan.config["train"]["seq_len"], args.novels))
    return 0


def _run(plan: Plan, args: argparse.Namespace) -> int:
    from pieces import Runner, pieces_of

    plan = plan.chosen(args.arms.split(",") if args.arms else [], args.seeds)
    if not (args.study / "corpus" / "held-out").is_dir():
        raise UserError(f"{args.study} has no corpus; run the command prepare first, with the same --plan.")
    found = pieces_of(plan, args.study, measured=not args.train_only)
    runner = Runner(
        args.study, places(args.gpus, args.processes), args.minutes, lambda line: print(line, flush=True)
    )
    # A request to stop is passed on: pieces save what they have.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    try:
        complete = runner.run(found)
    finally:
        _summary(plan, args)
    if not complete:
        print("not everything is done; the same command goes on from here")
    return 0 if complete else SAVED


def _summary(plan: Plan, args: argparse.Namespace) -> int:
    from tables import summarise

    print(summarise(args.study, plan))
    return 0


def places(gpus: int | None, processes: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each process that may run at one time; None is the CPU.

    Args:
        gpus: None takes those there are.
        processes: at one time, where there is no GPU.
    """
    if gpus is None:
        gpus = 0
        if shutil.which("nvidia-smi"):
            import torch

            gpus = torch.cuda.device_count()
    return [str(number) for number in range(gpus)] or [None] * processes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("study", type=Path, help="folder of the study")
    common.add_argument("--plan", default="extend.yaml", help="extend.yaml, learn.yaml or a file of yours")
    common.add_argument("--smoke", action="store_true", help="every arm, tiny, on a CPU")
    common.add_argument("--set", action="append", metavar="A.B=VALUE", help="such as config.train.steps=8")

    def command(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[common], help=about, description=about)
        made.set_defaults(command=function)
        return made

    prepare = command("prepare", _prepare, "write the corpus")
    prepare.add_argument("--novels", type=Path, help="folder of .txt files, one a novel")
    run = command("run", _run, "train and measure every arm, or go on")
    run.add_argument("--arms", default="", help="such as dense,recommended: these alone, in this order")
    run.add_argument("--seeds", type=int, help="at most so many seeds of each arm")
    run.add_argument("--minutes", type=float, help="stop after so many minutes, with everything saved")
    run.add_argument("--gpus", type=int, help="how many to use, a process each; default: all")
    run.add_argument("--processes", type=int, default=1, help="at one time, where there is no GPU")
    run.add_argument("--train-only", action="store_true", help="leave out the measurements after training")
    command("summary", _summary, "tables and figures of what there is")
    return parser


if __name__ == "__main__":
    sys.exit(main())
