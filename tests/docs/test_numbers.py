"""Tables of README and of the campaigns say what benchmarks/results says, to the digits that they show."""

from __future__ import annotations

import csv
import re
from itertools import product
from statistics import median

import pytest

from docs_pages import PAGES, ROOT, prose

RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str, **chosen: str) -> list[dict[str, str]]:
    """Rows of a result file that have these values."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        found = [
            row for row in csv.DictReader(file) if all(row[key] == value for key, value in chosen.items())
        ]
    assert found, (name, chosen)
    return found


def line(page: str, begins: str) -> str:
    """The one line of a table that begins with these words."""
    found = [text for text in (ROOT / page).read_text().splitlines() if text.startswith(f"| {begins}")]
    assert len(found) == 1, (page, begins, found)
    return found[0]


def peaks(row: dict[str, str]) -> str:
    """Measured and predicted GiB, as tables of steps have them."""
    return f"{float(row['peak_gib']):.1f} ({float(row['predicted_gib']):.1f})"


@pytest.mark.parametrize("page", ["README.md", "docs/performance/training-steps.md"])
@pytest.mark.parametrize(
    ("begins", "pattern", "layout"),
    [
        ("dense, zigzag", "dense", "zigzag"),
        ("5 %, striped |", "toeplitz_random", "striped"),
        ("5 %, zigzag", "toeplitz_random", "zigzag"),
        ("5 %, contiguous", "toeplitz_random", "contiguous"),
    ],
)
def test_training_steps(page: str, begins: str, pattern: str, layout: str) -> None:
    file = "train-h200x2-2026-11-23.csv"
    (row,) = rows(file, commit="b295a5f", pattern=pattern, layout=layout)
    said = line(page, begins)
    assert f"| {float(row['step_seconds']):.2f}"[:6] in said
    assert f"{float(row['tokens_per_second']):,.0f}" in said
    assert f"{float(row['peak_gib']):.1f}" in said
    assert f"{100 * float(row['ring_exposed_fraction']):.1f} %" in said
    assert pattern == "dense" or f"({float(row['speedup']):.1f}x)" in said


def test_the_step_with_all_layers() -> None:
    (row,) = rows("train-h200x2-2026-11-23.csv", layers="36")
    said = line("README.md", "5 %, striped, all 36 layers")
    assert row["commit"] in said
    assert f"{float(row['step_seconds']):.1f}" in said and f"{float(row['tokens_per_second']):,.0f}" in said
    assert f"{float(row['peak_gib']):.1f}" in said


@pytest.mark.parametrize(("begins", "tokens"), [("128K", "131072"), ("256K", "262144"), ("512K", "524288")])
def test_the_ring_on_two_gpus(begins: str, tokens: str) -> None:
    alone, ring = rows("ring-h200x2-2026-11-23.csv", commit="b295a5f", seq_len=tokens)
    said = line("docs/performance/ring.md", begins)
    for row in (alone, ring):
        assert f"{float(row['forward_ms']):.2f} + {float(row['backward_ms']):.2f}" in said
    assert f"| {float(ring['efficiency']):.2f} |" in said
    assert f"{100 * float(ring['exposed_fraction']):.1f} %" in said


@pytest.mark.parametrize(("begins", "ring"), [("flat ring", "flat"), ("two rings of two", "2x2")])
def test_slow_links(begins: str, ring: str) -> None:
    expected = [
        f"{float(row['slowdown']):.2f}, {100 * float(row['exposed_fraction']):.0f} %"
        for row in rows("link-delay-cpu-2026-11-23.csv", ring=ring)
    ]
    assert line("docs/performance/slow-links.md", begins) == f"| {begins} | {' | '.join(expected)} |"


@pytest.mark.parametrize(
    ("begins", "backend", "tokens", "tiles"),
    [
        ("slash tiles, 27", "triton", "32768", "26.9984"),
        ("the same through flash-attn-4's", "flash4", "32768", "26.9984"),
        ("slash tiles, 26", "triton", "131072", "25.9996"),
        ("the same through flash-attn-4 |", "flash4", "131072", "25.9996"),
        ("slash tiles, 7", "triton", "32768", "6.99878"),
    ],
)
def test_attention_kernels(begins: str, backend: str, tokens: str, tiles: str) -> None:
    chosen = {
        "backend": backend,
        "seq_len": tokens,
        "blocks_per_row": tiles,
        "columns": "0",
        "head_dim": "128",
    }
    found = rows("attention-h200-2026-11-23-2.csv", **chosen, q_heads="32")
    said = line("docs/performance/attention.md", begins)
    for row in found:
        assert f"{float(row['tflops']):.0f} ({float(row['ratio']):.2f})" in said


@pytest.mark.parametrize(
    ("at", "tokens", "head_dim"),
    [("128K", "131072", "128"), ("32K", "32768", "128"), ("32K, head_dim 64", "32768", "64")],
)
def test_attention_within_a_window(at: str, tokens: str, head_dim: str) -> None:
    for backend, begins in (
        ("fa4", "flash-attn-4's own window"),
        ("triton", "tiles of `kernel: triton`"),
        ("flash4", "tiles of `kernel: flash4`"),
    ):
        chosen = {"backend": backend, "seq_len": tokens, "head_dim": head_dim}
        forward, backward = (
            f"{float(row['tflops']):.0f}" + (f" ({float(row['ratio']):.2f})" if row["ratio"] else "")
            for row in rows("attention-window-h100-80gb-hbm3-2026-11-27-2.csv", **chosen)
        )
        begins = f"{begins}, {at}"
        assert (
            line("docs/performance/attention.md", f"{begins} |") == f"| {begins} | {forward} | {backward} |"
        )
    # The aim.
    shares = [
        row["ratio"] for row in rows("attention-window-h100-80gb-hbm3-2026-11-27-2.csv") if row["ratio"]
    ]
    assert len(shares) == 12 and min(map(float, shares)) >= 0.8


@pytest.mark.parametrize(
    ("begins", "tokens", "file"),
    [
        ("128K, 82f7c6a, keep_attention", 131072, "train-h100x2-2026-11-27.csv"),
        ("128K, ea8c751, keep_attention", 131072, "train-h100x2-2026-11-27-ea8c751.csv"),
        ("128K, 2594bd1, keep_attention", 131072, "train-h100x2-2026-11-27-2594bd1.csv"),
        ("128K, ea8c751 again, keep_attention", 131072, "train-h100x2-2026-11-27-2-ea8c751.csv"),
        ("256K, 2594bd1, keep_attention", 262144, "train-h100x2-2026-11-27-2594bd1.csv"),
        ("256K, ea8c751 again, keep_attention", 262144, "train-h100x2-2026-11-27-2-ea8c751.csv"),
        ("128K, 2594bd1, auto", 131072, "train-h100x2-2026-11-27-2594bd1.csv"),
        ("128K, 304b272, keep_attention", 131072, "train-h100x2-2026-11-27-304b272.csv"),
        ("128K, 304b272, auto", 131072, "train-h100x2-2026-11-27-304b272.csv"),
        ("256K, 304b272, auto", 262144, "train-h100x2-2026-11-27-304b272.csv"),
        ("256K, b85288b, auto", 262144, "train-h100x2-2026-11-27-b85288b.csv"),
        ("512K on four GPUs, 304b272, auto", 524288, "train-h100x4-2026-11-27.csv"),
        ("512K on four GPUs, b85288b, auto", 524288, "train-h100x4-2026-11-27-b85288b.csv"),
        ("512K on four GPUs, ea8c751, keep_attention", 524288, "train-h100x4-2026-11-27-ea8c751.csv"),
    ],
)
def test_training_steps_on_h100s(begins: str, tokens: int, file: str) -> None:
    recompute = begins.split(", ")[-1]
    (row,) = (
        row
        for row in rows(file, seq_len=str(tokens), recompute=recompute)
        if row.get("float8", "off") == "off"
    )
    assert line("docs/performance/training-steps.md", begins) == (
        f"| {begins} | {float(row['step_seconds']):.2f} | {float(row['tokens_per_second']):,.0f} "
        f"| {peaks(row)} | {100 * float(row['ring_exposed_fraction']):.1f} % |"
    )


@pytest.mark.parametrize("recompute", ["keep_attention", "auto"])
@pytest.mark.parametrize("commit", ["244fe15", "1157c4e"])
@pytest.mark.parametrize(("words", "tokens"), [("128K", 131072), ("256K", 262144)])
def test_memory_of_gradients(words: str, tokens: int, commit: str, recompute: str) -> None:
    file = f"train-h100x2-2026-11-28-{commit}.csv"
    gradient_memory(f"{words}, {commit}, {recompute}", file, tokens, recompute)


def test_memory_of_gradients_on_four_gpus() -> None:
    file = "train-h100x4-2026-11-28-244fe15.csv"
    gradient_memory("512K on four GPUs, 244fe15, keep_attention", file, 524288, "keep_attention")


def gradient_memory(begins: str, file: str, tokens: int, recompute: str) -> None:
    (row,) = rows(file, seq_len=str(tokens), recompute=recompute, fused="liger")
    assert line("docs/performance/training-steps.md", begins) == (
        f"| {begins} | {float(row['step_seconds']):.2f} | {peaks(row)} "
        f"| {float(row['reserved_gib']):.1f} | {float(row['shortages']):.1f} | "
        f"{100 * float(row['ring_exposed_fraction']):.1f} % |"
    )


def test_where_the_time_of_two_gpus_goes() -> None:
    left_out = {"profiled step", "peak GiB", "rate outside attention"}
    for row in rows("profile-h100x2-2026-11-28.csv"):
        if row["component"] not in left_out:
            begins = row["component"]
            assert line("docs/performance/training-steps.md", f"{begins} |") == (
                f"| {begins} | {float(row['ms']):,.0f} | {100 * float(row['share']):.1f} % |"
            )


def test_clocks_under_load() -> None:
    busy = [row for row in rows("clocks-h100x4-2026-11-28.csv") if float(row["power_w"]) > 600]
    page = (ROOT / "docs/performance/training-steps.md").read_text()
    assert all(row["limited_by_power"] == "1" for row in busy)
    assert f"In each of {len(busy)}\nreadings above 600 W" in page
    assert f"The median clock was then {median(float(row['clock_mhz']) for row in busy):,.0f} MHz" in page


@pytest.mark.parametrize(
    ("begins", "file", "fused", "float8"),
    [
        ("liger, tensorwise", "tensorwise", "liger", "tensorwise"),
        ("compile, bf16", "1157c4e", "compile", "off"),
        ("compile, rowwise", "1157c4e", "compile", "rowwise"),
    ],
)
def test_forms_of_a_step(begins: str, file: str, fused: str, float8: str) -> None:
    (row,) = rows(f"train-h100x2-2026-11-28-{file}.csv", fused=fused, float8=float8, seq_len="131072")
    assert line("docs/performance/float8-and-moments.md", begins) == (
        f"| {begins} | {float(row['step_seconds']):.2f} | {peaks(row)} |"
    )


@pytest.mark.parametrize(
    ("begins", "tokens", "recompute"),
    [("128K, keep", 131072, "keep_attention"), ("256K, auto", 262144, "auto")],
)
def test_steps_in_float8(begins: str, tokens: int, recompute: str) -> None:
    found = {
        row["float8"]: row
        for row in rows("train-h100x2-2026-11-27-304b272.csv", seq_len=str(tokens), recompute=recompute)
    }
    plain, eight = found["off"], found["rowwise"]
    _, _, *cells, _ = line("docs/performance/float8-and-moments.md", begins).split("|")
    assert [cell.strip() for cell in cells] == [
        f"{float(plain['step_seconds']):.2f}",
        f"{float(eight['step_seconds']):.2f}",
        peaks(eight),
    ]


@pytest.mark.parametrize(
    ("begins", "transfers"),
    [
        ("shared |", "shared"), ("own |", "own"), ("shared, ahead |", "shared+prefetch"),
        ("own, ahead |", "own+prefetch"),
    ],
)  # fmt: skip
def test_ways_of_transfers(begins: str, transfers: str) -> None:
    (row,) = rows("transfers-h100x2-2026-11-27.csv", transfers=transfers, layers="12")
    seconds, waits = float(row["step_seconds"]), 100 * float(row["ring_exposed_fraction"])
    assert line("docs/experiments/rings.md", begins).endswith(f"| {seconds:.3f} | {waits:.2f} % |")


STUDY = "study-extend-h100-2026-11-27-{}.csv"


@pytest.mark.parametrize(
    ("begins", "model"),
    [
        ("`recommended`, seed 0", "recommended-0"),
        ("`recommended`, seed 1", "recommended-1"),
        ("`coverage`", "coverage-0"),
        ("`widen`", "widen-0"),
        ("`dense-every` (every fourth step)", "dense-every-0"),
        ("`dense-first`", "dense-first-0"),
        ("`paper-scaled`", "paper-scaled-0"),
        ("`paper-95`", "paper-95-0"),
        ("`paper-90`", "paper-90-0"),
        ("`frozen`", "frozen-0"),
        ("`xattention`", "xattention-0"),
        ("`moba`", "moba-0"),
    ],
)
def test_held_out_losses_of_the_study(begins: str, model: str) -> None:
    """Percent above dense training with the same seed."""
    (bar,) = rows(STUDY.format("bar"), model=model, read="dense")
    begins += f" | {100 * float(bar['density']):.1f} %"
    _, _, _, time, everywhere, worst, sparsely, _ = line("docs/study.md", begins).split("|")
    assert time.split()[0] == f"{float(bar['time']):.2f}"
    low, high = (f"{float(bar[name]):.2f}" for name in ("worst_low", "worst_high"))
    assert worst.strip() == f"{float(bar['worst']):+.2f} ({low} to {high})"

    def above(read: str) -> list[float]:
        chosen = {
            "model": model,
            "read": read,
            "measure": "held-out loss",
            "at": "all",
            "question": "to dense training",
            "against": f"dense-{model[-1]}",
            "against_read": "dense",
        }
        (row,) = rows(STUDY.format("compared"), **chosen)
        return [100 * float(row[name]) / float(row["other"]) for name in ("difference", "low", "high")]

    difference, low_all, high_all = above("dense")
    assert everywhere.strip() == f"{difference:+.2f} ({low_all:.2f} to {high_all:.2f})"
    read = "own" if "own pattern" in sparsely else "sparse"
    assert sparsely.split()[0] == f"{above(read)[0]:+.2f}"


@pytest.mark.parametrize(
    ("begins", "task", "length"),
    [
        ("a needle of numbers, 8K", "needle_numbers", 8192),
        ("niah_single_1, 8K", "niah_single_1", 8192),
        ("niah_single_1, 32K", "niah_single_1", 32768),
        ("niah_single_1, 64K", "niah_single_1", 65536),
        ("niah_multikey_1, 8K", "niah_multikey_1", 8192),
    ],
)
def test_tasks_of_the_study(begins: str, task: str, length: int) -> None:
    cells = [cell.strip() for cell in line("docs/study.md", f"{begins} |").split("|")[2:-1]]
    for cell, (read, arm) in zip(cells, product(("dense", "sparse"), ("dense", "recommended")), strict=True):
        for shown, seed in zip(cell.split(", "), (0, 1), strict=True):
            chosen = {"model": f"{arm}-{seed}", "read": read, "task": task, "length": str(length)}
            if shown != "-":
                (row,) = rows(STUDY.format("tasks"), **chosen)
                assert shown == f"{float(row['score']):.0f}", (arm, seed, read)


LEARN = "study-learn-h100-2026-11-27-{}.csv"


@pytest.mark.parametrize(
    ("begins", "arm", "seeds"),
    [
        ("`dense`, four seeds | 100 %", "dense", 4),
        ("`recommended`, five seeds | 7", "recommended", 5),
        ("`coverage` (every distance within 16 steps)", "coverage", 4),
        ("`dense-every` (every fourth step), three seeds | 30", "dense-every", 3),
        ("`wide`", "wide", 1),
        ("`dense-layer` (the first of two)", "dense-layer", 3),
        ("`frozen`, two seeds", "frozen", 2),
        ("`dense-first` (the first fifth)", "dense-first", 1),
        ("`widen` | 24", "widen", 1),
        ("`window` | 14", "window", 1),
    ],
)
def test_answers_that_were_learned(begins: str, arm: str, seeds: int) -> None:
    """Of all distances together, by seed."""
    _, _, density, read_densely, own, half, nine, _ = line("docs/study.md", begins).split("|")
    shares, last = [], {"dense": [], "own": []}
    steps: dict[int, list[str]] = {50: [], 90: []}
    for seed in range(seeds):
        (row,) = rows(LEARN.format("arms"), arm=arm, seed=str(seed))
        shares.append(100 * float(row["density"]))
        given: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for found in rows(LEARN.format("answers"), model=f"{arm}-{seed}"):
            place = (found["read"], int(found["step"]))
            given.setdefault(place, []).append((float(found["answers"]), float(found["given"])))
        share = {
            place: sum(count * part for count, part in parts) / sum(count for count, _ in parts)
            for place, parts in given.items()
        }
        for read in last:
            last[read] += [f"{share[read, 1500]:.0f}"] if (read, 1500) in share else []
        for bound, first in steps.items():
            reached = [step for (_, step), part in share.items() if part >= bound]
            first.append(str(min(reached)) if reached else "never")
    assert re.findall(r"\d+", density)[:1] == [f"{min(shares):.0f}"]
    assert re.findall(r"\d+", density)[-1:] == [f"{max(shares):.0f}"]
    assert re.findall(r"\d+", read_densely) == last["dense"]
    assert re.findall(r"\d+", own) == (last["own"] if arm != "dense" else [])
    for cell, first in ((half, steps[50]), (nine, steps[90])):
        shown = re.findall(r"\d+|never", cell)
        assert shown == (first if len(shown) > 1 else first[:1]) and set(first[len(shown) :]) <= {shown[-1]}


@pytest.mark.parametrize(
    ("begins", "arm"),
    [
        ("2e-4, YaRN", "dense"),
        ("1e-4", "rate-1e-4"),
        ("4e-4", "rate-4e-4"),
        ("8e-4", "rate-8e-4"),
        ("linear interpolation", "linear"),
    ],
)
def test_the_pilot_of_the_study(begins: str, arm: str) -> None:
    _, _, *losses, above, _ = line("docs/study.md", begins).split("|")
    table = "study-pilot-h100-2026-11-27-held-out.csv"
    found = rows(table, arm=arm, **{"from": "all"})
    assert [row["documents"] for row in found] == ["6"] * len(found)
    expected = {row["step"]: f"{float(row['loss']):.3f}" for row in found}
    assert [cell.strip() for cell in losses] == [expected.get(step, "-") for step in ("0", "6", "12", "18")]
    if arm == "dense":
        assert above.strip() == "-"
        earlier, later = (float(row["loss"]) for row in found[-2:])
        page = (ROOT / "docs/study.md").read_text()
        assert f"The next six lower the loss by another {100 * (1 - later / earlier):.1f} %." in page
        return
    last = found[-1]
    (dense,) = rows(table, arm="dense", step=last["step"], **{"from": "all"})
    difference, low, high = (
        100 * float(last[name]) / float(dense["loss"]) for name in ("difference", "low", "high")
    )
    assert above.strip() == f"{difference:+.2f} ({low:.2f} to {high:.2f})"


TELEMETRY = "telemetry-cost-h100-80gb-hbm3-2026-11-27.csv"


@pytest.mark.parametrize(
    ("begins", "item", "digits"),
    [
        ("`density`", "density and imbalance", 0),
        ("`recall`", "recall (log.recall_rows=128)", 0),
        ("`layer_stability`", "index stability", 1),
        ("`uncovered`", "coverage reported", 0),
        ("`uncovered_by_distance`", "coverage counted", 1),
        ("`ring_exposed_fraction`", "waits of the ring", 0),
        ("`grad_norm`", "gradient norm by layer", 0),
        ("`memory_shortages`", "memory shortages", 0),
    ],
)
def test_cost_of_telemetry(begins: str, item: str, digits: int) -> None:
    (row,) = rows(TELEMETRY, item=item)
    cost = line("docs/see.md", begins).split("|")[3]
    assert re.match(rf" {float(row['added_ms']):.{digits}f} ms\b", cost), (cost, row)


def test_cost_of_all_telemetry() -> None:
    def cost(item: str, name: str) -> float:
        (row,) = rows(TELEMETRY, item=item)
        return float(row[name])

    said = " ".join((ROOT / "docs/see.md").read_text().split())
    mean, logged = "defaults, mean of all steps", "a logged step, defaults"
    assert f"{cost('load of ranks (balance.json)', 'added_ms'):.0f} ms with `balance.json`" in said
    assert f"A step takes {cost('none', 'step_ms'):,.0f} ms without telemetry" in said
    assert f"The defaults add {cost(mean, 'added_ms'):.0f} ms to it, the mean of all steps: " in said
    assert f"{100 * cost(mean, 'share_of_step'):.2f} % by the median" in said
    every, once = cost("coverage counted", "noise_ms"), cost(logged, "noise_ms")
    assert (
        f"The noise is {every:.1f} ms for what every step counts, and {once:.0f} ms for a logged step" in said
    )
    both = every + once / 10
    assert f"Together that is {both:.1f} ms, or {100 * both / cost('none', 'step_ms'):.2f} %" in said
    assert cost(mean, "added_ms") + both < 0.01 * cost("none", "step_ms")
    assert f"The defaults together add {cost(logged, 'added_ms'):.0f} ms to a logged step" in said
    below = {
        row["item"]: f"{float(row['noise_ms']):.0f} ms"
        for row in rows(TELEMETRY)[1:]
        if float(row["added_ms"]) < float(row["noise_ms"])
    }
    assert list(below) == ["gradient norm by layer", "memory shortages"]
    norm, shortages = below.values()
    assert f"below their noise: the gradient norm's ({norm}) and the shortages' ({shortages})." in said


def test_losses() -> None:
    found = rows("loss-parity-h200x2-2026-11-23.csv")
    page = "docs/performance/loss-parity.md"
    for begins, column in (("one GPU", "loss_one"), ("two GPUs", "loss_many")):
        first, last = (f"{float(row[column]):.4f}" for row in (found[0], found[-1]))
        assert line(page, begins) == f"| {begins} | {first} | {last} |"
    assert (
        f"{max(float(row['relative']) for row in found):.1e}".replace("e-0", "e-")
        in (ROOT / page).read_text()
    )


@pytest.mark.parametrize(
    ("option", "machine"),
    [
        ("train.optimizer_state=8bit", "cpu"),
        ("train.float8=emulated", "cpu"),
        ("train.optimizer_state=8bit", "h100"),
        ("train.float8=rowwise", "h100"),
        ("train.optimizer_state=offload", "later"),
        ("train.float8=rowwise", "later"),
    ],
)
def test_losses_with_an_option(option: str, machine: str) -> None:
    name = "h100-2026-11-28" if machine == "later" else f"{machine}-2026-11-27"
    found = rows(f"option-parity-{name}.csv", option=option)
    last = found[-(len(found) // 10) :]
    ends = [sum(float(row[f"loss_{which}"]) for row in last) / len(last) for which in ("without", "with")]
    most = max(float(row["relative"]) for row in found)
    words = {"h100": ", H100", "cpu": "", "later": ", H100" + ", longer" * ("float8" in option)}
    begins = f"`{option.replace('=', ': ')}`" + words[machine]
    assert line("docs/performance/float8-and-moments.md", f"{begins} |") == (
        f"| {begins} | {len(found)} | {ends[0]:.4f} | {ends[1]:.4f} | {100 * abs(ends[1] / ends[0] - 1):.2f} % | "
        f"{100 * most:.1f} % |"
    )


@pytest.mark.parametrize("option", ["train.optimizer_state=8bit", "train.float8=rowwise"])
def test_what_an_option_takes(option: str) -> None:
    """Medians of steps after the first tenth, which compile; and PyTorch's peak."""
    found = rows("option-parity-h100-2026-11-27.csv", option=option)
    usual = found[len(found) // 10 :]
    cells = []
    for which in ("without", "with"):
        cells.append(f"{median(float(row[f'seconds_{which}']) for row in usual):.2f}")
        cells.append(f"{float(found[-1][f'memory_{which}']) / 2**30:.2f}")
    begins = f"`{option.replace('=', ': ')}`, one step"
    assert line("docs/performance/float8-and-moments.md", begins) == f"| {begins} | {' | '.join(cells)} |"


@pytest.mark.parametrize("step", ["1", "40", "80", "120", "160"])
def test_losses_with_either_kind_of_scale(step: str) -> None:
    (rowwise,) = rows("option-parity-h100-2026-11-28.csv", option="train.float8=rowwise", step=step)
    (tensorwise,) = rows("option-parity-h100-2026-11-28-tensorwise.csv", step=step)
    losses = (rowwise["loss_without"], rowwise["loss_with"], tensorwise["loss_with"])
    assert line("docs/performance/float8-and-moments.md", f"{step} |") == (
        f"| {step} | {' | '.join(f'{float(loss):.4f}' for loss in losses)} |"
    )


@pytest.mark.parametrize(
    "shape",
    ["2048x2048", "2048x11008", "11008x2048", "4096x14336", "14336x4096", "8192x28672", "28672x8192"],
)
def test_linear_layers_in_float8(shape: str) -> None:
    inside, outside = shape.split("x")
    day = 27 if shape == "2048x2048" else 28
    found = rows(f"float8-layers-h100-2026-11-{day}.csv", in_features=inside, out_features=outside)
    forms = {row["form"]: row for row in found}
    both = [
        f"{float(forms[name]['both_ms']):.2f} ({float(forms[name]['product_ms']):.2f})"
        for name in ("bf16", "rowwise", "tensorwise")
    ]
    gains = [f"{float(forms[name]['against_bf16']):.2f}" for name in ("rowwise", "tensorwise")]
    assert line("docs/performance/float8-and-moments.md", f"{inside} to {outside} |") == (
        f"| {inside} to {outside} | {' | '.join(both + gains)} |"
    )


@pytest.mark.parametrize(
    ("begins", "pattern"),
    [
        ("`vertical_slash`, the recipes", "vertical_slash, spread 256, block (the recipes)"),
        ("`xattention`, stride 16", "xattention"),
        ("`xattention`, stride of a block", "xattention, stride of a block"),
        ("`xattention`, refine 4", "xattention, refine 4"),
        ("`flexprefill`, pooled", "flexprefill"),
        ("`flexprefill`, refine 4", "flexprefill, refine 4"),
    ],
)
def test_estimates_below_the_square(begins: str, pattern: str) -> None:
    cells = []
    for tokens in ("131072", "524288"):
        chosen = {"pattern": pattern, "tokens": tokens, "phase": "estimate"}
        (row,) = rows("estimate-cost-h100-2026-11-27.csv", **chosen)
        cells += [f"{float(row['ms']):.1f}", f"{float(row['mib']):,.0f} MiB"]
    assert line("docs/performance/estimation.md", begins) == f"| {begins} | {' | '.join(cells)} |"


@pytest.mark.parametrize("corpus", ["books", "code-by-file", "code-by-package", "conversations", "all"])
@pytest.mark.parametrize(("tokens", "seq_len"), [("8K", "8192"), ("128K", "131072")])
def test_padding_of_packed_sequences(corpus: str, tokens: str, seq_len: str) -> None:
    shown = []
    for align, look_ahead in (("1", "1"), ("1", "1024"), ("64", "1024"), ("128", "1024")):
        chosen = {"corpus": corpus, "seq_len": seq_len, "align": align, "look_ahead": look_ahead}
        (row,) = rows("packing-padding-2026-11-27.csv", **chosen)
        shown.append(f"{100 * float(row['padding']):.1f} %")
    begins = f"{corpus.replace('-', ' ')} | {tokens}"
    assert line("docs/performance/packing.md", begins) == f"| {begins} | {' | '.join(shown)} |"


def test_commits_that_pages_name_are_in_the_results() -> None:
    """Those of the campaigns: each table's rows are in a file."""
    known = set()
    for path in RESULTS.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            known |= {row["commit"][:7] for row in csv.DictReader(file)}
    said = {
        commit
        for page in PAGES
        if page.parent.name == "performance"
        for commit in re.findall(r"commit ([0-9a-f]{7})\b", prose(page.read_text()))
    }
    assert len(said) > 5 and said <= known


@pytest.mark.parametrize("pattern", ["vertical_slash", "dense"])
@pytest.mark.parametrize("mix", ["one document", "books", "code", "conversations"])
def test_balance_of_packed_documents(pattern: str, mix: str) -> None:
    said = line("docs/performance/balance.md", f"`{pattern}`, {mix}").replace("*", "")
    for layout in ("zigzag", "striped", "contiguous"):
        chosen = {"pattern": pattern, "mix": mix, "layout": layout, "ranks": "32"}
        (row,) = rows("packed-balance.csv", **chosen)
        assert f"| {float(row['worker']):.2f} ({float(row['total']):.2f}) |" in said
        assert f"| {row['documents']} |" in said
