"""Bad input is refused before the first step, in one sentence that names the option."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import raw_config, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mtraining.data import save_byte_tokenizer
from mtraining.errors import UserError
from mtraining.train.checks import check_config
from mtraining.train.config import parse_config
from mtraining.train.identity import check_shapes
from mtraining.train.loop import train
from mtraining.train.mesh import check_world
from mtraining.train.store import CheckpointStore, FileRecord, Manifest

NO_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "vocab_size": 260,
    "model_type": "qwen2",
}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"train": {"seq_len": 250}}, "seq_len: 250 .* the nearest length that works is 256"),
        ({"train": {"seq_len": 64}, "parallel": {"cp": 8}}, "too few .* 8 ranks with blocks of 16"),
        ({"train": {"seq_len": 4096}}, "has no document of train.seq_len 4,096"),
        ({"train": {"warmup_steps": 6}}, "train.warmup_steps=6 leaves no step"),
        (
            {"train": {"deterministic": True, "kernel": "flash4"}},
            "^train.kernel=flash4 adds gradients in no fixed order, .* use train.kernel=auto or triton",
        ),
        ({"layout": {"unit": 24}}, "layout.unit: a stripe of 24 tokens cuts"),
        ({"layout": {"name": "stripped"}}, "did you mean 'striped'"),
        ({"pattern": {"topp": 0.5}}, "pattern.topp: .*did you mean 'top_p'"),
        ({"pattern": {"name": "vertical_slsh"}}, "did you mean 'vertical_slash'"),
        ({"checkpoint": {"resume": "elsewhere/step_1"}}, "elsewhere/step_1 does not exist"),
    ],
)
def test_before_any_model(tmp_path: Path, shards: Path, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        check_config(tiny_config(tmp_path / "run", shards, **sections))
    assert "\n" not in str(raised.value)


def test_data_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check_config(tiny_config(tmp_path / "run", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        check_config(tiny_config(tmp_path / "run", tmp_path / "empty"))


def test_data_of_another_tokenizer_than_the_models(tmp_path: Path, shards: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    named = {"config": {**NO_MODEL}, "tokenizer": str(tmp_path / "words")}
    with pytest.raises(UserError) as raised:
        check_config(tiny_config(tmp_path / "run", shards, model=named))
    sentence = str(raised.value)
    assert (
        f"dataset '{shards}' was prepared with tokenizer 'byte', which is not the model's (token " in sentence
    )
    assert f"--tokenizer {tmp_path / 'words'}, or set data.allow_other_tokenizer=true" in sentence
    meant = parse_config(
        {
            **raw_config(tmp_path / "run", shards, model=named),
            "data": {"path": str(shards), "allow_other_tokenizer": True},
        }
    )
    check_config(meant)
    save_byte_tokenizer(
        tmp_path / "bytes"
    )  # the data's own is no other, and without a name there is none to compare
    check_config(tiny_config(tmp_path / "run", shards, model={**named, "tokenizer": str(tmp_path / "bytes")}))
    check_config(tiny_config(tmp_path / "run", shards, model={**named, "tokenizer": None}))


@pytest.mark.parametrize("name", ["./typo", "typo", "owner/typo"])
def test_a_mistyped_model_is_told_by_its_option(name: str, tmp_path: Path, shards: Path) -> None:
    options = raw_config(tmp_path / "run", shards)
    with pytest.raises(
        UserError, match=rf"^model.init='{name}' (does not exist|is no path here).*; correct the path"
    ):
        check_config(parse_config({**options, "model": {"init": name}}))
    options["model"]["tokenizer"] = name
    with pytest.raises(UserError, match=rf"^model.tokenizer='{name}' (does not exist|is no path here)"):
        check_config(parse_config(options))


def test_a_damaged_tokenizer(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    options = {**raw_config(tmp_path / "run", shards), "model": {"init": str(tmp_path / "model")}}
    with pytest.raises(
        UserError, match=r"^model.init=.* has no tokenizer that can be loaded .*; set model.tokenizer"
    ):
        check_config(parse_config(options))


def test_an_export_folder_that_is_somebodys_is_told_before_the_first_step(
    tmp_path: Path, shards: Path
) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"run/export is not empty and no export wrote it"):
        check_config(tiny_config(tmp_path / "run", shards, checkpoint={"export": True}))
    check_config(tiny_config(tmp_path / "run", shards, checkpoint={"export": False}))


def test_vocabulary_smaller_than_the_token_ids(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(tmp_path / "run", shards, model={"config": {**NO_MODEL, "vocab_size": 100}})
    with pytest.raises(UserError, match="outside the model's vocabulary of 100"):
        check_config(config)


def test_output_that_cannot_be_made(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="output=.* cannot be made: Not a directory"):
        check_config(tiny_config(tmp_path / "file" / "run", shards))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        (
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "sliding_window": 0,
                "max_window_layers": 0,
            },
            "sliding_window=0, which is no number of tokens",
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}, "dropout"),
    ],
)
def test_models_that_cannot_be_served(
    tmp_path: Path, shards: Path, fields: dict[str, Any], sentence: str
) -> None:
    config = tiny_config(tmp_path / "run", shards, model={"config": {**NO_MODEL, **fields}})
    with pytest.raises(UserError, match=sentence):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wrong_number_of_processes(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(tmp_path / "run", shards, parallel={"cp": 2})
    with pytest.raises(UserError, match=r"needs 2 processes but 1 process was started; pass --nproc 2"):
        train(config)
    with pytest.raises(UserError, match="needs 2 processes but 3 processes were"):
        check_world(config.parallel, 3)


def write_checkpoint(run: Path, **changes: Any) -> Path:
    store = CheckpointStore(run)
    (store.begin(2) / "__0_0.distcp").write_bytes(b"tensor")
    options = {
        "train.seq_len": 256,
        "train.batch_size": 4,
        "train.seed": 0,
        "data.mode": "documents",
        **changes,
    }
    manifest = Manifest(step=2, world=1, options=options, shapes={"w": [2, 3]})
    return store.commit(2, manifest, {"__0_0.distcp": FileRecord(6)}, keep_last=1)


def test_a_run_folder_in_use_is_not_mixed_with_a_new_run(tmp_path: Path, shards: Path) -> None:
    write_checkpoint(tmp_path / "run")
    check_config(tiny_config(tmp_path / "run", shards))  # resuming it is fine
    with pytest.raises(UserError, match="already holds step_00000002; set checkpoint.resume=auto"):
        check_config(tiny_config(tmp_path / "run", shards, checkpoint={"resume": "never"}))


def test_a_checkpoint_whose_place_in_the_data_is_another(tmp_path: Path, shards: Path) -> None:
    write_checkpoint(tmp_path / "run", **{"train.seq_len": 128})
    with pytest.raises(UserError, match=r"is of another run: train.seq_len: 128 -> 256; restore"):
        check_config(tiny_config(tmp_path / "run", shards))


def test_a_half_written_checkpoint_asked_for_by_name(tmp_path: Path, shards: Path) -> None:
    path = write_checkpoint(tmp_path / "run")
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"step_00000002 is half-written \(__0_0.distcp is missing\)"):
        check_config(tiny_config(tmp_path / "run", shards, checkpoint={"resume": "step_00000002"}))


def test_a_checkpoint_of_another_model_is_named_by_its_first_difference() -> None:
    manifest = Manifest(step=1, world=1, shapes={"a": [2], "b": [4, 4]})
    check_shapes({"a": [2], "b": [4, 4]}, manifest, Path("here"))
    with pytest.raises(
        UserError, match=r"of another model: b has shape \(4, 4\) there and has shape \(4, 8\) here"
    ):
        check_shapes({"a": [2], "b": [4, 8]}, manifest, Path("here"))
    with pytest.raises(UserError, match=r"b has shape \(4, 4\) there and is absent here"):
        check_shapes({"a": [2]}, manifest, Path("here"))
