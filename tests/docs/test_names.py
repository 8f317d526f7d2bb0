"""What docstrings, messages and pages name exists: files, make targets, commands, flags, options, objects."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from docs_pages import PAGES, ROOT, prose, spans
from mtraining.cli import app
from mtraining.model import ParallelLM
from mtraining.pattern import PATTERNS
from mtraining.train.config import Config

SRC = ROOT / "src" / "mtraining"
PYTHON = [
    path
    for folder in ("src", "benchmarks", "tests", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Files that runs and commands write or read, by the name that all of them have.
WRITTEN = set(
    """
    metrics.jsonl balance.json balance.csv config.yaml config.json demo.json meta.json report.html report/report.html
    tokenizer.json tokenizer_config.json model.safetensors patterns.yaml first.yaml
    attention.html about.json generation_config.json mtraining_export.json trackers.json
    changes.jsonl results.jsonl summary.json run.json lm-eval.json longbook_qa_eng.jsonl code_debug.jsonl
    index.html site/index.html index.json prepare.json manifest.json shard-00000.json ring.json
    """.split()
)
# Names that a reader puts a name of his own for, files of other projects, and a type of Arrow's.
ELSEWHERE = set(
    "TABLE.yaml NAME.jsonl metadata.csv book.txt moby-dick.txt emma.txt NOVEL.txt OUT.csv flash_fwd_sm90.py a.txt "
    "a.jsonl arrow.json".split()
)
# Flags of other programs, and whose they are.
FOREIGN_FLAGS = {
    "torchrun": "--nnodes --nproc-per-node --node-rank --master-addr --master-port --rdzv-backend --rdzv-endpoint "
    "--rdzv-id --shutdown-timeout",
    "Slurm": "--signal --nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --requeue --open-mode "
    "--kill-on-bad-exit",
    "pip, pytest, git": "--index-url --dist --no-deps",
    "lm-evaluation-harness": "--metadata",
}


class Said(NamedTuple):
    """A piece of text for people: a page's prose, a docstring, or a message."""

    path: Path
    line: int
    text: str
    module: str | None = None
    owner: str | None = None

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(path: Path) -> Iterator[Said]:
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) if SRC in path.parents else None
    owners: list[tuple[ast.AST, str | None]] = [(tree(path), None)]
    while owners:
        node, owner = owners.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            inside = node.name if isinstance(node, ast.ClassDef) else owner
            if text:
                yield Said(path, node.body[0].lineno, text, module, inside)
        inside = node.name if isinstance(node, ast.ClassDef) else owner
        owners += [(child, inside) for child in ast.iter_child_nodes(node)]


def messages(path: Path) -> Iterator[Said]:
    """Text of the program that is a sentence: several words."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") > 2:
            yield Said(path, node.lineno, node.value)


DOCSTRINGS = [said for path in PYTHON for said in docstrings(path)]
MESSAGES = [said for path in PYTHON if SRC in path.parents for said in messages(path)]
TEXTS = [Said(page, 1, prose(page.read_text(encoding="utf-8"))) for page in PAGES]
RECIPES = [
    Said(path, 1, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "recipes").glob("*.yaml"))
]


def missing(found: list[tuple[Said, str]]) -> list[str]:
    return [f"{said.where}: {name}" for said, name in found]


# ---- files, folders and make targets

FILE = re.compile(
    r"(?<![\w./*{-])[\w.-]*[\w/.-]*\w\.(?:py|md|ya?ml|csv|svg|toml|jsonl?|html|txt|safetensors)(?![\w*])"
)
FOLDER = re.compile(r"(?<![\w./])(?:src|docs|tests|benchmarks|recipes)/[\w./-]*(?=[`\s,;:)])")


def exists(name: str, page: Path) -> bool:
    """In the folder of the text that names it, in a folder around that, or at home in one of these."""
    homes = {ROOT, SRC, ROOT / "docs", ROOT / "benchmarks", ROOT / "tests", *page.parents}
    return any((home / name).exists() for home in homes if ROOT in (home, *home.parents))


def test_files_exist() -> None:
    wrong = []
    for said in [*TEXTS, *DOCSTRINGS, *MESSAGES, *RECIPES]:
        for name in [*FILE.findall(said.text), *FOLDER.findall(said.text)]:
            known = name in ELSEWHERE or Path(name).name in WRITTEN or "-DATE." in name
            if not known and not exists(name.rstrip("."), said.path):
                wrong.append((said, name))
    assert missing(wrong) == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = [
        (said, target)
        for said in [*TEXTS, *DOCSTRINGS, *MESSAGES]
        for target in re.findall(r"(?:`|: )make ([a-z][\w-]*)", said.text)
    ]
    assert len(named) > 5
    assert missing([(said, target) for said, target in named if target not in targets]) == []


# ---- commands and flags


def commands(group: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], set[str]]:
    """The flags of every command, by its words."""
    flags = {flag for param in group.params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}
    found = {words: flags}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*words, name))
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_commands_and_their_flags_exist() -> None:
    """Of a whole command in a code span, the words are a command and the flags are its own."""
    wrong, seen = [], 0
    for said in [*TEXTS, *DOCSTRINGS, *MESSAGES]:
        for span in spans(said.text):
            words = span.split()
            if words[:1] != ["mtraining"] or len(words) < 2:
                continue
            seen += 1
            command = max(
                (path for path in COMMANDS if tuple(words[1 : 1 + len(path)]) == path), key=len, default=()
            )
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            plain = command or words[1].startswith("-") or words[1] == "COMMAND"
            if not plain or (command and not flags <= COMMANDS[command]):
                wrong.append((said, span))
    assert seen > 20
    assert missing(wrong) == []


def test_flags_exist() -> None:
    """Any flag at all is one of a command, of a benchmark, or of another program that is named above."""
    known = {flag for flags in COMMANDS.values() for flag in flags}
    folders = (ROOT / "benchmarks", SRC, ROOT / "docs", ROOT / "recipes")
    for script in [script for folder in folders for script in folder.rglob("*.py")]:
        known |= set(re.findall(r"add_argument\(\s*\"(--[\w-]+)", script.read_text()))
    foreign = {flag for flags in FOREIGN_FLAGS.values() for flag in flags.split()}
    said = [
        (said, flag)
        for said in [*TEXTS, *DOCSTRINGS, *MESSAGES]
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", said.text)
    ]
    assert len(said) > 30
    assert missing([(where, flag) for where, flag in said if flag not in known | foreign]) == []


# ---- options of a configuration


def options() -> dict[str, set[str]]:
    """The keys of each section."""
    found: dict[str, set[str]] = {}
    for section, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[section] = {inner.alias or name for name, inner in kind.model_fields.items()}
    found["pattern"] |= {option.name for pattern in PATTERNS.values() for option in fields(pattern)}
    return found


OPTIONS = options()
# What reads like an option: `train.launch` is a file of the room, and `model` a variable of examples in Python.
ALIKE = {section: {path.stem for path in (SRC / section).glob("*.py")} for section in OPTIONS}
ALIKE["model"] |= set(dir(ParallelLM))


def test_options_exist() -> None:
    """`section.key` in pages, docstrings and messages is an option, or a module of the room of that name."""
    pattern = re.compile(rf"(?<![\w./:\[\"])({'|'.join(OPTIONS)})\.([a-z_]\w*)(?![\w(/])")
    named = [
        (said, section, key)
        for said in [*TEXTS, *DOCSTRINGS, *MESSAGES]
        for section, key in pattern.findall(said.text)
        if key not in ("py", "md", "yaml", "safetensors")
    ]
    assert len({(section, key) for _, section, key in named}) > 30
    unknown = [
        (said, f"{section}.{key}")
        for said, section, key in named
        if key not in OPTIONS[section] | ALIKE[section]
    ]
    assert missing(unknown) == []


# ---- objects


def resolve(name: str, module: str | None = None, owner: str | None = None) -> bool:
    """Whether a dotted name is an object: by itself, in a module, or in a class of it."""
    starts = [
        name,
        *([f"{module}.{name}"] if module else []),
        *([f"{module}.{owner}.{name}"] if owner else []),
    ]
    return any(_import(dotted) for dotted in starts)


@cache
def _import(dotted: str) -> bool:
    words = dotted.split(".")
    for cut in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:cut]))
        except ImportError:
            continue
        for word in words[cut:]:
            has = {**getattr(found, "__annotations__", {}), **getattr(found, "__dataclass_fields__", {})}
            if not hasattr(found, word) and word not in has:
                return False
            found = getattr(found, word, None)
        return True
    return False


ROLE = re.compile(r":(func|class|meth|mod|data|attr):`~?([\w.]+)`")


def test_roles_lead_to_objects() -> None:
    named = [(said, name) for said in DOCSTRINGS for _, name in ROLE.findall(said.text)]
    assert len(named) > 20
    assert missing([(said, name) for said, name in named if not resolve(name, said.module, said.owner)]) == []


def test_dotted_names_of_the_package_are_objects() -> None:
    """Dotted names that begin with the package, anywhere; those of torch and transformers too."""
    pattern = re.compile(r"(?<![\w./@-])(?:mtraining|torch|transformers)\.[a-zA-Z_][\w.]*\w")
    named = [
        (said, name)
        for said in [*TEXTS, *DOCSTRINGS, *MESSAGES]
        for name in pattern.findall(said.text)
        if not re.search(r"\.(py|yaml|md)$", name)
    ]
    assert len(named) > 30
    assert missing([(said, name) for said, name in named if not resolve(name)]) == []


@cache
def identifiers() -> set[str]:
    """Every name that code of this project gives or uses, strings that are one word included."""
    found = set()
    for path in PYTHON:
        for node in ast.walk(tree(path)):
            for field in ("id", "attr", "arg", "name", "asname"):
                value = getattr(node, field, None)
                if isinstance(value, str):
                    found |= set(value.split("."))
            # a string of names alone, such as the columns of a CSV
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= (
                    set(node.value.replace(".", " ").split())
                    if re.fullmatch(r"[\w.\s]+", node.value)
                    else set()
                )
    return found | {key for keys in OPTIONS.values() for key in keys} | set(OPTIONS)


# Names of other projects and of files' contents, which no code here says.
FOREIGN = set(
    "vertical_and_slash stream_llm block_sparse PyTorchJob MASTER_ADDR MASTER_PORT save_on_cpu PreTrainedConfig "
    "terminationGracePeriodSeconds OUTERxINNER TORCHINDUCTOR_CACHE_DIR FLASH_ATTENTION_CUTE_DSL_CACHE_DIR include_path "
    "mean_token_accuracy Accelerator prepare ParallelismConfig clip_grad_norm_ eval_loss".split()
)
NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(.*\))?$")


def test_names_in_code_spans_exist() -> None:
    """A code span that is one name with an underscore, a dot, a capital or a call: some code here has that name."""
    wrong, seen = [], 0
    for said in [*TEXTS, *DOCSTRINGS]:
        if said.path.name == "architectures.md":
            continue  # names of transformers' own, written by code
        for span in spans(said.text):
            if not NAME.match(span) or FILE.fullmatch(span):
                continue
            bare = span.partition("(")[0]
            if not re.search(r"[_.A-Z]|\($", bare + ("(" if "(" in span else "")):
                continue
            seen += 1
            unknown = [word for word in bare.split(".") if word not in identifiers() | FOREIGN]
            if unknown and not resolve(bare, said.module, said.owner):
                wrong.append((said, span))
    assert seen > 150
    assert missing(wrong) == []


# ---- the tests themselves


@pytest.mark.parametrize(
    ("finder", "text", "name"),
    [
        (FILE, "see `ring/atention.py` for it", "ring/atention.py"),
        (FOLDER, "in `src/mtraining/kernels/` there", "src/mtraining/kernels/"),
    ],
)
def test_a_missing_file_is_noticed(finder: re.Pattern[str], text: str, name: str) -> None:
    assert finder.findall(text) == [name]
    assert not exists(name, ROOT / "README.md")


def test_missing_names_are_noticed() -> None:
    assert not resolve("mtraining.ring.atention") and resolve("mtraining.ring.attention.attend")
    assert resolve("block_index", "mtraining.pattern.base", "SequenceShard")
    assert "no_such_name_anywhere"[:7] + "xyz" not in identifiers()
    assert "weight_dekay" not in OPTIONS["train"] and "weight_decay" in OPTIONS["train"]


def test_recipes_name_no_option_that_is_not_there() -> None:
    """Comments of recipes too: `slash_by: token` and its like."""
    keys = {key for keys in OPTIONS.values() for key in keys} | set(OPTIONS)
    for recipe in RECIPES:
        assert isinstance(yaml.safe_load(recipe.text), dict)
        for key in re.findall(r"#[^\n]*?\b([a-z]+_[a-z_]+):", recipe.text):
            assert key in keys, f"{recipe.where}: {key}"
