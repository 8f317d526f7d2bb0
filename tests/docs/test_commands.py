"""Every command, snippet and configuration on every page is run or read by a test, or excused with a reason."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from docs_pages import PAGES, ROOT, Block, blocks, command_lines
from mtraining.pattern import load_table
from mtraining.train.config import PatternSection, load_config, parse_config
from mtraining.train.evaluate_section import EvaluateSection

README = ROOT / "README.md"
TOUR = ROOT / "docs" / "tour.md"
CI = (ROOT / ".ci" / "run").read_text()

# A command that CI does not run as it stands, and the test that runs it instead.
RUN_BY_TEST = {
    "mtraining report runs/sparse runs/dense": "tests/report/test_command.py::test_the_report_of_the_page",
    "mtraining inspect runs/sparse book.txt --tokens 8192": (
        "tests/report/test_command.py::test_the_inspection_of_the_page"
    ),
    "mtraining evaluate runs/first --suite needle --suite ppl --suite recall --lengths 1k,2k --text book.txt "
    "--essays book.txt --attention dense --attention sparse --samples 2": (
        "tests/cli/test_evaluate_command.py::test_the_pages_command"
    ),
    "mtraining export runs/first out --merge": (
        "tests/train/test_lora_run.py::test_the_adapter_and_the_merged_model_are_the_same"
    ),
    "torchrun --nproc-per-node 2 examples/own_loop.py": "tests/integrations/test_examples.py::test_own_loop",
    **dict.fromkeys(
        (
            "python recipes/study prepare runs/study --novels novels",
            "python recipes/study run runs/study --minutes 10",
            "python recipes/study summary runs/study",
        ),
        "tests/study/test_study_measure.py::test_every_arm_runs_on_a_cpu",
    ),
    "mtraining train recipes/qwen2.5-3b-512k.yaml --dry-run --memory-gib 79.1 --set train.recompute=auto "
    "--set parallel.cp=4 --set parallel.cp_outer=1": "tests/predict/test_recompute_choice.py::test_dry_run",
    "python recipes/study publish runs/study h100-2026-12 two.tgz": (
        "tests/study/test_study_compared.py::test_results_become_tables_figures_and_a_page"
    ),
    "mtraining bench tiles": "tests/kernel/triton_interpreter/test_tiles_command.py::test_the_command",
    "mtraining generate runs/first --prompt a.txt": (
        "tests/cli/test_generate_command.py::test_a_folder_a_run_and_its_checkpoint_are_the_same_model"
    ),
    "mtraining generate runs/first --prompt a.txt --attention sparse --nproc 2": (
        "tests/cli/test_generate_command.py::test_processes_of_its_own_give_the_same_answer"
    ),
    "mtraining generate runs/first --prompt a.txt --nproc 2 --dry-run --memory-gib 80": (
        "tests/cli/test_generate_command.py::test_a_dry_run_tells_the_memory_and_answers_nothing"
    ),
    "mtraining evaluate runs/first --suite ppl --text book.txt --lengths 2k --nproc 2 --dry-run --memory-gib 80": (
        "tests/cli/test_evaluate_command.py::test_a_dry_run_tells_the_memory_of_the_longest_length"
    ),
    "mtraining prepare chats.jsonl data/chats --chat-template chat.jinja --train-on assistant --max-length 4096": (
        "tests/cli/test_prepare_command.py::test_the_pages_command_for_conversations"
    ),
    "mtraining prepare prolong/book-524288 data/books --ids-tokenizer llama-3 --min-length 8193 --every 4": (
        "tests/data/test_mds.py::test_the_pages_command"
    ),
    "mtraining plan --model qwen2.5-3b --seq-len 512K --gpus 4x8 --inter 25GB/s": (
        "tests/cli/test_plan_command.py::test_the_pages_command"
    ),
    "mtraining bench rates": "tests/bench/test_rates_bench.py::test_the_command",
    "mtraining bench train": "tests/bench/test_train_bench.py::test_the_command",
    "mtraining train recipes/qwen2.5-3b-512k.yaml --dry-run --memory-gib 80": (
        "tests/predict/test_memory.py::test_readmes_dry_run"
    ),
}
# A command that no test can run, and why.
NOT_RUN = {
    "recipes/study/two_gpus.sh": "needs two GPUs",
    "pip install '.[gpu]'": "would install Triton into the environment that runs the tests",
    "pip install 'mtraining[wandb,mlflow,trackio]'": "would change the environment that runs the tests",
    "pip install 'mtraining[lora]'": "would change the environment that runs the tests",
    "pip install 'mtraining[float8]'": "would change the environment that runs the tests",
    "python benchmarks/option_parity.py --text moby-dick.txt": "needs a GPU to be of use",
    "mtraining bench train --seq-len 128K": "needs GPUs",
    "pip install 'mtraining[gpu] @ git+file:///path/to/mtraining'": "the path is the reader's",
    "pip install 'mtraining[mds]'": "would install into the environment that runs the tests",
    "pip install --no-deps mosaicml-streaming": "would install into the environment that runs the tests",
    'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "needs a Slurm cluster",
    "srun": "needs a Slurm cluster; test_torchrun_lines_parse reads its torchrun line",
}
# A command that is part of another, which CI runs.
PART_OF = {"make test": "make test-all"}
LANGUAGES = {"bash", "python", "yaml", "diff", "text"}
COMMANDS = [(block, line) for block in blocks("bash") for line in command_lines(block.body)]


def run_by_ci(command: str) -> bool:
    wanted = {command, PART_OF.get(command, command)}
    return any(line.removeprefix("step ") in wanted for line in CI.splitlines())


def excused(command: str) -> str | None:
    """The entry of NOT_RUN that a command falls under."""
    return next((entry for entry in NOT_RUN if command == entry or command.startswith(f"{entry} ")), None)


def test_readme_begins_with_its_two_commands_and_is_short() -> None:
    assert [line for block, line in COMMANDS if block.page == README][:2] == ["make demo", "make test"]
    assert len(README.read_text().splitlines()) <= 110


def test_every_block_says_its_language() -> None:
    """One that does not would be looked at by none of these tests."""
    assert [block.where for block in blocks() if block.language not in LANGUAGES] == []


@pytest.mark.parametrize(
    ("block", "command"), COMMANDS, ids=[f"{b.page.name}: {c[:50]}" for b, c in COMMANDS]
)
def test_command_is_run_or_excused(block: Block, command: str) -> None:
    if run_by_ci(command) or excused(command):
        return
    if block.page == TOUR:
        return  # test_tour.py runs every command of that page, and says so below
    assert command in RUN_BY_TEST, f"{block.page.name}: nothing runs `{command}`"
    file, _, name = RUN_BY_TEST[command].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE), (
        f"{file} has no {name}"
    )


def test_the_tours_test_runs_all_of_its_commands() -> None:
    from test_tour import COMMANDS as TOURS

    assert [shlex.join(words) for words in TOURS] == [line for block, line in COMMANDS if block.page == TOUR]


def test_tables_hold_nothing_that_no_page_says() -> None:
    said = {line for _, line in COMMANDS}
    assert [command for command in RUN_BY_TEST if command not in said] == []
    assert [entry for entry in NOT_RUN if not any(excused(command) == entry for command in said)] == []


def test_a_command_that_nothing_runs_is_noticed() -> None:
    assert not run_by_ci("make coffee") and not run_by_ci("make")
    assert excused("srun torchrun") and not excused("srunner")


def test_torchrun_lines_parse() -> None:
    """Those of clusters.md and of the Kubernetes job: torchrun knows the options, and the recipe reads."""
    lines = [shlex.split(line)[2:] for _, line in COMMANDS if line.startswith("srun ")]
    for block in blocks("yaml"):
        job = yaml.safe_load(block.body)
        if isinstance(job, dict) and job.get("kind") == "Job":
            container = job["spec"]["template"]["spec"]["containers"][0]
            lines.append([*container["command"], *container["args"]])
    assert len(lines) == 2
    for words in lines:
        assert words[0] == "torchrun"
        node = [word if word != "$(JOB_COMPLETION_INDEX)" else "0" for word in words[1:]]
        arguments = get_args_parser().parse_args(node)
        assert arguments.module and arguments.training_script == "mtraining.cli"
        command, recipe = arguments.training_script_args
        config = load_config(ROOT / recipe)
        assert command == "train"
        assert config.parallel.world == int(arguments.nnodes) * int(arguments.nproc_per_node)


PYTHON = [block for block in blocks("python") if not block.body.startswith("# src/")]


@pytest.mark.parametrize("block", PYTHON, ids=[block.where for block in PYTHON])
def test_python_snippet_runs(block: Block) -> None:
    scope: dict[str, Any] = {}
    exec(compile(block.body, block.where, "exec"), scope)


def test_files_that_snippets_write_are_followed_by_a_test() -> None:
    """Blocks that begin with a file's name are steps of CONTRIBUTING, which test_contributing.py follows."""
    written = [block for block in blocks("python", "diff") if re.match(r" ?# (src|tests)/", block.body)]
    assert written and {block.page for block in written} == {ROOT / "CONTRIBUTING.md"}
    assert [block.where for block in blocks("diff") if block not in written] == []


YAML = blocks("yaml")


@pytest.mark.parametrize("block", YAML, ids=[block.where for block in YAML])
def test_yaml_block_reads(block: Block, tmp_path: Path) -> None:
    """A whole run, a pattern section, a table of patterns, or a job of a cluster: nothing else, and all of it known."""
    content = yaml.safe_load(block.body)
    if "train" in content:
        parse_config(content, source=block.where)
    elif set(content) == {"pattern"}:
        PatternSection(**content["pattern"])
    elif set(content) == {"evaluate"}:
        EvaluateSection(**content["evaluate"])
    elif set(content) == {"patterns", "layers"}:
        (tmp_path / "table.yaml").write_text(block.body)
        assert len(load_table(tmp_path / "table.yaml")) == len(content["layers"])
    else:
        assert content["kind"] == "Job", f"{block.where}: what is this?"


def test_links_of_pages_outside_the_site_lead_somewhere() -> None:
    """`make docs` looks at the links of docs/ alone."""
    for page in PAGES[:2]:
        linked = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
        assert linked
        assert [path for path in linked if not (page.parent / path).exists()] == []
