"""One call makes a transformers model train on laid-out shards: attention, recompute, FSDP2, chunked loss.

The model itself is not edited: its config names our attention, each attention module gets its runtime, each
decoder layer's forward is wrapped for recompute, and FSDP2 shards its parameters over all ranks (dp x cp).
Parameter names stay the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mtraining.errors import UserError
from mtraining.kernel import check_starts_kernel, select_backend
from mtraining.kernel.starts import check_starts
from mtraining.layout import Layout, build_layout
from mtraining.model.adapters import Adapter, open_adapter
from mtraining.model.allocator import use_expandable_segments
from mtraining.model.anneal import Anneal
from mtraining.model.attention import ATTENTION_NAME, attach, refuse_mask
from mtraining.model.float8 import use_float8
from mtraining.model.float8_checks import Float8, check_float8, check_gpu
from mtraining.model.fused import fuse
from mtraining.model.indices import IndexMemory, Refresh
from mtraining.model.logits import Head, LogitForm
from mtraining.model.loss import (
    chunked_cross_entropy,
    chunked_token_losses,
    labels_sentence,
    unknown_labels,
)
from mtraining.model.positions import PositionCheck
from mtraining.model.products import MLP, PROJECTIONS
from mtraining.model.recompute import LayerPolicy, layer_policies, recompute_layers
from mtraining.model.reduction import ReduceIntoFreed
from mtraining.model.support import (
    attention_modules,
    check_supported,
    decoder_of,
    fields_of,
    head_dim_of,
    layers_of,
)
from mtraining.model.weights import settle_tied
from mtraining.model.windows import band, bind_window, in_words, windows_of
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring import AttentionRuntime, BatchStarts, Ring

_CP_NAMES = (("cp",), ("cp_outer", "cp_inner"))


class ParallelLM(nn.Module):
    """A causal language model whose forward takes this rank's tokens and returns this rank's share of the loss.

    Made by `parallelize`. ``hf_model`` is the transformers model; under FSDP its parameters are DTensors.

    Attributes:
        layout: who holds which tokens.
        cp_mesh: the context-parallel mesh (1-D or 2-D), None when one rank holds the whole sequence.
        fsdp_mesh: the 1-D mesh over which parameters are sharded, None without FSDP.
        indices: the attention indices over the steps of training.
        positions: the check that tokens stand where the layout deals them.
        adapter: the low-rank adapter in ``hf_model``, None where all weights are trained.
        policies: what each layer keeps between forward and backward.
        float8: a sentence for the log about which linear layers compute in float8; empty where none does.
    """

    def __init__(
        self,
        hf_model: Any,
        layout: Layout,
        loss_chunk: int,
        cp_mesh: DeviceMesh | None,
        fsdp_mesh: DeviceMesh | None,
        indices: IndexMemory,
        positions: PositionCheck,
        starts: BatchStarts,
        compiled_loss: bool = False,
        adapter: Adapter | None = None,
        policies: Sequence[LayerPolicy] = (),
        float8: str = "",
    ) -> None:
        super().__init__()
        self.hf_model = hf_model
        self.layout = layout
        self.loss_chunk = loss_chunk
        self.cp_mesh = cp_mesh
        self.fsdp_mesh = fsdp_mesh
        self.indices = indices
        self.positions = positions
        self._starts = starts
        self.adapter = adapter
        self.policies = policies
        self.float8 = float8
        self.compiled_loss = compiled_loss
        self._logit_form = LogitForm.of_fields(fields_of(hf_model.config))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        num_labels: int | Tensor,
        starts: Tensor | None = None,
    ) -> Tensor:
        """This rank's share of the mean loss: the sum of its token losses over the global number of labels.

        The shares of all ranks sum to the mean loss, and gradients reduce by summing: after backward each holds the
        gradient of the global mean, whatever the label mask and however the tokens were dealt.

        Args:
            input_ids, position_ids, labels: (batch, local tokens) int64, laid out; labels already shifted,
                -100 ignored.
            num_labels: labels that are not -100 over all ranks; an int or a 0-d tensor.
            starts: of packed documents: int32 (batch, tokens of the whole sequence), in global order and the same on
                every context-parallel rank. The first position of each token's document. No document sees another, and
                position_ids begin at 0 in each. None: a sequence is one document.

        Returns:
            Scalar, fp32 (fp64 for an fp64 model). NaN, with its gradients, where position ids or labels on a GPU are
            wrong; `refuse_inputs` then says what is.

        Raises:
            UserError: position ids that the layout does not deal to this rank, starts that are none, or labels outside
                of the vocabulary, on a CPU; a step that is not told where one matters.
        """
        if self.indices.steps_matter and torch.is_grad_enabled() and not self.indices.in_step:
            raise UserError(
                "pattern.refresh, coverage and anneal depend on the step; run forward and backward inside "
                "`with model.training_step(step):`, steps counted from 1."
            )
        hidden = self._run_layers(input_ids, position_ids, starts)
        weight, bias, form = self._head()
        return chunked_cross_entropy(
            hidden, weight, labels, num_labels, self.loss_chunk, self.compiled_loss, bias=bias, form=form
        )

    def training_step(self, step: int) -> AbstractContextManager[None]:
        """Around all forwards and backwards of optimizer step ``step`` (from 1), when indices are held, covered or
        counted over steps; outside of it, as in evaluation, every forward estimates anew. Collective."""
        return self.indices.training_step(step)

    def refuse_inputs(self, position_ids: Tensor, labels: Tensor, starts: Tensor | None = None) -> None:
        """Look at what `forward` was given, for the cause of a loss that is NaN. Waits for the device.

        Raises:
            UserError: position ids, starts or labels that are wrong, naming one.
        """
        with self._documents(starts):
            self.positions.refuse(position_ids)
        words = self.hf_model.get_output_embeddings().weight.shape[0]
        unknown = labels[unknown_labels(labels, words)]
        if unknown.numel():
            raise UserError(labels_sentence(unknown.numel(), words, int(unknown[0])))

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, starts: Tensor | None = None
    ) -> Tensor:
        """The loss of each local token, (batch, local tokens) fp32, 0 where ignored. Collective, no gradient, no
        dropout. Arguments are those of `forward`."""
        with self._measuring():
            hidden = self._run_layers(input_ids, position_ids, starts)
        return chunked_token_losses(hidden, self._head(), labels, self.loss_chunk)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor | None = None) -> Tensor:
        """The decoder's output for the local tokens, (batch, local tokens, hidden size). Collective, no gradient, no
        dropout. Arguments are those of `forward`."""
        with self._measuring():
            return self._run_layers(input_ids, position_ids, starts)

    @torch.no_grad()
    def read_out(
        self, input_ids: Tensor, position_ids: Tensor, read: Callable[[Tensor, Head], Tensor]
    ) -> Tensor:
        """What ``read`` makes of the decoder's output and the head. Collective, no gradient, no dropout.

        Both are whole inside ``read``, under FSDP too. Tokens are taken as they are given, at any positions: it is
        the attention's runtime that knows which they are.

        Args:
            input_ids, position_ids: (batch, local tokens) int64.
            read: from hidden states (batch, local tokens, hidden size) and the head.
        """
        with self.positions.lifted(), self._measuring():
            hidden = self._run_layers(input_ids, position_ids)
        return read(hidden, self._head())

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Without dropout: in evaluation mode, and then in training mode again if that was on."""
        if not self.training:
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()

    def _run_layers(self, input_ids: Tensor, position_ids: Tensor, starts: Tensor | None = None) -> Tensor:
        if starts is not None:
            batch, local = input_ids.shape
            check_starts(starts, batch, local * Ring.over(self.cp_mesh).world, input_ids.device)
        with self._documents(starts):
            output = decoder_of(self.hf_model)(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            )
        return output.last_hidden_state

    @contextmanager
    def _documents(self, starts: Tensor | None) -> Iterator[None]:
        """Within, attention and the check of positions know these starts. Backward finds them in each call's index."""
        self._starts.value = starts
        try:
            yield
        finally:
            self._starts.value = None

    def _head(self) -> Head:
        head = self.hf_model.get_output_embeddings()
        return Head(head.weight, head.bias, self._logit_form)


def parallelize(
    model: Any,
    mesh: DeviceMesh | None = None,
    *,
    pattern: Pattern | str = "vertical_slash",
    layout: Layout | str = "striped",
    kernel: str = "auto",
    recompute: Literal["full", "keep_attention", "none"] | Sequence[LayerPolicy] = "full",
    offload: bool = False,
    fused: Literal["none", "compile", "liger"] = "none",
    float8: Float8 = "off",
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    loss_chunk: int = 8192,
    fsdp: bool = True,
    layer_patterns: Mapping[int, Pattern | str] | None = None,
    refresh: Refresh | str | Mapping[Any, int] = "every_step",
    coverage: int = 0,
    anneal: Anneal | None = None,
) -> ParallelLM:
    """Prepare a transformers causal language model for training on context-parallel shards, in training mode.

    Args:
        model: the model, or a ``peft.PeftModel`` with one LoRA adapter, with the same weights on every rank; on CPU,
            FSDP moves it to the mesh's device shard by shard.
        mesh: dims named from {"dp"} and {"cp"} or {"cp_outer", "cp_inner"}; None for one process.
        pattern: what attention computes; an object or a name of `mtraining.pattern.PATTERNS` (with its defaults).
            Layers with a sliding window or chunks in the model's config compute that, and all of it, instead.
        layout: who holds which tokens; an object or a name.
        kernel: backend of the attention kernels.
        recompute: ``full`` recomputes each layer in backward from its input, with the attention index of the
            first pass; ``keep_attention`` also keeps each layer's attention output, so attention runs once;
            ``none`` keeps everything. Or one policy for each layer, such as
            `mtraining.predict.recompute.choose_policies` finds; they say what is offloaded too.
        offload: what recompute keeps waits in pinned host memory; on a CPU it stays where it is.
        fused: how what surrounds attention is computed: ``none`` is transformers' own eager code, ``compile`` is
            torch.compile of each layer (shapes are fixed: each new length compiles anew), ``liger`` is liger-kernel;
            with either, the softmax of the loss is compiled.
        float8: products of the linear layers of decoder layers in float8 (torchao, on GPUs of compute capability 8.9
            or newer): ``rowwise`` has a scale for each row of an operand, ``tensorwise`` one for each operand, which
            is faster and rounds more. ``emulated`` and ``emulated_tensorwise`` have the same roundings on any device,
            slowly.
        param_dtype: dtype to compute in, when it differs from the parameters' own (needs FSDP).
        reduce_dtype: dtype in which gradients are summed over ranks; None is the compute dtype.
        loss_chunk: tokens whose logits exist at one time.
        fsdp: False keeps whole parameters on every rank and leaves gradients the local share (for evaluation).
        layer_patterns: other patterns for some layers, by index; of layers without a window.
        refresh: when indices are estimated: ``every_step`` (the paper), ``{"every_n": k}``, or ``{"frozen_at": step}``.
            Anything but the first needs ``model.training_step`` around each step.
        coverage: extra block diagonals, so that every distance receives gradient within this many steps; 0 for none.
        anneal: which steps are dense, and how budgets shrink over steps; needs ``model.training_step`` too.

    Raises:
        UserError: a model, mesh or option that would not be computed as asked.

    On an NVIDIA GPU that nothing has used yet, PyTorch's allocator is set to expandable segments, unless the
    environment says otherwise. `use_expandable_segments` does the same before a model is put on a GPU.
    """
    model, adapter = open_adapter(model)
    check_supported(model)
    settle_tied(model)
    if model.config._attn_implementation == ATTENTION_NAME:
        raise UserError("model: this model was already given to parallelize; build a fresh one.")
    if adapter is not None and fused == "compile":
        raise UserError(
            "train.fused=compile cannot serve the adapter layers of peft; use train.fused=liger or train.fused=none."
        )
    if loss_chunk < 1:
        raise UserError(f"loss_chunk={loss_chunk} must be at least 1 token.")
    cp_mesh = None if mesh is None else _context_mesh(mesh)
    fsdp_mesh = _flat_mesh(mesh) if mesh is not None and fsdp else None
    own_dtype = _own_dtype(model)
    if adapter is not None:
        param_dtype = param_dtype or own_dtype  # what is trained may be stored more finely than the rest
    if fsdp_mesh is None and (param_dtype not in (None, own_dtype) or _trained_finer(model, own_dtype)):
        raise UserError(
            f"param_dtype={param_dtype} differs from the parameters' {own_dtype}, which needs FSDP; give a "
            f"mesh (of one "
            f"process is enough) or load the model in {param_dtype}."
        )
    device = torch.device(mesh.device_type) if mesh is not None else next(model.parameters()).device
    check_float8(float8, device.type, param_dtype or own_dtype, adapter is not None)
    if device.type == "cuda":
        logging.getLogger("mtraining").info(use_expandable_segments())
        check_gpu(float8, device)
    if device.type != "meta":  # a dry check has no kernel to choose
        select_backend(kernel, device, param_dtype or own_dtype, head_dim_of(model.config))

    layout = build_layout(layout) if isinstance(layout, str) else layout
    dp_mesh = mesh["dp"] if mesh is not None and "dp" in (mesh.mesh_dim_names or ()) else None
    replicas = dp_mesh if dp_mesh is not None and dp_mesh.size() > 1 else None
    indices = IndexMemory(Refresh.parse(refresh), coverage, replicas, cp_mesh, anneal)
    starts = BatchStarts()
    _set_attention(model, pattern, layer_patterns or {}, layout, cp_mesh, kernel, indices, starts)
    converted = use_float8(model, float8, device, fused == "compile") if float8 != "off" else ""
    fuse(model, fused, device)
    policies = layer_policies(recompute, offload, len(layers_of(model)))
    if float8 != "off" and any(policy.parts & {PROJECTIONS, MLP} for policy in policies):
        raise UserError(
            f"train.float8={float8} does not go with layers that keep single products; let them keep attention's "
            "outputs or everything."
        )
    recompute_layers(model, policies, device, fused)
    positions = PositionCheck(layout, cp_mesh, starts)
    positions.attach(decoder_of(model))
    wrapped = ParallelLM(
        model,
        layout,
        loss_chunk,
        cp_mesh,
        fsdp_mesh,
        indices,
        positions,
        starts,
        compiled_loss=fused != "none",
        adapter=adapter,
        policies=policies,
        float8=converted,
    )
    if fsdp_mesh is not None:
        _shard(wrapped, fsdp_mesh, param_dtype, reduce_dtype)
    return wrapped.train()


def _set_attention(
    model: Any,
    pattern: Pattern | str,
    layer_patterns: Mapping[int, Pattern | str],
    layout: Layout,
    cp_mesh: DeviceMesh | None,
    kernel: str,
    indices: IndexMemory,
    starts: BatchStarts,
) -> None:
    """Name our attention in the config and hang each layer's runtime on its attention module."""
    layers = len(layers_of(model))
    for index in layer_patterns:
        if not 0 <= index < layers:
            raise UserError(
                f"layer_patterns: layer {index} does not exist; the model has layers 0 to {layers - 1}."
            )

    def built(choice: Pattern | str) -> Pattern:
        return build_pattern(choice) if isinstance(choice, str) else choice

    default = built(pattern)
    patterns = [
        built(layer_patterns[index]) if index in layer_patterns else default for index in range(layers)
    ]
    windows = windows_of(model.config, layers)
    if any(window is not None for window in windows):
        check_starts_kernel(kernel)
    for index, module in attention_modules(model):
        window = windows[index]
        if window is None:
            patterns[index].check_heads(index, model.config.num_attention_heads)
            wrapped = indices.wrap(index, patterns[index])
        elif index in layer_patterns and patterns[index] != band(window, patterns[index].block_size):
            raise UserError(
                f"layer_patterns: layer {index} has {in_words(window)} in model.config, so no pattern chooses what it "
                "attends to; leave the layer out of layer_patterns and pattern.dense_layers."
            )
        else:
            # Nothing of it is held or counted over steps: it is the same in each.
            wrapped = band(window, patterns[index].block_size)
        bind_window(module, window)
        attach(module, AttentionRuntime(wrapped, layout, cp_mesh, kernel, window, starts))
    decoder_of(model).register_forward_pre_hook(refuse_mask, with_kwargs=True)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise UserError(
            f"model: {model.config.model_type} does not let its attention be chosen; use a model on transformers' "
            f"attention interface."
        )


def _own_dtype(model: Any) -> torch.dtype:
    """Of the weights under an adapter, or of all."""
    parameters = list(model.parameters())
    return next((p for p in parameters if not p.requires_grad), parameters[0]).dtype


def _trained_finer(model: Any, dtype: torch.dtype) -> bool:
    """Whether modules that are trained whole have another dtype. Adapter layers cast what they are given."""
    return any(p.dtype != dtype for name, p in model.named_parameters() if ".lora_" not in name)


def _context_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The context-parallel part of ``mesh``, None when it has a single rank."""
    names = mesh.mesh_dim_names or ()
    cp_names = tuple(name for name in names if name != "dp")
    if names[:1] == ("dp",) and not cp_names:
        return None
    if not names or cp_names not in _CP_NAMES or names not in (cp_names, ("dp", *cp_names)):
        raise UserError(
            f"mesh: dimensions {names or 'without names'} are not known; name them 'dp' then 'cp', or 'dp' then "
            f"'cp_outer', 'cp_inner' (any part may be left out)."
        )
    cp_mesh = mesh if names == cp_names else mesh[cp_names]
    return cp_mesh if cp_mesh.size() > 1 else None


def _flat_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of ``mesh`` in one dimension, as FSDP2 shards over one."""
    return mesh if mesh.ndim == 1 else mesh._flatten()


def _no_view(_: nn.Module, args: Any, output: Any) -> Any:
    """A layer's output as a tensor of its own: FSDP2 hangs the layer's backward on it, and an in-place operation on a
    view, as some layers (OPT's) return, would lose that."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _shard(
    wrapped: ParallelLM, mesh: DeviceMesh, param_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None
) -> None:
    """FSDP2: one unit per decoder layer, one for untied input embeddings, the root for the rest.

    Inputs are never cast: the only floating ones come from layers that already compute in ``param_dtype``.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    embeddings = wrapped.hf_model.get_input_embeddings()
    for layer in layers_of(wrapped.hf_model):
        layer.register_forward_hook(_no_view)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if embeddings.weight is not wrapped.hf_model.get_output_embeddings().weight:
        fully_shard(embeddings, mesh=mesh, mp_policy=policy)
    fully_shard(wrapped, mesh=mesh, mp_policy=policy)
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            # The loss already divides by the global count: gradients sum. Plain SUM, since gloo has no scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(ReduceIntoFreed())
    register_fsdp_forward_method(wrapped, "token_losses")
    register_fsdp_forward_method(wrapped, "hidden_states")
    register_fsdp_forward_method(wrapped, "read_out")
