"""Running on several processes of this machine, through PyTorch's own elastic launcher.

What is added to it: bad input is told once instead of once a rank; a rank that dies is named together with the last
good checkpoint; the rank that failed first is the one that is blamed; and a signal that asks for a stop goes on to the
ranks, which take the time they need to save.

The launcher refuses what the configuration alone tells. It imports neither transformers nor the training loop, which
would take seconds before the ranks, which import them anyway, could begin.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mtraining.data.loader import end_with_parent
from mtraining.errors import SAVED, RunStopped, UserError
from mtraining.imports import no_garbage
from mtraining.inputs.yaml_text import read_yaml
from mtraining.train.backstop import backstop, mark_done, ranks_of
from mtraining.train.config import Config, parse_config
from mtraining.train.display import quiet_libraries, quiet_tracker
from mtraining.train.early_checks import check_early
from mtraining.train.leaving import exit_now
from mtraining.train.mesh import check_world
from mtraining.train.stop import SIGNALS
from mtraining.train.watch import (
    GRACE_SECONDS,
    PeerLost,
    failed_collective,
    launcher_store,
    reason,
    way_on,
)

if TYPE_CHECKING:
    from mtraining.train.evaluation import SuiteBuilder

T = TypeVar("T")


def launch(
    config: Config,
    nproc: int,
    before: Callable[[], None] | None = None,
    suites: SuiteBuilder | None = None,
    began: float | None = None,
) -> None:
    """Train as `config` says on `nproc` local processes and wait for them.

    Args:
        before: what each process calls first, by name: a function of a module.
        suites: as `train` takes it, by name too.
        began: as `train` takes it; None: now.

    Raises:
        UserError: bad input, found here, or by any rank before it joins the others.
        RunStopped: a rank died or failed, and the others have been ended; or a signal came.
    """
    began = time.time() if began is None else began
    check_world(config.parallel, nproc)
    check_early(config)
    arguments = (config.to_yaml(), before, suites, began)
    stopped = run_processes(_train, arguments, nproc, lambda: way_on(config.output))
    if stopped is not None:
        raise RunStopped(stopped, SAVED)


def run_processes(
    function: Callable[..., T], arguments: tuple[Any, ...], nproc: int, remedy: Callable[[], str]
) -> T:
    """Call `function` on `nproc` local processes, as the ranks of a process group to be made; rank 0's result.

    Args:
        function: of a module, by name; arguments and result can be pickled.
        remedy: what to do after it has ended early, for the end of a sentence.

    Raises:
        UserError, RunStopped: as `launch` raises them.
    """
    quiet_tracker()
    for library in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their reports are made below
    with (
        tempfile.TemporaryDirectory(prefix="mtraining-") as logs,
        _passed_on() as came,
        backstop(remedy, Path(logs)),
    ):
        options = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are passed on
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            result: T = elastic_launch(options, _as_rank)(function, arguments, Path(logs))[0]
            return result
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if came and failure.exitcode == -came[0]:  # it was still loading libraries
                raise _ended(came[0], remedy()) from None
            raise _cause(rank, failure, remedy()) from None
        except SignalException as error:
            raise _ended(error.sigval, remedy()) from None


def run_launched(config: Config, suites: SuiteBuilder | None = None, began: float | None = None) -> None:
    """Train as `config` says as one of the processes of torchrun; see `as_launched` and `train`."""
    with no_garbage():
        from mtraining.train.loop import train

    as_launched(lambda: train(config, suites, began), lambda: way_on(config.output))


def as_launched(function: Callable[[], T], remedy: Callable[[], str]) -> T:
    """Call `function` as one of the processes of torchrun, or of any launcher that sets RANK and its companions; one
    rank tells of bad input, all exit with 2; or of a stop that was asked for, all exit with `SAVED`."""
    handler = get_error_handler()
    quiet_libraries()
    try:
        return function()
    except UserError as error:
        if _first_to_tell():
            print(f"error: {error}", file=sys.stderr)
        exit_now(2)
    except RunStopped as error:
        if error.code == SAVED:
            if os.environ.get("RANK") == "0":
                raise
            raise SystemExit(SAVED) from error
        handler.record_exception(error)
        print(f"error: {error}", file=sys.stderr)
        exit_now(error.code)
    except BaseException as error:  # what a failed checkpoint raises is no Exception
        _after_its_cause(error)
        handler.record_exception(error)
        traceback.print_exc()
        what = f"rank {os.environ.get('RANK')} failed: {reason(str(error))}"
        print(f"error: {what}; {remedy()}", file=sys.stderr)
        exit_now(1)


def _as_rank(function: Callable[..., T], arguments: tuple[Any, ...], folder: Path) -> T:
    """One rank; what goes wrong is recorded for the launcher. A failure leaves at once: a normal exit would wait for a
    save in the background, which may wait for ranks that are gone."""
    handler = get_error_handler()
    handler.initialize()
    quiet_libraries()
    try:
        result = function(*arguments)
    except UserError as error:
        handler.record_exception(error)
        exit_now(2)
    except RunStopped as error:
        handler.record_exception(error)
        exit_now(error.code)
    except BaseException as error:  # what a failed checkpoint raises is no Exception
        _after_its_cause(error)
        handler.record_exception(error)
        exit_now(1)
    mark_done(folder)
    end_with_parent()  # from here on the launcher is waited for, which may have been killed
    atexit.register(exit_now, 0)  # before the interpreter's own end, which may wait for threads of libraries
    return result


def _after_its_cause(error: BaseException) -> None:
    """Wait, where another rank's end may be why a collective failed: a launcher blames the first that it sees ended,
    or the lowest rank of those that end between two of its looks."""
    if failed_collective(error):
        time.sleep(GRACE_SECONDS)


def _train(
    text: str, before: Callable[[], None] | None, suites: SuiteBuilder | None, began: float
) -> str | None:
    """One rank of a training run; what to tell when a signal asked for a stop."""
    with no_garbage():
        from mtraining.train.loop import train

    try:
        if before is not None:
            before()
        train(parse_config(read_yaml(text, "the configuration")), suites, began)
    except RunStopped as error:
        if error.code != SAVED:
            raise
        return str(error)
    return None


@contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Pass the signals that ask for a stop on to the ranks, which then end by themselves; those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ranks = ranks_of(os.getpid())
        if not ranks:
            raise SignalException("there is no rank", signal.Signals(number))
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int, remedy: str) -> RunStopped:
    return RunStopped(f"stopped by {signal.Signals(number).name}; {remedy}", 128 + number)


def _cause(rank: int, failure: ProcessFailure, remedy: str) -> UserError | RunStopped:
    """What to tell of the first rank that failed, from the error file that its `record_exception` wrote."""
    details = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    record = details if isinstance(details, dict) else {}
    kind, _, sentence = str(record.get("message", "")).partition(": ")
    if kind == UserError.__name__:
        return UserError(sentence)
    if kind == RunStopped.__name__:  # a signal came twice, or a process that reads data died
        return RunStopped(sentence, failure.exitcode)
    if kind == PeerLost.__name__:  # a frozen rank, which no launcher notices by itself
        return RunStopped(f"{sentence}, so the other ranks were ended; {remedy}")
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
        if failure.exitcode == -signal.SIGABRT:
            how += " (as NCCL does where a rank is waited for longer than distributed.timeout_seconds)"
    else:
        how = f"failed ({reason(sentence) or f'exit code {failure.exitcode}'})"
        print(record.get("extraInfo", {}).get("py_callstack", ""), file=sys.stderr)
    return RunStopped(f"rank {rank} {how}, so the other ranks were ended; {remedy}")


def _first_to_tell() -> bool:
    """True on the first rank that asks: through the launcher's store, so that no other rank need come along."""
    try:
        store = launcher_store()
        return store.add(f"mtraining/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (KeyError, RuntimeError):
        return os.environ.get("RANK", "0") == "0"
