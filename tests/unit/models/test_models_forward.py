"""Hidden states and logits equal transformers' own, however the work is cut up and shared out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from models_variants import VARIANTS
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import ConfigError
from phalanx.testing.checkpoints import FAMILIES, MIXTURES
from phalanx.testing.thread_group import run_ranks

TOLERANCE = 1e-4


def has_experts(path: Path) -> bool:
    return "num_experts_per_tok" in json.loads((path / "config.json").read_text())


@cache
def reference_model(path: Path) -> Any:
    """Read once for all tests of a checkpoint."""
    from transformers import AutoModelForCausalLM

    # transformers' grouped experts cannot have odd sizes; its plain ones can.
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager" if has_experts(path) else None,
    )


def reference_logits(path: Path, sequences: list[paged.Sequence]) -> list[Tensor]:
    model = reference_model(path)
    with torch.inference_mode():
        return [model(torch.tensor([sequence.token_ids])).logits[0].float() for sequence in sequences]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_every_family_in_random_pieces(written: Any, family: str, num_ranks: int) -> None:
    path, seed = written(family), num_ranks
    expected = reference_logits(path, paged.make_sequences(seed))
    for found in run_ranks(num_ranks, lambda group: paged.run_in_random_pieces(paged.load(path, group), seed)):
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
    expected = reference_logits(path, paged.make_sequences())
    for found in run_ranks(num_ranks, lambda group: paged.run_in_random_pieces(paged.load(path, group), seed=0)):
        assert_same(found, expected)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_whole_prompt_in_one_step_gives_the_hidden_states(written: Any, family: str) -> None:
    from transformers import AutoModel

    path = written(family)
    token_ids = paged.make_sequences()[0].token_ids
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
    first, second = paged.make_sequences()[0], paged.make_sequences()[3]
    second = paged.Sequence(first.token_ids[:24] + second.token_ids)
    expected = reference_logits(path, [first, second])
    (run,) = run_ranks(1, lambda group: paged.PagedRun(paged.load(path, group), block_size=8))
    run.step([(first, 40)])
    second.blocks, second.num_computed = first.blocks[:3], 24
    run.step([(first, 1), (second, 10)])
    run.step([(first, first.num_left), (second, second.num_left)])
    assert_same([run.logits_of(first), run.logits_of(second)], [expected[0], expected[1][24:]])


@pytest.mark.parametrize(("dtype", "num_ranks"), [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 2)])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_half_precision_is_close(written: Any, family: str, dtype: torch.dtype, num_ranks: int) -> None:
    path = written(family)
    expected = reference_logits(path, paged.make_sequences())
    for found in run_ranks(num_ranks, lambda group: paged.run_in_random_pieces(paged.load(path, group, dtype), seed=0)):
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
    path, token_ids = written(family), paged.make_sequences()[0].token_ids

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
