"""One rank's shard of a causal language model, ready to compute.

With pipeline parallelism it is the shard of one stage: some of the layers, the embedding with the first of them and
the head with the last.

Shape suffixes: T tokens of a step, R rows of hidden states, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phalanx.collectives.group import Group
from phalanx.errors import CheckpointError
from phalanx.memory.arena import Allocate
from phalanx.models.attention import PagedAttention, Step, pick_backend
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.definition import build, definition_class, keep_stage
from phalanx.models.four_bit_experts import Form, install_four_bits, log_dequantised, plan_four_bits
from phalanx.models.norms_of_all_heads import install_norms_of_all_heads
from phalanx.models.packed import Packable, Packing, Product, Release, can_pack
from phalanx.models.packed_memory import PackedMemory
from phalanx.models.parallel import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead, sum_output
from phalanx.models.parameters import Parameters
from phalanx.models.precision import kept_dtype
from phalanx.models.rank_weights import RankPart, RankWeights, tie
from phalanx.models.shards import EXPERTS, ROWS, Sharding
from phalanx.models.short_paths import install_short_paths
from phalanx.models.weights import Source, WeightReader, find_sources, import_conversions
from phalanx.moe import four_bits
from phalanx.moe.dispatcher import Dispatcher
from phalanx.moe.expert_groups import install_groups
from phalanx.moe.expert_products import ExpertProducts, install_products
from phalanx.moe.four_bits import FourBitWeight
from phalanx.moe.shared_experts import SharedExperts
from phalanx.topology.sharding import ExpertShare, Span

OnProgress = Callable[[int, int], None]


class LayerCache(NamedTuple):
    """What one attention layer caches of a token, on this rank."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class CausalLM:
    """A rank's shard of a model. For the use of one thread.

    All ranks of the group call the same methods with the same arguments; the collectives that a method issues depend on
    the number of tokens or rows alone.
    """

    def __init__(
        self,
        definition: Any,
        head: VocabParallelHead | None,
        *,
        is_first: bool,
        weights: RankWeights,
        device: torch.device,
        packing: Packing | None,
        dispatcher: Dispatcher | None,
        experts: Mapping[str, SharedExperts],
        in_four_bits: Mapping[str, Form],
    ) -> None:
        self.vocab_size: int = definition.config.vocab_size
        self.hidden_size: int = definition.config.hidden_size
        self.is_first = is_first
        """Whether the model begins here: with an embedding."""
        self.is_last = head is not None
        """Whether it ends here: with logits."""
        self.dtype: torch.dtype = definition.dtype
        self.device = device
        self.weights = weights
        """What it computes with, for who lets go of it, or puts others in its place."""
        self.weight_bytes = weights.num_bytes
        self.experts = experts
        """Of each layer whose experts are shared out one by one, by the name of their module."""
        self._definition = definition
        self._decoder = definition.base_model
        self._head = head
        self._packing = packing
        self._in_four_bits = frozenset(in_four_bits)
        self._four_bit_parts = {part.name for name, form in in_four_bits.items() for part in form.parts(name)}
        self._dispatcher = dispatcher
        self._step = Step()
        backend = pick_backend(device)
        self._attention: list[PagedAttention] = []
        cache_layers = []
        for module in _attention_modules(definition):
            module.paged_attention = PagedAttention(self._step, backend)
            self._attention.append(module.paged_attention)
            cache_layers.append(_layer_cache(module))
        self.cache_layers = tuple(cache_layers)

    def named_parameters(self) -> Parameters:
        """This rank's part of each of its parameters, by transformers' names; what is tied comes under each name.

        Routers' correction biases are among them. Of whole experts it has those that `experts` tells. To ask for one
        that is held in 4 bits is a UserError.

        They may be written to until the next step. Where weights are packed, that step packs what they then hold, and
        those tensors are empty afterwards; the step after which one is written to raises UserError.
        """
        parameters = {
            name: tensor.data
            for name, tensor in _parameters(self._definition).items()
            if name not in self._four_bit_parts
        }
        if self._packing is not None:
            self._packing.lend(parameters)
        return Parameters(parameters, self._in_four_bits)

    def bind_cache(self, caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Use these key and value caches, one pair for each of `cache_layers`; an empty sequence lets go of them.

        Shapes are [num_blocks, block_size, num_kv_heads, key_dim] and [..., value_dim]; the memory may hold anything.
        """
        assert len(caches) in (0, len(self._attention))
        for i, attention in enumerate(self._attention):
            attention.bind(*caches[i] if caches else (None, None))

    @torch.inference_mode()
    def copy_blocks(self, sources_N: Tensor, targets_N: Tensor) -> None:
        """Have blocks of the caches hold what others hold, in all layers. No block is in both."""
        for attention in self._attention:
            attention.copy_blocks(sources_N, targets_N)

    def hidden_states(
        self, inputs: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        """Run the layers on a step's tokens and put their keys and values into the cache.

        `inputs` are the token ids [T] where the model begins, elsewhere the hidden states [T, D] of the stage before.
        `num_tokens` are those of each replica, if these share out the experts. Returns [T, D], where the model ends
        after the final normalisation.
        """
        asked = {"input_ids" if self.is_first else "inputs_embeds": inputs[None]}
        if self._packing is not None:
            self._packing.pack()
        if self._dispatcher is not None:
            self._dispatcher.begin(num_tokens or (len(positions_T),))
        self._step.batch = batch
        try:
            output = self._decoder(**asked, position_ids=positions_T[None], use_cache=False)
        finally:
            self._step.batch = None
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] in float32 of the next token after each hidden state, on every rank of the last stage."""
        assert self._head is not None, "the head is on another stage"
        return self._head(hidden_RD)


def import_definition(checkpoint: str) -> None:
    """Import the modules that a checkpoint's model needs, so that forked workers have them. Raises UserError."""
    found = Checkpoint(Path(checkpoint), checkpoint)
    found.check()
    definition_class(found)
    found.hf_config  # noqa: B018  (its class is in a module too)
    import_conversions()


class WeightMemory(NamedTuple):
    """Where a rank's weights lie."""

    allocate: Allocate
    """Gives memory for a tensor: `allocate(name, shape, dtype)`."""
    release: Release | None = None
    """Gives back that of some. With it, weights are packed where that is possible, and not kept plain as well."""
    filled: Mapping[str, int] = MappingProxyType({})
    """The sizes in bytes of what `allocate` gives with its weights in it: that is not read."""
    shares_packed: bool = False
    """Whether packed weights come from `allocate` too, so that they can be found there like this."""
    expect: Callable[[int], None] = lambda num_bytes: None
    """Told before, once, about how much will be allocated."""


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    memory: WeightMemory,
    on_progress: OnProgress,
    layers: Span | None = None,
    experts: tuple[ExpertShare, Dispatcher] | None = None,
    dequantise: bool = True,
) -> CausalLM:
    """Build this rank's shard and read its weights.

    `layers` are those of this rank's stage (all by default), which `group` shares. With `experts` this rank has whole
    ones, and tokens get to those of other ranks through the dispatcher. Without `dequantise` experts that the
    checkpoint has in 4 bits stay so where they can: on a GPU, with Triton.

    Blocks for as long as reading takes; `on_progress(bytes_done, bytes_total)` counts this rank's bytes. Issues no
    collective.

    Raises CheckpointError if tensors are missing or of the wrong shape, ConfigError naming `tensor_parallel_size` if
    the model cannot be shared out over that many ranks, UnsupportedModelError for a layout that is not known.
    """
    definition = build(checkpoint, dtype)
    share, dispatcher = experts or (None, None)
    sharding = Sharding(definition, group.rank, group.size, share)
    sources = find_sources(definition, checkpoint.tensors, _parameters(definition))
    layers = layers or Span(0, checkpoint.num_layers)
    keep_stage(definition, layers)
    with WeightReader(checkpoint.tensors) as reader:
        part = _plan_part(definition, checkpoint, sharding, sources, reader, memory.filled)
        if not dequantise:
            part = part._replace(in_four_bits=_plan_four_bits(part, checkpoint, device))
        memory.expect(part.num_bytes)
        weights = part.read(reader, memory.allocate, on_progress, memory.filled)
    shared_experts = _install(definition, weights, part.in_four_bits, sharding, group, device, dispatcher)
    full_shapes = {name: shard.full_shape for name, shard in part.shards.items()}
    install_norms_of_all_heads(definition, full_shapes, sharding, group)
    if device.type == "cpu":
        install_short_paths(definition)
    head = None
    if layers.stop == checkpoint.num_layers:
        head_name = sharding.head_name if sharding.head_name in weights else sharding.embedding_name
        head = VocabParallelHead(head_name.removesuffix(".weight"), weights[head_name], checkpoint.vocab_size, group)
    packing = None
    if memory.release is not None and can_pack(dtype, device):
        packing = _pack(definition, head, memory, kept=sharding.embedding_name)
    return CausalLM(
        definition,
        head,
        is_first=layers.start == 0,
        weights=RankWeights(part, weights, packing, shared_experts.values()),
        device=device,
        packing=packing,
        dispatcher=dispatcher,
        experts=shared_experts,
        in_four_bits=part.in_four_bits,
    )


def _plan_part(
    definition: Any,
    checkpoint: Checkpoint,
    sharding: Sharding,
    sources: dict[str, list[Source]],
    reader: WeightReader,
    filled: Mapping[str, int],
) -> RankPart:
    """What this rank takes of the checkpoint, nothing of it in 4 bits. Raises CheckpointError."""
    shards = {name: sharding.shard(name, parameter) for name, parameter in _parameters(definition).items()}
    tied: Sequence[str] = ()
    if definition.config.tie_word_embeddings:
        tied = tie(sharding, shards, sources, reader, filled)
    if missing := [name for name in shards if name not in sources]:
        some = ", ".join(missing[:4])
        raise CheckpointError(f"{checkpoint.path} lacks {len(missing)} of the model's tensors: {some}")
    dtypes = {
        name: kept_dtype(definition, name, checkpoint.tensors[sources[name][0].key].dtype, definition.dtype)
        for name in shards
    }
    return RankPart(shards, sources, dtypes, {}, tied)


def _plan_four_bits(part: RankPart, checkpoint: Checkpoint, device: torch.device) -> dict[str, Form]:
    """Which of its weights stay in 4 bits, and how."""
    in_four_bits = plan_four_bits(part.shards, part.sources, checkpoint.tensors)
    if in_four_bits and not four_bits.can_multiply(device):
        log_dequantised("there is no Triton here, which computes them")
        return {}
    return in_four_bits


def _parameters(definition: Any) -> dict[str, Tensor]:
    """What a checkpoint has of the model, by name: its parameters, and the buffers that are saved with them."""
    found: dict[str, Tensor] = dict(definition.named_parameters(remove_duplicate=False))
    for name, module in definition.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                found[f"{name}.{leaf}"] = buffer
    return found


def _install(
    definition: Any,
    weights: dict[str, Tensor],
    in_four_bits: Mapping[str, Form],
    sharding: Sharding,
    group: Group,
    device: torch.device,
    dispatcher: Dispatcher | None,
) -> dict[str, SharedExperts]:
    """Put the rank's weights into the definition, and parallel layers where the ranks' outputs are to be summed.

    Returns the experts, by the names of their modules, to which a dispatcher brings tokens.
    """
    shared: dict[str, SharedExperts] = {}
    for name, tensor in weights.items():
        module_name, _, leaf = name.rpartition(".")
        module = definition.get_submodule(module_name)
        if leaf in dict(module.named_buffers(recurse=False)):
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    in_groups = _install_four_bits(definition, weights, in_four_bits)
    for name, module in list(definition.named_modules()):
        style = sharding.style(name)
        if style in ROWS:
            definition.set_submodule(name, RowParallelLinear(name, module.weight, module.bias, group))
        elif style in EXPERTS:
            products = None
            if device.type == "cpu" and name not in in_groups:
                products = install_products(name, module)
            else:
                install_groups(module)
            if dispatcher is None:
                sum_output(module, group)
            else:
                mine, num_redundant = sharding.experts(module.num_experts), sharding.num_redundant_experts
                shared[name] = SharedExperts(module, products, mine, dispatcher, num_redundant=num_redundant)
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if f"{name}.{buffer_name}" not in weights:
                module.register_buffer(buffer_name, buffer.to(device), persistent=False)
    if sharding.embedding_name in weights:
        embedding = definition.get_input_embeddings()
        definition.set_input_embeddings(VocabParallelEmbedding(embedding.weight, group))
        if sharding.head_name in _parameters(definition).keys() - weights.keys():
            definition.get_output_embeddings().weight = embedding.weight
    return shared


def _install_four_bits(definition: Any, weights: dict[str, Tensor], in_four_bits: Mapping[str, Form]) -> set[str]:
    """Returns the modules that have such weights."""
    kinds: dict[Form, FourBitWeight] = {}
    for name, form in in_four_bits.items():
        weight = install_four_bits(definition, name, [weights[part.name] for part in form.parts(name)])
        kinds[form] = weight
    for weight in kinds.values():
        four_bits.warm_up(weight, definition.dtype)
    return {name.rpartition(".")[0] for name in in_four_bits}


def _pack(definition: Any, head: VocabParallelHead | None, memory: WeightMemory, *, kept: str) -> Packing:
    products: list[Packable] = []
    for module in definition.modules():
        if isinstance(product := getattr(module, "product", None), Product):
            products.append(product)
        if isinstance(experts := getattr(module, "products", None), ExpertProducts):
            products.extend(experts.linears.values())
            experts.compile()
    if head is not None:
        products.append(head.product)
    assert memory.release is not None
    shared = PackedMemory(memory.allocate, memory.filled) if memory.shares_packed else None
    packing = Packing(products, memory.release, kept=kept, memory=shared)
    if shared is not None and shared.is_filled:
        packing.prepare()
    else:
        packing.pack()
    return packing


def _attention_modules(definition: Any) -> list[Any]:
    """The layers' attention modules, in the order of the layers."""
    found = [module for module in definition.modules() if hasattr(module, "o_proj") and hasattr(module, "layer_idx")]
    return sorted(found, key=lambda module: module.layer_idx)


def _layer_cache(module: Any) -> LayerCache:
    if hasattr(module, "kv_b_proj"):  # latent attention: what it expands to is cached, for every head
        num_heads = module.kv_b_proj.weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)
        return LayerCache(num_heads, module.qk_head_dim, module.v_head_dim)
    num_kv_heads = module.k_proj.weight.shape[0] // module.head_dim
    return LayerCache(num_kv_heads, module.head_dim, module.v_proj.weight.shape[0] // num_kv_heads)
