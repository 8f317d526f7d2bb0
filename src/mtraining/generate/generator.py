"""Reading prompts of any length on the ring, and answering them; read this file first.

Everything here is collective over the ranks of the model's ring (under FSDP, over all ranks that share parameters):
each calls with the same arguments, and each gets the same answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.generate.answer import Answer, FinishReason
from mtraining.generate.cache import Attention, Cache, Dealt, Reading, attached
from mtraining.generate.sampling import Chooser
from mtraining.kernel import Window
from mtraining.layout import Layout, build_layout
from mtraining.model import ParallelLM, parallelize
from mtraining.model.fixed_rope import rope_fixed
from mtraining.model.logits import Head
from mtraining.model.loss import IGNORED, chunked_token_scores
from mtraining.model.support import attention_modules
from mtraining.model.windows import band
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring import Observer, chosen

Patterns = Pattern | str | Sequence[Pattern]


@dataclass(frozen=True)
class Generation:
    """One prompt's answer.

    Attributes:
        tokens: new tokens, the one that ended the answer included.
        text: of the answer, without special tokens, and up to the first stop string; None without a tokenizer.
        finish_reason: ``eos``, ``stop`` (a stop string) or ``length`` (no token was left).
        prompt_tokens: in the prompt, padding not counted.
        prefill_seconds: to read this prompt, up to its last logits.
        decode_seconds: until this answer ended, from when the whole batch was read.
        density: computed share of attention in prefill, mean over layers and heads; None when not measured.
        recall: share of the attention mass that the pattern kept in prefill, likewise; None when not measured.
        logits: (new tokens, vocabulary) that each token was chosen from, on the CPU; None when not asked for.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    density: float | None = None
    recall: float | None = None
    logits: Tensor | None = None


class Scores(NamedTuple):
    """How well a sequence's tokens were foreseen, (tokens - 1,) each, on the CPU: entry i is of token i + 1.

    nll: negative log-likelihood, natural log, fp32 (fp64 for fp64 models).
    greedy: bool, whether the token is the one that greedy decoding takes.
    """

    nll: Tensor
    greedy: Tensor


class Generator:
    """A model that reads prompts by the ring attention of training and answers them.

    Prompts are padded behind their end to what layout and pattern need. No real token sees the padding, and no
    pattern's estimate does. Prompts of a batch are read one after another, each at its own length, and then answered
    together. With several replicas (dp), every replica is given the same prompts.

    Args:
        model: a transformers causal language model, whole on every rank and on its device; or a :class:`ParallelLM`,
            sharded or not, as it is in training. Of one model, several generators can be made from ``generator.model``.
        tokenizer: for texts and stop strings; None does without.
        mesh: the context-parallel ranks, as `parallelize` takes it; a ``ParallelLM`` has its own.
        pattern: what prefill attends: an object, a name, or one object a layer. None: what the ``ParallelLM`` has, or
            dense. New tokens attend to everything. Layers with a window in the model's config attend to that, whatever
            is given.
        layout: who holds which tokens of a prompt, an object or a name; None: what the ``ParallelLM`` has, or striped.
        kernel: attention backend.
        beyond_positions: also read what is longer than the model's positions, to see what becomes of it.

    Raises:
        UserError: an option that cannot be honoured.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        mesh: DeviceMesh | None = None,
        pattern: Patterns | None = None,
        layout: Layout | str | None = None,
        kernel: str = "auto",
        beyond_positions: bool = False,
    ) -> None:
        own = isinstance(model, ParallelLM)
        if own and mesh is not None:
            raise UserError("mesh: a model from parallelize has its own; leave mesh out.")
        if not own:
            model = parallelize(model, mesh, pattern="dense", recompute="none", fsdp=False, kernel=kernel)
            pattern, layout = pattern or "dense", layout or "striped"
        self.model: ParallelLM = model
        self.tokenizer = tokenizer
        self._config = model.hf_model.config
        self._beyond_positions = beyond_positions
        self.attention = Attention(
            *self._patterns(pattern),
            model.layout if layout is None else build_layout(layout) if isinstance(layout, str) else layout,
            model.cp_mesh,
            kernel,
        )
        self.attention.deal(1)  # refuses stripes that cut blocks

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        eos: Sequence[int] | None = None,
        recall_rows: int | None = None,
        keep_logits: bool = False,
    ) -> list[Generation]:
        """Answer every prompt.

        Args:
            prompts: token ids, of any lengths from 1 on.
            max_new_tokens: that an answer has at most: one number for each prompt, or one for all.
            temperature, top_p: see :class:`mtraining.generate.sampling.Chooser`; greedy by default.
            seed: of the draws: one for each prompt, or one from which prompt i gets ``seed + i``.
            stop: strings that end an answer.
            eos: tokens that end an answer; None: what model and tokenizer name.
            recall_rows: measure density, and with more than 0 rows also recall (it costs synchronisation).
            keep_logits: return the logits of every new token.

        Raises:
            UserError: a prompt that is empty, too long or of another vocabulary; an option out of range.
        """
        limits = self._limits(max_new_tokens, len(prompts))
        if stop and self.tokenizer is None:
            raise UserError("stop: stop strings need a tokenizer; give the generator one, or use eos.")
        if not all(stop):
            raise UserError("stop: an empty string ends every answer at once; leave it out.")
        rows = [self._checked(prompt, row, limits[row]) for row, prompt in enumerate(prompts)]
        if not rows:
            return []
        seeds = [seed + row for row in range(len(rows))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(rows):
            raise UserError(
                f"seed: {len(seeds)} seeds for {len(rows)} prompts; give one each, or one for all."
            )
        ends = self.eos if eos is None else frozenset(eos)
        answers = [Answer(limit, ends, stop, self.tokenizer) for limit in limits]
        chooser = Chooser(temperature, top_p, seeds, max(limits), self._device)
        longest = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
        with self._inference(longest):
            dealt = [self.attention.deal(len(row)) for row in rows]
            cache = Cache(self.attention, dealt, max(limits) - 1, self._device)
            with attached(self.model, cache):
                read = [self._prefill(cache, row, tokens, recall_rows) for row, tokens in enumerate(rows)]
                logits = torch.cat([one.logits for one in read])
                kept, seconds = self._decode(
                    cache, [len(row) for row in rows], logits, chooser, answers, keep_logits
                )
        return [
            Generation(
                tokens=answer.tokens,
                text=answer.text,
                finish_reason=answer.finish_reason or "length",
                prompt_tokens=len(tokens),
                prefill_seconds=one.seconds,
                decode_seconds=seconds[row],
                density=one.density,
                recall=one.recall,
                logits=torch.stack([x[row] for x in kept[: len(answer.tokens)]]).cpu()
                if keep_logits
                else None,
            )
            for row, (tokens, one, answer) in enumerate(zip(rows, read, answers, strict=True))
        ]

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """The logits after the last of ``tokens``: (vocabulary,), fp32 (fp64 for fp64 models), on the device."""
        row = self._checked(tokens, 0, 0)
        dealt = self.attention.deal(len(row))
        with self._inference(len(row)), attached(self.model, Reading(self.attention, dealt)):
            return self._read_prompt(dealt, row)[0]

    def score(self, tokens: Sequence[int]) -> Scores:
        """Every token's negative log-likelihood given those before it, in one forward; for 2 tokens or more."""
        row = self._checked(tokens, 0, 0)
        if len(row) < 2:
            raise UserError("tokens: a single token has nothing before it to be scored by; give at least 2.")
        dealt = self.attention.deal(len(row))
        labels = dealt.take(torch.cat([row[1:], torch.tensor([IGNORED])]), IGNORED).to(self._device)

        def read(hidden: Tensor, head: Head) -> Tensor:
            return chunked_token_scores(hidden, head, labels, self.model.loss_chunk)

        with self._inference(len(row)), attached(self.model, Reading(self.attention, dealt)):
            local = self.model.read_out(*self._inputs(dealt, row), read)[:, 0]  # [2, local tokens]
            shards = list(self.attention.ring.all_gather(local.contiguous()))
        whole = self.attention.layout.unshard(shards)[:, : len(row) - 1].cpu()
        return Scores(whole[0], whole[1] > 0)

    def token_nll(self, tokens: Sequence[int]) -> Tensor:
        """``score(tokens).nll``: (tokens - 1,), for perplexity."""
        return self.score(tokens).nll

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end an answer, by the model's generation config, else its config, and the tokenizer."""
        found: set[int] = set()
        config = getattr(self.model.hf_model, "generation_config", None)
        named = getattr(config, "eos_token_id", None)
        named = getattr(self._config, "eos_token_id", None) if named is None else named
        for ids in (named, getattr(self.tokenizer, "eos_token_id", None)):
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _patterns(self, given: Patterns | None) -> tuple[tuple[Pattern, ...], tuple[Window | None, ...]]:
        """The pattern and the window of every layer."""
        modules: list[Any] = [module for _, module in attention_modules(self.model.hf_model)]
        patterns: list[Any]
        if given is None:
            patterns = [module.mtraining_runtime.pattern for module in modules]
        elif isinstance(given, str):
            patterns = [build_pattern(given)] * len(modules)
        else:
            patterns = [given] * len(modules) if isinstance(given, Pattern) else list(given)
        if len(patterns) != len(modules):
            raise UserError(
                f"pattern: {len(patterns)} patterns for {len(modules)} layers; give one for each layer, or one for all."
            )
        windows = tuple(module.mtraining_window for module in modules)
        for layer, (pattern, window) in enumerate(zip(patterns, windows, strict=True)):
            if window is None:
                pattern.check_heads(layer, self._config.num_attention_heads)
            else:
                patterns[layer] = band(window, pattern.block_size)
        return tuple(patterns), windows

    def _limits(self, given: int | Sequence[int], prompts: int) -> list[int]:
        """New tokens at most of each prompt's answer."""
        limits = [given] * prompts if isinstance(given, int) else list(given)
        if len(limits) != prompts:
            raise UserError(
                f"max_new_tokens: {len(limits)} numbers for {prompts} prompts; give one each, or one for all."
            )
        for limit in limits:
            if limit < 1:
                raise UserError(f"max_new_tokens: {limit} leaves no answer; use at least 1.")
        return limits

    def _checked(self, prompt: Sequence[int], row: int, new_tokens: int) -> Tensor:
        """A prompt as int64 (tokens,) on the CPU."""
        if len(prompt) == 0:
            raise UserError(f"prompts: prompt {row} is empty; give it at least one token.")
        tokens = torch.as_tensor(prompt, dtype=torch.int64)
        vocabulary = self._config.vocab_size
        unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if len(unknown):
            raise UserError(
                f"prompts: prompt {row} has token {int(unknown[0])}, beyond the {vocabulary} of the model; use the "
                "model's own tokenizer."
            )
        covered, needed = self._config.max_position_embeddings, len(tokens) + new_tokens
        if needed > covered and not self._beyond_positions:
            factor = -(-needed * 100 // covered) / 100
            raise UserError(
                f"prompts: the {len(tokens)} tokens of prompt {row} and {new_tokens} new ones are beyond the {covered} "
                f"positions of the model; shorten them, or build the model with rope.type yarn and a rope.factor of at "
                f"least {factor:g}."
            )
        return tokens

    @contextmanager
    def _inference(self, length: int) -> Iterator[None]:
        """No gradient, no dropout, rotary frequencies for ``length`` tokens; all is as it was afterwards."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad(), rope_fixed(self.model.hf_model, length):
                yield
        finally:
            for module in training:
                module.training = True

    def _inputs(self, dealt: Dealt, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's token and position ids, (1, local tokens).

        Padding may stand beyond the model's positions, of which a learned table has no more. It takes the last token's.
        """
        positions = dealt.positions.clamp(max=dealt.length - 1)
        return dealt.take(tokens, 0).to(self._device), positions[None].to(self._device)

    def _read_prompt(self, dealt: Dealt, tokens: Tensor) -> Tensor:
        """(1, vocabulary) logits after the last token, the same on every rank."""
        slot, ring = dealt.slot(dealt.length - 1), self.attention.ring

        def read(hidden: Tensor, head: Head) -> Tensor:
            last = hidden.new_zeros(1, hidden.shape[-1]) if slot is None else hidden[:, slot]
            return head.logits(ring.all_sum(last) if ring.world > 1 else last)

        return self.model.read_out(*self._inputs(dealt, tokens), read)

    def _prefill(self, cache: Cache, row: int, tokens: Tensor, recall_rows: int | None) -> _Read:
        start = time.perf_counter()
        cache.prefill(row)
        # Dense attention needs no look: its density is 1, and looking waits for the device in every layer.
        dense = recall_rows == 0 and all(
            pattern.name == "dense" or window is not None
            for pattern, window in zip(self.attention.patterns, self.attention.windows, strict=True)
        )
        watch = nullcontext() if dense or recall_rows is None else Observer(recall_rows)
        with watch as observer:
            logits = self._read_prompt(cache.dealt[row], tokens)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        seconds = time.perf_counter() - start
        stats = [] if observer is None else chosen(observer.stats)
        recalls = [one.recall for one in stats if one.recall is not None]
        density = 1.0 if dense else _mean([one.density for one in stats])
        return _Read(logits, seconds, density, _mean(recalls))

    def _decode(
        self,
        cache: Cache,
        lengths: list[int],
        logits: Tensor,
        chooser: Chooser,
        answers: list[Answer],
        keep: bool,
    ) -> tuple[list[Tensor], list[float]]:
        """Extend the answers until all have ended; the logits of each step, and the seconds to each answer's end.

        On a GPU the host reads a token only when the next forward is queued behind it, so the GPU never waits for the
        host to look. It costs one forward too many at the end.
        """
        start, kept, seconds = time.perf_counter(), [logits] if keep else [], [0.0] * len(answers)
        positions = torch.tensor(lengths, device=self._device)
        # A row that has ended stays where it is: it must not lead beyond the model's positions.
        final = positions + torch.tensor([answer.limit - 1 for answer in answers], device=self._device)
        limit, ahead = max(answer.limit for answer in answers), _runs_ahead(logits.device)
        token = self._agreed(chooser(logits, 0))
        for step in range(limit):
            coming, following = _Coming(token), None
            for look in (False, True) if ahead else (True, False):
                if look:
                    for row, (answer, value) in enumerate(zip(answers, coming.wait(), strict=True)):
                        if answer.finish_reason is None:
                            answer.take(value)
                            seconds[row] = time.perf_counter() - start
                elif step + 1 < limit and not all(answer.finish_reason for answer in answers):
                    cache.next_token()
                    place = torch.minimum(positions + step, final)[:, None]
                    logits = self.model.read_out(token[:, None], place, _last_logits)
                    kept += [logits] if keep else []
                    following = self._agreed(chooser(logits, step + 1))
            if following is None or all(answer.finish_reason for answer in answers):
                break
            token = following
        return kept, seconds

    def _agreed(self, tokens: Tensor) -> Tensor:
        """The first rank's choice on all of them: two that rounded otherwise must not part ways."""
        if self.model.fsdp_mesh is not None:
            if self.model.fsdp_mesh.size() > 1:
                dist.broadcast(tokens, group=self.model.fsdp_mesh.get_group(), group_src=0)
            return tokens
        ring = self.attention.ring
        return tokens if ring.world == 1 else ring.all_sum(tokens * (ring.rank == 0))


class _Read(NamedTuple):
    """What reading a prompt gave."""

    logits: Tensor
    seconds: float
    density: float | None
    recall: float | None


class _Coming:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tokens

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        values: list[int] = self._host.tolist()
        return values


def _runs_ahead(device: torch.device) -> bool:
    """Whether the host queues a forward before it reads the token that the forward is about."""
    return device.type == "cuda"


def _last_logits(hidden: Tensor, head: Head) -> Tensor:
    return head.logits(hidden[:, -1])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
