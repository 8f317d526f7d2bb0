"""Low-rank adapters of peft: gradients on every grid are peft's own, and what cannot be computed is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_gradients import TOLERANCE, TOPOLOGIES, take
from tiny_models import BLOCK, DENSE, SEQ_LEN, Batch, relative_errors, tiny_batch, tiny_model, tiny_options
from torch import Tensor
from torch.nn.functional import cross_entropy

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import LoraOptions, build_model, export_model, parallelize
from mtraining.model.adapters import open_adapter, trained, transformers_names_allowed
from mtraining.pattern import build_pattern

peft = pytest.importorskip("peft")

WHOLE = {"r": 4, "alpha": 6.0, "also_train": ("embed_tokens", "norm")}
# Of peft alone: what a user's own script may hand over.
OWN: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "loose head": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
}


def own(model: Any, **options: Any) -> Any:
    """A `PeftModel` as scripts make one."""
    untied = pytest.warns(UserWarning, match="ensure_weight_tying")
    with transformers_names_allowed(), untied if "modules_to_save" in options else nullcontext():
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
        )


def adapted(family: str, how: str, dtype: str = "float64") -> Any:
    """A `PeftModel` whose adapters are not zero; the same for every call and on every rank."""
    if how == "options":
        options = tiny_options(family, dtype).model_copy(update={"lora": LoraOptions(**WHOLE)})
        model, _ = build_model(options, SEQ_LEN)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = own(tiny_model(family, dtype), **OWN[how])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    return model


def plain_name(name: str) -> str:
    """A parameter's name in the transformers model, without peft's wrappers."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")


def peft_gradients(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of peft and transformers alone."""
    model.base_model.model.set_attn_implementation("eager")
    logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / batch.num_labels
    loss.backward()
    return loss.item(), {plain_name(name): p.grad for name, p in trained(model).items()}


def sharded(worker: Worker, family: str, how: str, topology: str) -> tuple[float, dict[str, Tensor]]:
    """Job: the same on a grid, with the names of all parameters that got a gradient."""
    mesh = worker.mesh(*TOPOLOGIES[topology])
    layout = build_layout("striped", BLOCK)
    model = parallelize(
        adapted(family, how),
        mesh,
        pattern=build_pattern(**DENSE),
        layout=layout,
        reduce_dtype=torch.float64,
        loss_chunk=40,
    )
    batch = tiny_batch()
    share = model(*take(batch, layout, mesh), batch.num_labels)
    share.backward()
    loss = share.detach().clone()
    dist.all_reduce(loss)
    named = model.hf_model.named_parameters()
    gradients = {name: p.grad.full_tensor() for name, p in named if p.grad is not None}
    return loss.item(), gradients if worker.rank == 0 else {}


def check(pool: ProcessPool, family: str, how: str, topology: str) -> None:
    expected_loss, expected = peft_gradients(adapted(family, how), tiny_batch())
    world = 1
    for size in TOPOLOGIES[topology][0]:
        world *= size
    loss, gradients = pool.run(sharded, world=world, family=family, how=how, topology=topology)[0]
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    errors = relative_errors(gradients, expected)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("topology", ["cp1", "cp2", "dp2"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # head tied to the embeddings, and not
def test_gradients_equal_those_of_peft(pool: ProcessPool, family: str, topology: str) -> None:
    check(pool, family, "options", topology)


@pytest.mark.parametrize("how", OWN)
def test_gradients_of_a_users_own_adapter(pool: ProcessPool, how: str) -> None:
    """Among them a tied head that peft unties: its embeddings are trained and the head is not."""
    check(pool, "llama", how, "cp2")


def test_what_is_trained() -> None:
    model, adapter = open_adapter(adapted("llama", "options"))
    names = set(trained(model))
    assert adapter is not None and adapter.config.lora_alpha == 6
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    } <= names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rest = {name for name in names if "lora_" not in name}
    assert all("norm" in name or "embed" in name for name in rest) and len(rest) == 6
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" not in names


def test_what_is_trained_is_fp32_over_bf16_and_needs_a_mesh_to_be_mixed() -> None:
    options = tiny_options("llama", "bfloat16").model_copy(update={"lora": LoraOptions(**WHOLE)})
    model, _ = build_model(options, SEQ_LEN)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    with pytest.raises(UserError, match="needs FSDP"):
        parallelize(model)


def export_job(worker: Worker, family: str, folder: Path) -> Tensor:
    """Job: export a sharded adapter; this rank's hidden states."""
    mesh = worker.mesh(*TOPOLOGIES["cp2"])
    layout = build_layout("striped", BLOCK)
    model = parallelize(
        adapted(family, "options", "float32"), mesh, pattern=build_pattern(**DENSE), layout=layout
    )
    export_model(model, folder)
    batch = tiny_batch()
    return model.hidden_states(*take(batch, layout, mesh)[:2])


def base(family: str) -> Any:
    return build_model(tiny_options(family, "float32"), SEQ_LEN)[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_peft_loads_an_exported_adapter(pool: ProcessPool, tmp_path: Path, family: str) -> None:
    hidden = pool.run(export_job, world=2, family=family, folder=tmp_path / "adapter")
    ours = build_layout("striped", BLOCK).unshard(hidden)
    with transformers_names_allowed():
        loaded = peft.PeftModel.from_pretrained(base(family), tmp_path / "adapter")
    tokens = tiny_batch().input_ids
    theirs = loaded.base_model.model.model(tokens).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, base(family).model(tokens).last_hidden_state, atol=1e-2)
    whole = loaded.merge_and_unload()
    torch.testing.assert_close(whole.model(tokens).last_hidden_state, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 2, "targets": ["q_prj"]}, "targets: 'q_prj' is no linear layer .*did you mean 'q_proj'"),
        ({"r": 2, "targets": ["lm_head"]}, "'lm_head' is the head, which is trained whole or not at all"),
        (
            {"r": 2, "also_train": ["embed_tokn"]},
            "also_train: no module .*'embed_tokn'.*did you mean 'embed_tokens'",
        ),
        (
            {"r": 2, "targets": ["q_proj"], "also_train": ["q_proj"]},
            "'q_proj' is in targets and trained whole",
        ),
    ],
)
def test_names_that_fit_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    base = tiny_options("llama").model_copy(update={"lora": LoraOptions(**options)})
    with pytest.raises(UserError, match=f"model.lora.*{sentence}"):
        build_model(base, SEQ_LEN, "meta")


def test_options_without_a_rank_are_refused() -> None:
    with pytest.raises(UserError, match=r"also_train has no effect with r=0"):
        LoraOptions(also_train=("norm",))


def test_compiled_layers_are_refused_before_the_first_step() -> None:
    with pytest.raises(UserError, match="train.fused=compile cannot serve the adapter layers"):
        parallelize(adapted("llama", "attention"), fused="compile")


def prefix_tuning(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def two(model: Any) -> Any:
    found = own(model, target_modules=["q_proj"])
    with transformers_names_allowed():
        found.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    return found


def folded(model: Any) -> Any:
    found = own(model, target_modules=["q_proj"])
    found.merge_adapter()
    return found


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (prefix_tuning, "of peft's kind PREFIX_TUNING"),
        (two, "has the adapters default, other"),
        (folded, "merged into its weight"),
        (lambda model: own(model, target_modules=["q_proj"], bias="all"), "trains biases too"),
        (lambda model: own(model, target_modules=["lm_head"]), "lm_head have a low-rank adapter|input embeddings have"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(make: Any, sentence: str) -> None:
    with transformers_names_allowed():
        model = make(tiny_model("qwen2", "float32"))
    with pytest.raises(UserError, match=sentence):
        parallelize(model)
