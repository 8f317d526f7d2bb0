"""How well a model foresees held-out text, by position and by word.

PG-19's own metric divides by words instead of tokens (arXiv 1911.05507, section 4): it compares models with different
tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtraining.errors import UserError
from mtraining.generate import Generator
from mtraining.generate.losses import Losses, bucketed


def document_losses(
    generator: Generator, tokens: Sequence[int], length: int, bucket: int, last: int
) -> Losses:
    """Losses of the first ``length`` tokens of a document, in one forward.

    Raises:
        UserError: the document is shorter.
    """
    if len(tokens) < length:
        raise UserError(
            f"--text: a document has {len(tokens)} tokens, fewer than the length {length}; leave it out, or ask for "
            f"shorter lengths."
        )
    return bucketed(generator.token_nll(tokens[:length]), bucket, last)


def whole_document_nll(generator: Generator, tokens: Sequence[int], length: int) -> tuple[float, int]:
    """The summed loss of every token of a document but the first, read in windows of ``length`` tokens.

    Windows share one token, so that the first token of each is foreseen too, by the window before.

    Returns:
        the sum, natural log, and how many tokens it is of.
    """
    total = 0.0
    for start in range(0, len(tokens) - 1, length - 1):
        total += float(generator.token_nll(tokens[start : start + length]).double().sum())
    return total, len(tokens) - 1
