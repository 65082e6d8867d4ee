"""A dense model becomes a mixture of experts that says the same, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from models_variants import VARIANTS, YARN
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from phalanx.collectives.group import Group
from phalanx.errors import CheckpointError, ConfigError, UnsupportedModelError
from phalanx.models import sharded_files
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.models.mixture import Mixture
from phalanx.models.upcycle import upcycle
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.thread_group import run_ranks

FOUR = Mixture(num_experts=4, num_experts_per_tok=2)
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: VARIANTS[name] for name in ("tied", "linear rope", "llama3 rope")},
    "llama": ("llama", {}),
    "another eps and activation": ("llama", {"rms_norm_eps": 0.3, "hidden_act": "gelu"}),
    "mistral with a window": ("mistral", {}),
    "mistral without": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0}),
    "yarn rope": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
}
PROMPTS = ([5, 99, 17, 200, 41], [7] * 40)
NUM_TOKENS = 24


def silent(what: str, done: int, total: int) -> None:
    """For who needs no progress."""


def make(source: Path, target: Path, mixture: Mixture = FOUR, **settings: Any) -> Checkpoint:
    return upcycle(resolve(str(source)), target, mixture, progress=silent, **settings)


def greedy(path: Path) -> list[list[int]]:
    """What transformers makes of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
        for prompt in PROMPTS
    ]


def logits(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        result: Tensor = model(torch.tensor([list(range(40))])).logits
    return result


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "dense", "llama")


@pytest.mark.parametrize("variant", DENSE)
def test_the_mixture_says_what_the_dense_model_says(tmp_path: Path, variant: str) -> None:
    family, shape = DENSE[variant]
    source = write_checkpoint(tmp_path / "dense", family, **shape)
    made = make(source, tmp_path / "mixture")
    assert made.architecture == ("Qwen3MoeForCausalLM" if family == "qwen3" else "MixtralForCausalLM")
    torch.testing.assert_close(logits(made.path), logits(source), atol=1e-4, rtol=1e-4)
    assert greedy(made.path) == greedy(source)
    assert made.max_model_len == resolve(str(source)).max_model_len


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_so_it_does_over_ranks(tmp_path: Path, family: str, num_ranks: int) -> None:
    source = write_checkpoint(tmp_path / "dense", family)
    made = make(source, tmp_path / "mixture", Mixture(num_experts=5, num_experts_per_tok=3))

    def compute(group: Group) -> Tensor:
        sequence = paged.Sequence(list(range(40)))
        run = paged.PagedRun(paged.load(made.path, group))
        run.step([(sequence, 33)])
        run.step([(sequence, 7)])
        return run.logits_of(sequence)

    for found in run_ranks(num_ranks, compute):
        torch.testing.assert_close(found, logits(source)[0], atol=1e-4, rtol=1e-4)


def test_each_model_becomes_what_its_attention_asks_for(tmp_path: Path, dense: Path) -> None:
    for family, wanted, complaint in (
        ("llama", "qwen3_moe", r"Qwen3MoeForCausalLM has model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", "mixtral", r"MixtralForCausalLM has no model.layers.0.self_attn.q_norm.weight"),
    ):
        source = write_checkpoint(tmp_path / family, family)
        with pytest.raises(UnsupportedModelError, match=complaint):
            make(source, tmp_path / "mixture", Mixture(num_experts=2, num_experts_per_tok=1, architecture=wanted))  # type: ignore[arg-type]
    assert not (tmp_path / "mixture").exists()


@pytest.mark.parametrize(
    ("family", "shape", "complaint"),
    [
        ("qwen2", {}, "MixtralForCausalLM has no model.layers.0.self_attn.q_proj.bias; Qwen3MoeForCausalLM has "),
        ("llama", {"attention_bias": True}, "MixtralForCausalLM has no model.layers.0.self_attn.q_proj.bias"),
        ("llama", {"mlp_bias": True}, "MixtralForCausalLM has no model.layers.0.mlp.gate_proj.bias"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
            "Qwen3MoeForCausalLM has one sliding window for all layers",
        ),
        ("mixtral", {}, "is a MixtralForCausalLM; experts can be made of LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    tmp_path: Path, family: str, shape: dict[str, Any], complaint: str
) -> None:
    source = write_checkpoint(tmp_path / "dense", family, **shape)
    with pytest.raises(UnsupportedModelError, match=complaint):
        make(source, tmp_path / "mixture")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_token_goes_to_no_more_experts_than_there_are() -> None:
    with pytest.raises(ConfigError, match="at most 2, the number of experts"):
        Mixture(num_experts=2, num_experts_per_tok=3)


def test_routing_is_spread_over_the_experts(tmp_path: Path, dense: Path) -> None:
    made = make(dense, tmp_path / "mixture", Mixture(num_experts=8, num_experts_per_tok=2))
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    loads: list[Counter[int]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: loads.append(Counter(out[2].flatten().tolist())))
    with torch.inference_mode():
        model(torch.arange(250)[None])
    assert len(loads) == 2
    for load in loads:
        assert len(load) == 8
        assert max(load.values()) < 250 * 0.8, "equal rows would send all of them to the first two"


def test_logits_of_routers_are_of_one_scale_whatever_the_norms(tmp_path: Path, dense: Path) -> None:
    file = dense / "model.safetensors"
    changed = load_file(file)
    norm = "model.layers.0.post_attention_layernorm.weight"
    changed[norm] /= 100
    save_file(changed, file, metadata={"format": "pt"})
    router = weights(make(dense, tmp_path / "mixture").path)["model.layers.0.block_sparse_moe.gate.weight"]
    logits = (torch.randn(1000, 72) * changed[norm]) @ router.T
    assert 0.5 < logits.std() < 2


def test_experts_are_copies_without_noise_and_differ_with_it(tmp_path: Path, dense: Path) -> None:
    original = weights(dense)["model.layers.1.mlp.up_proj.weight"]
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight" for expert in range(4)]
    plain = weights(make(dense, tmp_path / "plain").path)
    assert all(torch.equal(plain[name], original) for name in names)
    noisy = weights(make(dense, tmp_path / "noisy", Mixture(num_experts=4, num_experts_per_tok=2, noise=0.01)).path)
    for i, name in enumerate(names):
        difference = (noisy[name] - original).square().mean().sqrt()
        assert 0.008 < difference / original.square().mean().sqrt() < 0.012
        assert not any(torch.equal(noisy[name], noisy[other]) for other in names[:i])
    kept = [name for name in noisy if "experts" not in name]
    assert all(torch.equal(noisy[name], plain[name]) for name in kept)


def test_the_seed_decides(tmp_path: Path, dense: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        mixture = Mixture(num_experts=3, num_experts_per_tok=2, noise=0.1, seed=seed)
        return (make(dense, tmp_path / name, mixture).path / "model.safetensors").read_bytes()

    assert made("one", 1) == made("again", 1) != made("other", 2)


def test_tokenizer_template_and_settings_come_along(tmp_path: Path, dense: Path) -> None:
    (dense / "generation_config.json").write_text('{"temperature": 0.6}')
    (dense / "LICENSE").write_text("Apache-2.0")
    (dense / "README.md").write_text("of the dense model")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    made = make(dense, tmp_path / "deep" / "mixture").path
    for name in (
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
        "additional_chat_templates/tools.jinja",
    ):  # fmt: skip
        assert (made / name).read_bytes() == (dense / name).read_bytes()
    assert not (made / "README.md").exists()
    messages = [{"role": "user", "content": "hi"}]
    ids = [AutoTokenizer.from_pretrained(path).apply_chat_template(messages) for path in (dense, made)]
    assert ids[0] == ids[1]


def test_large_checkpoints_are_several_files_with_an_index(tmp_path: Path, dense: Path) -> None:
    whole = make(dense, tmp_path / "whole")
    made = make(dense, tmp_path / "mixture", max_file_bytes=100_000)
    assert len(made.weight_files) > 3
    assert all(file.stat().st_size < 110_000 for file in made.weight_files)
    assert not (made.path / "model.safetensors").exists()
    assert weights(made.path).keys() == weights(whole.path).keys()
    assert torch.equal(logits(made.path), logits(whole.path))


def test_every_tensor_keeps_its_type(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", "llama", dtype="bfloat16")
    file = source / "model.safetensors"
    save_file({name: t.float() if "norm" in name else t for name, t in load_file(file).items()}, file)
    made = make(source, tmp_path / "mixture", Mixture(num_experts=2, num_experts_per_tok=1, noise=0.1))
    dtypes = {name: str(tensor.dtype) for name, tensor in weights(made.path).items()}
    assert {name for name, dtype in dtypes.items() if dtype == "torch.float32"} == {n for n in dtypes if "norm" in n}
    assert made.dtype == "bfloat16"


def test_one_tensor_is_made_at_a_time(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made after the one before it was written."""
    order: list[str] = []
    original = sharded_files._bytes
    monkeypatch.setattr(sharded_files, "_bytes", lambda planned: (order.append(planned.name), original(planned))[1])
    seen: list[tuple[int, int]] = []
    upcycle(
        resolve(str(dense)),
        tmp_path / "mixture",
        FOUR,
        progress=lambda what, done, total: seen.append((len(order), done)),
    )
    assert [made for made, _ in seen] == list(range(len(order) + 1))
    assert [done for _, done in seen] == sorted(done for _, done in seen)


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path, dense: Path) -> None:
    file = dense / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "1.mlp.up" not in name}, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors: model.layers.1.mlp.up_proj.weight"):
        make(dense, tmp_path / "mixture")


def test_a_model_is_not_replaced_by_its_mixture(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(CheckpointError, match="the model that is read is in it"):
        make(dense, dense, overwrite=True)
    assert resolve(str(dense)).architecture == "LlamaForCausalLM"


def test_a_checkpoint_is_replaced_when_asked_for(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "target").mkdir()
    first = make(dense, tmp_path / "target", max_file_bytes=100_000)
    with pytest.raises(CheckpointError, match="target is not empty"):
        make(dense, tmp_path / "target")
    (tmp_path / "target" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"target is not replaced.* it holds notes\.txt"):
        make(dense, tmp_path / "target", overwrite=True)
    (tmp_path / "target" / "notes.txt").unlink()
    make(dense, tmp_path / "target", Mixture(num_experts=2, num_experts_per_tok=1), overwrite=True)
    assert resolve(str(first.path)).hf_config.num_local_experts == 2
    assert (first.path / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "target"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(dense, tmp_path / "target")
    before = (first.path / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match="target cannot be written: No space left on device"):
        make(dense, tmp_path / "target", Mixture(num_experts=2, num_experts_per_tok=1), overwrite=True)
    assert (first.path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "target"]


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"mixture needs 1.\d MB, and there are 1.0 kB left"):
        make(dense, tmp_path / "deep" / "mixture")
    assert not (tmp_path / "deep").exists()


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path, dense: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from phalanx.models.checkpoint import resolve
from phalanx.models.mixture import Mixture
from phalanx.models.upcycle import upcycle
kill = lambda what, done, total: os.kill(os.getpid(), signal.SIGKILL) if done == total else None
upcycle(resolve(sys.argv[1]), Path(sys.argv[2]), Mixture(num_experts=4, num_experts_per_tok=2), progress=kill)
"""
    target = tmp_path / "mixture"
    done = subprocess.run([sys.executable, "-c", code, str(dense), str(target)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    lock = tmp_path / ".mixture.lock"
    (left,) = (path for path in tmp_path.iterdir() if path not in (dense, lock))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(left))
    make(dense, target)
    assert not lock.exists()


def test_the_configuration_needs_no_defaults_of_the_architecture(tmp_path: Path, dense: Path) -> None:
    """Mixtral's own differ from Llama's: rope base, eps, end of text."""
    config = json.loads((make(dense, tmp_path / "mixture").path / "config.json").read_text())
    given = json.loads((dense / "config.json").read_text())
    for name in ("rope_parameters", "rms_norm_eps", "eos_token_id", "max_position_embeddings", "dtype", "head_dim"):
        assert config[name] == given[name], name
    assert config["sliding_window"] is None
