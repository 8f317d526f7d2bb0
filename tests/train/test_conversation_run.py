"""Training on prepared conversations: one loss over trained tokens, however they fall on ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import raw_config, run_job

from distributed import ProcessPool
from mtraining.data import PrepareOptions, SequenceDataset, TokenShards, prepare

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations of some 300 tokens, of which the answers are 10 to 220."""
    folder = tmp_path_factory.mktemp("chats")
    rows = []
    for number in range(8):
        said = 10 + 30 * number
        ask, say = (
            "".join(str(n * k) for n in range(300))[:length] for k, length in ((3, 240 - said), (7, said))
        )
        rows.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jinja").write_text(TEMPLATE)
    options = PrepareOptions(
        (str(folder / "chats.jsonl"),), folder / "data", chat_template=folder / "chat.jinja"
    )
    prepare(options, progress=False)
    return folder / "data"


@pytest.mark.slow
def test_the_loss_does_not_depend_on_the_grid(tmp_path: Path, pool: ProcessPool, chats: Path) -> None:
    dataset = SequenceDataset(TokenShards(chats), 256, mode="concat")
    counts = [int((item["labels"] != -100).sum()) for item in map(dataset.__getitem__, range(len(dataset)))]
    assert max(counts) > 3 * min(counts) > 0  # unequal shares, or a mean of means would pass
    found = []
    for grid in ({"dp": 1}, {"dp": 2}, {"cp": 2}):
        raw = raw_config(
            tmp_path / str(grid),
            chats,
            parallel=grid,
            train={"steps": 3, "batch_size": 4, "micro_batch_size": 1},
            pattern={"top_p": 1.0},
        )
        raw["data"]["mode"] = "concat"
        records = pool.run(run_job, world=max(grid.values()), raw=raw)[0]
        found.append(([r["loss"] for r in records], [r["grad_norm"] for r in records]))
    for losses, norms in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert norms == pytest.approx(found[0][1], rel=1e-4)
