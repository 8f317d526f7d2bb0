"""A launched run of two ranks in which one rank's save in the background never ends; run by test_launch.py.

Arguments: the configuration, the rank, what befalls it, and a file that the rank makes once its save hangs. "kill": the
test kills it. "raise": its next step fails. "raise base": it fails with an error that is no Exception, as PyTorch's
CheckpointException is none.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from mtraining.errors import RunStopped
from mtraining.train.config import load_config
from mtraining.train.launch import launch
from mtraining.train.step import Stepper


class OnPurpose(BaseException):
    pass


def hang_in_save() -> None:
    _, _, victim, harm, saving = sys.argv
    if os.environ["RANK"] != victim:
        return

    def write_data(*_: Any) -> None:
        Path(saving).touch()
        time.sleep(1000)

    FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    run = Stepper.run

    def run_or_raise(*arguments: Any, **options: Any) -> Any:
        if harm != "kill" and Path(saving).exists():
            raise (ValueError if harm == "raise" else OnPurpose)("on purpose")
        return run(*arguments, **options)

    Stepper.run = run_or_raise  # type: ignore[method-assign]


if __name__ == "__main__":
    try:
        launch(load_config(sys.argv[1]), 2, before=hang_in_save)
    except RunStopped as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
