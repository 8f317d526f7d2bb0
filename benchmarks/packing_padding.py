"""How much of packed sequences is padding, with documents that may begin at any token or at whole blocks only.

    python benchmarks/packing_padding.py books=data/books code=data/code talk=data/talk --out CSV

Each NAME=FOLDER is a folder that `mtraining prepare` wrote; only the lengths of its documents count. A small corpus
ends in a sequence that is hardly filled, which a large one would not show. So documents are drawn from the folder, with
replacement, until they fill `--sequences`. The last row of each setting is all folders together, with equal shares of
tokens. Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from mtraining.bench.record import appended, code_version
from mtraining.data import TokenShards
from mtraining.data.packing import best_fit

FIELDS = "date commit corpus documents median_tokens seq_len align look_ahead sequences padding".split()
TOGETHER = "all"


def drawn(lengths: np.ndarray, tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents drawn with replacement until they have so many tokens."""
    generator = np.random.default_rng(seed)
    found = np.zeros(0, dtype=np.int64)
    while found.sum() < tokens:
        found = np.concatenate([found, generator.choice(lengths, int(tokens / lengths.mean()) + 1)])
    return found[: int(np.searchsorted(found.cumsum(), tokens)) + 1]


def padding(lengths: np.ndarray, seq_len: int, align: int, look_ahead: int) -> tuple[int, float]:
    """Sequences that the documents take, and the share of their positions that holds no token.

    Args:
        lengths: input tokens of each document.
        align: a document begins at a multiple of this many tokens; 1 is anywhere.
    """
    full, tails = lengths // seq_len, lengths % seq_len
    tails = tails[tails > 0]
    taken = np.minimum(-(-tails // align) * align, seq_len)
    sequences = int(full.sum()) + len(best_fit(taken, seq_len, look_ahead)[1])
    return sequences, 1 - int(lengths.sum()) / (sequences * seq_len)


def mixed(corpora: dict[str, np.ndarray], tokens: int) -> np.ndarray:
    """Documents of every corpus with equal shares of ``tokens``, shuffled."""
    parts = [drawn(lengths, tokens // len(corpora)) for lengths in corpora.values()]
    return np.random.default_rng(1).permutation(np.concatenate(parts))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--align", type=int, nargs="+", default=[1, 64, 128])
    parser.add_argument("--look-ahead", type=int, nargs="+", default=[1, 64, 1024, 16384])
    parser.add_argument("--sequences", type=int, default=200)
    options = parser.parse_args(argv)
    corpora = {}
    for corpus in options.corpora:
        name, _, folder = corpus.partition("=")
        inputs = TokenShards(folder).lengths - 1
        corpora[name] = inputs[inputs > 0]
    commit = code_version()
    with appended(options.out, FIELDS) as write:
        for seq_len in options.seq_len:
            tokens = options.sequences * seq_len
            chosen = {name: drawn(lengths, tokens) for name, lengths in corpora.items()}
            if len(corpora) > 1:
                chosen[TOGETHER] = mixed(corpora, tokens)
            for name, lengths in chosen.items():
                of = [
                    date.today(),
                    commit,
                    name,
                    len(corpora.get(name, ())) or "",
                    int(np.median(lengths)),
                    seq_len,
                ]
                for align in options.align:
                    for look_ahead in options.look_ahead:
                        sequences, share = padding(lengths, seq_len, align, look_ahead)
                        write([*of, align, look_ahead, sequences, f"{share:.5f}"])
                        print(
                            f"{name:8} {seq_len:7} align {align:4} look-ahead {look_ahead:6}: {share:7.2%}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
