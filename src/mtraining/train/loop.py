"""A whole run, from a checked configuration to an exported model. Read this file first.

`train(config)` is what every rank executes, alone or under a launcher:
check -> process groups -> model -> optimizer -> resume -> (batch -> step -> metrics -> checkpoint -> evaluation)* ->
export.
A signal ends it early: after the step in progress, with a checkpoint (stop.py).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mtraining.data import ReaderDied, SequenceDataset, build_loader, read, step_plan
from mtraining.errors import SAVED, RunStopped, UserError
from mtraining.inputs.text import replace_text
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, export_model, parallelize
from mtraining.model.allocator import shortages
from mtraining.model.float8_checks import check_gpu
from mtraining.model.load import build_weights
from mtraining.model.recompute import LayerPolicy
from mtraining.model.support import head_dim_of
from mtraining.ring import Timeline
from mtraining.train.about import write_about
from mtraining.train.balance import attention_record, ring_lanes, ring_record, write_balance, write_ring
from mtraining.train.checkpoint import Checkpointer
from mtraining.train.checks import check_config, check_same_tiles, check_table, rounding_warning
from mtraining.train.config import Config
from mtraining.train.corpus import data_record, data_tokenizer, mix, rank_dataset
from mtraining.train.display import Display
from mtraining.train.evaluation import Evaluation, SuiteBuilder, build_evaluation, curves, told
from mtraining.train.memory_report import MemoryLog, settle_recompute
from mtraining.train.mesh import Process, joined_processes, limit_waits, repeatable
from mtraining.train.metrics import MetricsWriter
from mtraining.train.optim import build_optimizer, state_sentence
from mtraining.train.policy import flat_options
from mtraining.train.resume import on_main
from mtraining.train.start import StartLog
from mtraining.train.step import Batch, NonFinite, Stepper, StepResult
from mtraining.train.stop import StopRequest, stoppable
from mtraining.train.store import full_disk_told
from mtraining.train.time_report import TimeLog
from mtraining.train.trackers import Tracker, open_trackers
from mtraining.train.watch import watched, way_on


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left its things; `export` is None when `checkpoint.export` is off."""

    run: Path
    checkpoint: Path
    export: Path | None


def train(config: Config, suites: SuiteBuilder | None = None, began: float | None = None) -> RunResult:
    """Run the configuration on this process and its peers. Collective over the launched processes.

    Args:
        suites: makes what `evaluate.suites` names: `mtraining.evaluate.in_training.build_suite`.
        began: when the command was given, in seconds of `time.time`, from which the start is counted; None: now.

    Raises:
        UserError: bad input, before the first step; a loss that is not finite, before the optimizer uses it; a last
            checkpoint that could not be written.
        RunStopped: a signal asked for it, and what was done is saved; or a process that reads data died.
    """
    start = StartLog(began)
    data = check_config(config)
    start.done("checks")
    with (
        stoppable(config.output) as stops,
        joined_processes(config) as process,
        start.counting(process.device),
        repeatable(config.train.deterministic),
        watched(
            config.output,
            process.rank,
            process.world,
            stall_seconds=config.distributed.timeout_seconds / 4,
            silence_seconds=config.distributed.silence_seconds,
        ),
        full_disk_told(config.output),
    ):
        start.done("process groups")
        console = Console(file=sys.stdout) if process.is_main else None
        tell = Display(steps=0, done=0, title="", log_every=1, console=console).tell
        torch.manual_seed(config.train.seed)
        model = parallel_model(config, process, *settle_recompute(config, process, tell))
        start.done("model")
        tiles = check_same_tiles(process, config.train.compute, head_dim_of(model.hf_model.config))
        dataset = rank_dataset(config, data.dataset, process, model.hf_model.config.vocab_size)
        evaluation = build_evaluation(
            config,
            process,
            model,
            data.held,
            [source.shards for source in dataset.sources],
            data.tokenizer,
            suites,
            tell,
        )
        start.done("data")
        optimizer = build_optimizer(model, config.train, process.device)
        start.done("optimizer")
        stops.prepare(process, tell)
        for line in filter(None, [process.allocator, model.float8, state_sentence(config.train, model)]):
            tell(line)
        checkpointer = Checkpointer(
            config, process, model, optimizer, lambda: dataset.identity, tiles, tell=tell
        )
        done = checkpointer.resume()
        start.done("checkpoint")
        rounding = rounding_warning(config, process, model)
        if rounding is not None:
            tell(rounding)
        if process.is_main:
            replace_text(config.output / "config.yaml", config.to_yaml())
        for line in filter(None, [dataset.render(), mix(config, dataset, config.train.steps)]):
            tell(line)
        done = _steps(
            config, process, model, optimizer, dataset, checkpointer, evaluation, done, console, stops, start
        )
        if shares := mix(config, dataset, done):
            tell(shares)
        checkpoint = checkpointer.require_saved(done)
        finished = done == config.train.steps and not (evaluation is not None and evaluation.owed(done))
        finished = finished and not (config.checkpoint.export and stops.agreed(process))
        export = config.output / "export" if finished and config.checkpoint.export else None
        if export is not None:
            stops.at_once("during the export")
            export_model(model, export, tokenizer=data.tokenizer or data_tokenizer(config))
    if not finished:
        raise RunStopped(_stopped(config, done, checkpoint), SAVED)
    return RunResult(config.output, checkpoint, export)


def parallel_model(
    config: Config,
    process: Process,
    recompute: str | Sequence[LayerPolicy] = "full",
    offload: bool = False,
) -> ParallelLM:
    """The model of a configuration, spread over the mesh.

    Args:
        recompute, offload: as `settle_recompute` has them; nothing that is not trained depends on them.
    """
    check_gpu(config.train.float8, process.device)
    hf_model = build_weights(config.model, config.train.seq_len)
    check_table(config, hf_model.config.num_hidden_layers)
    model = parallelize(
        hf_model,
        process.mesh,
        pattern=config.pattern.build(),
        layer_patterns=config.patterns_by_layer,
        refresh=config.pattern.refresh,
        coverage=config.pattern.coverage,
        anneal=config.pattern.anneal.build(),
        layout=build_layout(config.layout.name, config.layout.unit),
        kernel=config.train.kernel,
        recompute=recompute,  # type: ignore[arg-type]
        offload=offload,
        fused=config.train.fused,
        float8=config.train.float8,
        param_dtype=config.train.compute,
        loss_chunk=config.train.loss_chunk,
    )
    limit_waits(config.distributed.timeout_seconds, process.others)  # the ring and FSDP have made groups
    return model


def _steps(
    config: Config,
    process: Process,
    model: ParallelLM,
    optimizer: torch.optim.AdamW,
    dataset: SequenceDataset,
    checkpointer: Checkpointer,
    evaluation: Evaluation | None,
    done: int,
    console: Console | None,
    stops: StopRequest,
    start: StartLog,
) -> int:
    """Steps `done` .. `train.steps` - 1, with their metrics, evaluations and checkpoints, or fewer when a signal asks
    for an end; how many are done then, the last of them saved (maybe still in the background)."""
    steps, every = config.train.steps, config.checkpoint.every
    stepper = Stepper(model, optimizer, config.train, process, config.accumulation)
    batches = _batches(config, process, dataset, done)
    display = Display(
        steps=steps, done=done, title=config.pattern.name, log_every=config.log.every, console=console
    )
    trackers: list[Tracker] = []
    on_main(process, lambda: trackers.extend(_trackers(config, done)))
    writer = (
        MetricsWriter(config.output, step=done, trackers=trackers, tell=display.tell)
        if process.is_main
        else None
    )
    memory = predicted = None
    if writer is not None:
        run = (config, model.hf_model, process.device, display.tell, model.policies)
        memory, predicted = MemoryLog(*run), TimeLog(*run)
    if memory is not None:
        write_about(config.output, process.device, process.world, memory.prediction)
    start.done("trackers and predictions")

    def evaluated(step: int) -> bool:
        """Evaluate where it is due, and save where the best checkpoint is kept and this is it; False: given up."""
        if evaluation is None or not evaluation.owed(step):
            return True
        _restart_peak(process.device)
        record = evaluation.run(step, lambda: stops.agreed(process), display.show)
        peak = _peak_memory(process.device)
        _restart_peak(process.device)
        if record is None:
            return False
        if writer is not None:
            record["memory"] = peak
            writer.write(record, curves(record))
            display.evaluated(told(record), record["evaluation_seconds"])
        if config.evaluate.keep_best:
            checkpointer.keep_best(evaluation.losses)
            if evaluation.is_best(step) and checkpointer.saved != step:
                checkpointer.save(step)
        return True

    if evaluation is not None:
        evaluation.go_on_from(writer.kept if writer is not None else [])
        if config.evaluate.keep_best:
            checkpointer.keep_best(evaluation.losses)
    with display, writer or nullcontext():
        # At the start, or after a run that ended before this evaluation did.
        if evaluated(done) and evaluation is not None:
            start.done("evaluation")
        for step in range(done, steps):
            begin = time.perf_counter()
            observe = step == done or (step + 1) % config.log.every == 0 or step == steps - 1
            timeline = Timeline() if observe and config.parallel.cp > 1 else None
            try:
                with timeline or nullcontext():
                    result = stepper.run(
                        batches, step, observe=observe, recall_rows=config.log.recall_rows, stop=stops.flag
                    )
            except NonFinite as error:
                checkpointer.finish()
                raise UserError(_non_finite(error, step, config, dataset, checkpointer)) from None
            stops.defer()
            seconds = time.perf_counter() - begin
            ring = ring_record(timeline, process) if timeline is not None else {}
            lanes = ring_lanes(timeline, process) if timeline is not None else {}
            short = memory_shortages(process) if observe else {}
            if writer is not None:
                record = _record(step, result, seconds, config, process.device) | ring | short
                record |= data_record(config, dataset, step)
                writer.write(record)
                if result.attention:
                    write_balance(config, step + 1, result.attention)
                if lanes:
                    write_ring(config.output, step + 1, lanes)
                display.update(record)
            taken = start.step_done(step + 1, display.tell)
            if memory is not None:
                memory.step_done(step + 1, short)
                if taken is not None:
                    write_about(config.output, process.device, process.world, memory.prediction, taken)
            if predicted is not None:
                predicted.step_done(seconds, result.attention)
            checkpointer.poll()
            due = step == steps - 1 or (every > 0 and (step + 1) % every == 0)
            if due or result.stop:
                checkpointer.save(step + 1)
            # Asked during this save: no step for another one. An evaluation that is due comes when the run goes on.
            if result.stop or (due and stops.agreed(process)):
                return step + 1
            if not evaluated(step + 1):
                if not due:
                    checkpointer.save(step + 1)
                return step + 1
    if done == steps:
        display.tell(f"nothing to do: the checkpoint of step {steps} is there already")
    return steps


def _trackers(config: Config, done: int) -> list[Tracker]:
    return open_trackers(config.log.trackers, config.output, config.log.project, flat_options(config), done)


def _batches(config: Config, process: Process, dataset: SequenceDataset, start_step: int) -> Iterator[Batch]:
    loader = build_loader(
        dataset,
        global_batch=config.train.batch_size,
        dp_rank=process.dp_rank,
        dp_size=config.parallel.dp,
        micro_batch=config.train.micro_batch_size,
        start_step=start_step,
        steps=config.train.steps,
        num_workers=config.data.workers,
        pin_memory=process.device.type == "cuda",
    )
    # An iterator draws a seed, and a resumed run makes one more of them.
    with torch.random.fork_rng(devices=[]):
        batches = read(loader)
    return _or_stopped(batches, config, process)


def _or_stopped(batches: Iterator[Batch], config: Config, process: Process) -> Iterator[Batch]:
    """The same; a process of the loader that has died ends the run in one sentence."""
    try:
        yield from batches
    except ReaderDied as error:
        raise RunStopped(
            f"a process that reads data for rank {process.rank} {error}; {way_on(config.output)}"
        ) from None


def _record(
    step: int, result: StepResult, seconds: float, config: Config, device: torch.device
) -> dict[str, Any]:
    """One line of metrics.jsonl. Times in seconds, memory (peak of this rank, on a GPU since the last evaluation) in
    bytes; `step` counts from 1."""
    record: dict[str, Any] = {
        "step": step + 1,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens_per_second": config.train.batch_size * config.train.seq_len / seconds,
        "step_seconds": seconds,
        "memory": _peak_memory(device),
    }
    return record | attention_record(result.attention) | result.telemetry


def memory_shortages(process: Process) -> dict[str, int]:
    """``memory_shortages`` so far, of the rank with most; nothing where none is known of. Collective."""
    if process.device.type != "cuda":
        return {}
    return {"memory_shortages": int(max(process.gather(shortages(process.device))))}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _restart_peak(device: torch.device) -> None:
    """Let an evaluation and the steps around it each tell a peak of their own; a CPU's process has but one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _non_finite(
    error: NonFinite, step: int, config: Config, dataset: SequenceDataset, checkpointer: Checkpointer
) -> str:
    """The sentence of a stopped run: step, ranks, and the samples those ranks were given."""
    shares = sorted({rank // config.parallel.cp for rank in error.ranks}) or list(range(config.parallel.dp))
    plan = step_plan(
        dataset,
        step,
        global_batch=config.train.batch_size,
        dp_size=config.parallel.dp,
        micro_batch=config.train.micro_batch_size,
    )
    samples = [dataset.describe(window) for share in shares for window in plan.windows[share]]
    ranks = ", ".join(str(rank) for rank in error.ranks) or "unknown"
    return (
        f"step {step + 1}: {error.what} is {error.value} on rank {ranks}, in the batch of {'; '.join(samples)}; "
        f"nothing was updated and the last checkpoint is {checkpointer.store.latest() or 'none yet'}: lower train.lr "
        "or train.clip, or look at these documents."
    )


def _stopped(config: Config, done: int, checkpoint: Path) -> str:
    """The sentence of a run that a signal ended: what is saved, and how to go on."""
    again = "run the same command again"
    if config.checkpoint.resume != "auto":
        again += " with --set checkpoint.resume=auto"
    if done == config.train.steps:
        return (
            f"stopped by a signal after the last step, {done}, saved in {checkpoint}: {again} to finish it."
        )
    return f"stopped by a signal after step {done}, saved in {checkpoint}: {again} to go on from it."
