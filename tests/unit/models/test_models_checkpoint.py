"""What is not a complete, supported model is refused by name, before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.errors import CheckpointError, ConfigError, UnsupportedModelError, UserError
from phalanx.models.checkpoint import SUPPORTED_ARCHITECTURES, resolve
from phalanx.models.weight_files import read_headers
from phalanx.testing.checkpoints import write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "qwen3", dtype="bfloat16")


def set_in_config(directory: Path, **settings: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_directory_is_described(directory: Path) -> None:
    checkpoint = resolve(str(directory))
    assert checkpoint.path == directory.resolve()
    assert checkpoint.name == str(directory)
    assert checkpoint.architecture == "Qwen3ForCausalLM"
    assert checkpoint.max_model_len == 512
    assert checkpoint.vocab_size == 260
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.weight_files == (directory / "model.safetensors",)
    assert checkpoint.hf_config.num_hidden_layers == 2


def test_what_the_configuration_leaves_out_is_the_models_default(directory: Path) -> None:
    set_in_config(directory, max_position_embeddings=None, dtype=None)
    file = directory / "config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if value is not None}
    file.write_text(json.dumps(kept))
    assert resolve(str(directory)).max_model_len == 32768
    assert resolve(str(directory)).dtype == "bfloat16", "that of the tensors"


def test_importing_and_refusing_needs_no_torch() -> None:
    code = (
        "import sys; from phalanx.models.checkpoint import resolve\n"
        "try: resolve('./nowhere')\n"
        "except ValueError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["./nowhere: there is no such file or directory", "[]"]


def make_unreadable(name: str) -> Callable[[Path], None]:
    """A directory: what may not be read is read all the same by tests that run as root."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content)


def configure(**settings: Any) -> Callable[[Path], None]:
    return lambda directory: set_in_config(directory, **settings)


def cut_short(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lengthened(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"x")


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def index_of(weight_map: Any) -> Callable[[Path], Any]:
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (remove("config.json"), CheckpointError, "no config.json"),
        (make_unreadable("config.json"), CheckpointError, "config.json cannot be read: Is a directory"),
        (write("config.json", b"{"), CheckpointError, "is not JSON"),
        (write("config.json", b"[]"), CheckpointError, "Expected `object`"),
        (remove("model.safetensors"), CheckpointError, "model.safetensors is missing"),
        (pickled, CheckpointError, "only pytorch_model.bin: weights must be in safetensors"),
        (cut_short, CheckpointError, "model.safetensors is cut short: it has .* bytes of"),
        (lengthened, CheckpointError, "model.safetensors goes on after its last tensor: it has .* bytes of"),
        (write("model.safetensors", b""), CheckpointError, "no safetensors file"),
        (write("model.safetensors", b"\x08" + bytes(7) + b"notajson"), CheckpointError, "no safetensors file"),
        (write("model.safetensors", b"\xff" * 100), CheckpointError, "cut short"),
        (index_of({"a": "model-2.safetensors"}), CheckpointError, "model-2.safetensors is missing"),
        (index_of({"nothing": "model.safetensors"}), CheckpointError, "lacks the tensor nothing"),
        (index_of([]), CheckpointError, "not an index"),
        (index_of({}), CheckpointError, "it names no tensor"),
        (index_of({"a": 2}), CheckpointError, r"Expected `str`, got `int` - at `\$.weight_map"),
        (configure(architectures=["GPT2LMHeadModel"]), UnsupportedModelError, "a GPT2LMHeadModel; supported are"),
        (configure(architectures=None), CheckpointError, "does not name an architecture"),
        (configure(architectures="LlamaForCausalLM"), CheckpointError, r"\$.architectures"),
        (configure(max_position_embeddings=0), CheckpointError, r">= 1 - at `\$.max_position_embeddings"),
        (configure(num_attention_heads="x"), CheckpointError, r"\$.num_attention_heads"),
        (configure(quantization_config="awq"), CheckpointError, r"\$.quantization_config"),
        (configure(rope_scaling=[1]), CheckpointError, r"\$.rope_scaling"),
        (configure(rope_scaling={"type": "yarn", "factor": "x"}), CheckpointError, r"\$.rope_scaling.factor"),
        (configure(quantization_config={"quant_method": "gptq"}), UnsupportedModelError, r"quantised \(gptq\)"),
        (configure(rope_parameters={"rope_type": "dynamic"}), UnsupportedModelError, "dynamic rotary embeddings"),
        (configure(rope_parameters=None, rope_scaling={"type": "longrope"}), UnsupportedModelError, "longrope rotary"),
        (
            configure(architectures=["DeepseekV3ForCausalLM"], scoring_func="softmax"),
            UnsupportedModelError,
            "has scoring_func 'softmax'; a DeepseekV3ForCausalLM is computed with 'sigmoid'",
        ),
        (
            configure(architectures=["DeepseekV2ForCausalLM"], norm_topk_prob=True),
            UnsupportedModelError,
            "has norm_topk_prob True; a DeepseekV2ForCausalLM is computed with False",
        ),
        (
            configure(architectures=["MiniMaxM2ForCausalLM"], qk_norm_type="per_head"),
            UnsupportedModelError,
            "has qk_norm_type 'per_head'",
        ),
        (configure(rope_scaling={"type": "dynamic"}), UnsupportedModelError, "dynamic rotary embeddings"),
        (configure(rope_parameters={"rope_type": "spiral"}), UnsupportedModelError, "has spiral rotary embeddings"),
    ],
)
def test_faults_are_named(directory: Path, spoil: Callable[[Path], Any], error: type[UserError], message: str) -> None:
    spoil(directory)
    with pytest.raises(error, match=message) as caught:
        resolve(str(directory))
    assert str(directory) in str(caught.value)


def test_supported_architectures_are_listed(directory: Path) -> None:
    set_in_config(directory, architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError) as caught:
        resolve(str(directory))
    assert all(name in str(caught.value) for name in SUPPORTED_ARCHITECTURES)


def test_weights_of_another_type_are_refused(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        resolve(str(directory))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "model.gguf"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{name}: there is no such file"):
        resolve(name)


def test_a_file_of_another_kind_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint directory, a GGUF file"):
        resolve(str(directory / "model.safetensors"))


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("a\0b", "null byte")])
def test_a_name_that_no_file_can_have(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be looked up: .*{reason}"):
        resolve(name)


def test_a_local_model_has_no_revision(directory: Path) -> None:
    with pytest.raises(ConfigError, match="revision"):
        resolve(str(directory), revision="main")


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 1.5}, 768),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
    ],
)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_yarn_stretches_the_length(directory: Path, field: str, rope: dict[str, Any], length: int) -> None:
    set_in_config(directory, **{field: rope})
    assert resolve(str(directory)).max_model_len == length


def test_the_index_decides_which_file_a_tensor_is_read_from(directory: Path) -> None:
    (directory / "old.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    names = sorted(read_headers(directory))
    index_of({name: f"{'model' if i else 'old'}.safetensors" for i, name in enumerate(names)})(directory)
    found = read_headers(directory)
    assert [found[name].file.stem for name in names] == ["old"] + ["model"] * (len(names) - 1)


def test_a_sharded_checkpoint_has_several_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "whole", "mixtral"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    checkpoint = resolve(str(tmp_path / "sharded"))
    assert len(checkpoint.weight_files) > 2
    whole, sharded = read_headers(tmp_path / "whole"), checkpoint.tensors
    assert {name: info[1:3] for name, info in whole.items()} == {name: info[1:3] for name, info in sharded.items()}
    assert resolve(str(tmp_path / "whole")).fingerprint == checkpoint.fingerprint, "whatever file a tensor is in"
