"""Hidden states and logits equal transformers' own, however the work is cut up and shared out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import ConfigError
from phalanx.testing.checkpoints import FAMILIES, MIXTURES, write_checkpoint
from phalanx.testing.thread_group import run_ranks

TOLERANCE = 1e-4

NINE_HEADS = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_size": 72,
    "intermediate_size": 97,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nine heads": ("llama", NINE_HEADS),
    "nine heads and experts": ("qwen3_moe", {**NINE_HEADS, "moe_intermediate_size": 41, "mlp_only_layers": [1]}),
    "nine heads and biases": ("llama", {**NINE_HEADS, "attention_bias": True, "mlp_bias": True}),
    "one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 263}),
    "windows on some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn rope": ("qwen3", {"rope_parameters": YARN}),
    "clipped": ("olmoe", {"clip_qkv": 0.4, "norm_topk_prob": True, "attention_bias": True}),
    "norms of nine heads": ("minimax_m2", {**NINE_HEADS, "rotary_dim": 4}),
    "greedy experts, query from a latent": (
        "deepseek_v2",
        {"topk_method": "greedy", "q_lora_rank": 20, "first_k_dense_replace": 0, "attention_bias": True},
    ),
    "nine latent heads": (
        "deepseek_v3",
        {**NINE_HEADS, "num_key_value_heads": 9, "moe_intermediate_size": 41, "n_shared_experts": 1},
    ),
    "latent heads, rope in halves, yarn": (
        "deepseek_v3",
        {
            "rope_interleave": False,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "nine heads and experts in groups": (
        "glm4_moe",
        {**NINE_HEADS, "moe_intermediate_size": 41, "n_routed_experts": 6, "n_group": 3, "topk_group": 2},
    ),
    "no norms of heads": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "nine heads and sinks": ("gpt_oss", NINE_HEADS),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a checkpoint once for all tests that ask for it."""

    @cache
    def write(name: str) -> Path:
        family, shape = VARIANTS.get(name, (name, {}))
        return write_checkpoint(tmp_path_factory.mktemp("model"), family, **shape)

    return write


def has_experts(path: Path) -> bool:
    return "num_experts_per_tok" in json.loads((path / "config.json").read_text())


def reference_logits(path: Path, sequences: list[paged.Sequence], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    # transformers' grouped experts cannot have odd sizes; its plain ones can.
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager" if has_experts(path) else None,
    )
    with torch.inference_mode():
        return [model(torch.tensor([sequence.token_ids])).logits[0].float() for sequence in sequences]


def make_sequences(seed: int = 0) -> list[paged.Sequence]:
    rng = random.Random(seed)
    return [paged.Sequence([rng.randrange(256) for _ in range(length)]) for length in (61, 1, 8, 35, 17)]


def run_in_random_pieces(path: Path, group: Group, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Chunks, decodes and pauses in one random mix; the same on every rank."""
    rng = random.Random(seed)
    sequences = make_sequences(seed)
    run = paged.PagedRun(paged.load(path, group, dtype), seed=seed)
    while left := [sequence for sequence in sequences if sequence.num_left]:
        work = [(sequence, min(sequence.num_left, rng.choice([0, 1, 1, 2, 7, 23]))) for sequence in left]
        if work := [(sequence, count) for sequence, count in work if count]:
            run.step(work)
    return [run.logits_of(sequence) for sequence in sequences]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_every_family_in_random_pieces(written: Any, family: str, num_ranks: int) -> None:
    path, seed = written(family), num_ranks
    expected = reference_logits(path, make_sequences(seed))
    for found in run_ranks(num_ranks, lambda group: run_in_random_pieces(path, group, seed)):
        assert_same(found, expected)
        assert all((mine.argmax(-1) == theirs.argmax(-1)).all() for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("variant", "num_ranks"),
    [
        *[(variant, num_ranks) for variant in VARIANTS for num_ranks in (1, 2, 4)],
        *[("nine heads", num_ranks) for num_ranks in (3, 5, 6, 7, 8, 9)],
        *[(variant, 7) for variant in VARIANTS if variant.startswith(("nine heads and", "nine latent", "norms of"))],
        *[(variant, 3) for variant, (family, _) in VARIANTS.items() if family in MIXTURES],
    ],
)
def test_every_variant_is_shared_out(written: Any, variant: str, num_ranks: int) -> None:
    path = written(variant)
    expected = reference_logits(path, make_sequences())
    for found in run_ranks(num_ranks, lambda group: run_in_random_pieces(path, group, seed=0)):
        assert_same(found, expected)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_whole_prompt_in_one_step_gives_the_hidden_states(written: Any, family: str) -> None:
    from transformers import AutoModel

    path = written(family)
    token_ids = make_sequences()[0].token_ids
    reference = AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected_TD = reference(torch.tensor([token_ids])).last_hidden_state[0]

    def run(group: Group) -> Tensor:
        model = paged.load(path, group)
        paged.PagedRun(model, block_size=16)
        with torch.inference_mode():
            return model.hidden_states(
                torch.tensor(token_ids),
                torch.arange(len(token_ids)),
                paged.AttentionBatch.of_one_row(len(token_ids), 16, paged.CPU),
            )

    for found_TD in run_ranks(2, run):
        torch.testing.assert_close(found_TD, expected_TD, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["mistral", *MIXTURES])
def test_a_shared_prefix_is_read_from_another_rows_blocks(written: Any, family: str) -> None:
    path = written(family)
    first, second = make_sequences()[0], make_sequences()[3]
    second = paged.Sequence(first.token_ids[:24] + second.token_ids)
    expected = reference_logits(path, [first, second])
    (run,) = run_ranks(1, lambda group: paged.PagedRun(paged.load(path, group), block_size=8))
    run.step([(first, 40)])
    second.blocks, second.num_computed = first.blocks[:3], 24
    run.step([(first, 1), (second, 10)])
    run.step([(first, first.num_left), (second, second.num_left)])
    assert_same([run.logits_of(first), run.logits_of(second)], [expected[0], expected[1][24:]])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_half_precision_is_close(written: Any, family: str, dtype: torch.dtype, num_ranks: int) -> None:
    path = written(family)
    expected = reference_logits(path, make_sequences())
    for found in run_ranks(num_ranks, lambda group: run_in_random_pieces(path, group, seed=0, dtype=dtype)):
        for mine, theirs in zip(found, expected, strict=True):
            # Rounding may turn a router's choice for single tokens, so the median is what is compared.
            assert (mine - theirs).abs().median() < 0.2 * theirs.std()


@pytest.mark.parametrize("num_ranks", [10, 16])
def test_a_rank_without_a_head_is_refused(written: Any, num_ranks: int) -> None:
    with pytest.raises(ConfigError, match="at most 9") as caught:
        run_ranks(num_ranks, lambda group: paged.load(written("nine heads"), group))
    assert caught.value.field == "tensor_parallel_size"
    assert caught.value.value == num_ranks


@pytest.mark.parametrize("family", ["olmoe", "minimax_m2"])
def test_norms_of_all_heads_take_one_small_all_reduce_a_layer(written: Any, family: str) -> None:
    path, token_ids = written(family), make_sequences()[0].token_ids

    def run(group: Group) -> list[tuple[int, ...]]:
        model, shapes, all_reduce = paged.load(path, group), [], group.all_reduce

        def record(x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return all_reduce(x)

        group.all_reduce = record  # type: ignore[method-assign]
        paged.PagedRun(model).step([(paged.Sequence(token_ids), len(token_ids))])
        return shapes

    embedding, *layers = run_ranks(3, run)[0]
    assert embedding == (1, len(token_ids), model_width(path))
    assert [shape for shape in layers if shape[-1] == 2] == [(len(token_ids), 2)] * 2
    assert len(layers) == 2 * 3, "norms, attention and experts of two layers"


def model_width(path: Path) -> int:
    return int(json.loads((path / "config.json").read_text())["hidden_size"])


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2"])
def test_what_chooses_experts_stays_in_float32(written: Any, family: str) -> None:
    (model,) = run_ranks(1, lambda group: paged.load(written(family), group, torch.bfloat16))
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters().items()}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert biases
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide - biases == {name for name in dtypes if family == "minimax_m2" and name.endswith("mlp.gate.weight")}


def test_latent_attention_caches_keys_and_values_of_every_head(written: Any) -> None:
    models = run_ranks(3, lambda group: paged.load(written("nine latent heads"), group))
    assert [model.cache_layers[1] for model in models] == [(3, 24, 12)] * 3
    models = run_ranks(2, lambda group: paged.load(written("nine latent heads"), group))
    assert [model.cache_layers[1] for model in models] == [(5, 24, 12), (4, 24, 12)]


def test_ranks_cache_their_own_heads_only(written: Any) -> None:
    models = run_ranks(2, lambda group: paged.load(written("nine heads"), group))
    assert [model.cache_layers[0] for model in models] == [(2, 8, 8), (1, 8, 8)]
    assert [len(model.cache_layers) for model in models] == [2, 2]
