"""A union selects what any of its members does, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, VerticalSlash, build_pattern

MOBA = {"name": "moba", "options": {"chunk": 16, "top_k": 2}}
STREAM = {"name": "a_shape", "options": {"sinks": 5, "window": 10}}
RANDOM = {"name": "toeplitz_random", "options": {"density": 0.3, "window": 2, "columns": 20}}
XATTENTION = {"name": "xattention", "options": {"stride": 4, "threshold": 0.3}}


@pytest.mark.parametrize(
    "members", [[STREAM], [STREAM, RANDOM], [MOBA, STREAM], [RANDOM, XATTENTION, STREAM, MOBA]], ids=str
)
def test_mask_is_the_members_masks_joined(members: list[dict[str, Any]]) -> None:
    q, k, shard = torch.randn(2, 128, 4, 8), torch.randn(2, 128, 2, 8), SequenceShard.whole(128)
    index = build_pattern("union", block_size=8, patterns=members).estimate(q, k, shard, 0.3)
    joined = torch.zeros(2, 4, 128, 128, dtype=torch.bool)
    for member in members:
        joined |= (
            build_pattern(member["name"], block_size=8, **member["options"])
            .estimate(q, k, shard, 0.3)
            .to_mask()
        )
    assert torch.equal(index.to_mask(), joined)
    step, padding = index.columns.diff(), index.columns[..., 1:] == 128
    assert ((step > 0) | padding).all() and (step >= 0).all(), "columns ascend and do not repeat"


def test_members_may_be_built_named_or_described() -> None:
    window = VerticalSlash(block_size=8, sinks=1, window=1)
    union = build_pattern("union", block_size=8, patterns=[window, "dense", {"name": "dense"}])
    assert union.members[0] is window  # type: ignore[attr-defined]
    assert [m.block_size for m in union.members] == [8, 8, 8]  # type: ignore[attr-defined]
    assert hash(union) == hash(build_pattern("union", block_size=8, patterns=[window, "dense", "dense"]))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ([], "pattern.patterns: .* list at least one"),
        ([{"nam": "moba"}], "pattern.patterns: .* is no pattern"),
        ([{"name": "moba", "chunk": 4}], "pattern.patterns: .* is no pattern"),
        ([7], "pattern.patterns: 7 is no pattern"),
        ("dense", "pattern.patterns: 'dense' .* list at least one"),
        (None, "pattern.patterns: None .* list at least one"),
        ([{"name": "moba", "options": [4]}], "pattern.patterns: .* is no pattern"),
        ([{"name": "mobba"}], "did you mean 'moba'"),
        (
            [{"name": "moba", "options": {"top": 3}}],
            "pattern.top: moba has no such option .did you mean 'top_k'",
        ),
        ([{"name": "dense", "options": {"block_size": 64}}], "dense has block_size 64, the union 128"),
    ],
)
def test_bad_members_are_refused_by_name(patterns: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("union", patterns=patterns)
