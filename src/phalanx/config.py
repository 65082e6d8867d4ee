"""What can be set, in frozen sections that are checked as a whole.

The command line's flags are made from these sections: a field `max_num_seqs` is the flag `--max-num-seqs`, its
docstring the help text, its constraint the check. Names follow vLLM's where the meaning is the same.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from phalanx.errors import ConfigError, as_told

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NumBytes = Annotated[int, Meta(ge=1, le=2**62)]
Name = Annotated[str, Meta(min_length=1)]
Ranks = Annotated[int, Meta(ge=1, le=64)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Share = Annotated[float, Meta(gt=0.0, le=1024.0)]
Replicas = Annotated[int, Meta(ge=0, le=64)]
Standbys = Annotated[int, Meta(ge=0, le=1)]
Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0.0, le=1e6)]  # every wait has a deadline: none is infinite
Restarts = Annotated[int, Meta(ge=0, le=1000)]
Port = Annotated[int, Meta(ge=0, le=65535)]
All2All = Literal["allgather_reducescatter", "alltoall"]

log = logging.getLogger("phalanx.config")


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings. Immutable; unknown names are refused."""


AnySection = TypeVar("AnySection", bound=Section)


class ModelConfig(Section, frozen=True, kw_only=True):
    """What is computed: the model, its numbers, and its tokenizer."""

    model: Name
    """A checkpoint directory (safetensors), a GGUF file, or the name of a model on the Hugging Face hub."""

    revision: Name | None = None
    """Branch, tag or commit of a hub model."""

    tokenizer: Name | None = None
    """Directory or hub name of the tokenizer, when it is not the model's own."""

    served_model_name: Name | None = None
    """The name that API clients use; the model's own name by default."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV cache. `auto` takes the checkpoint's."""

    max_model_len: Positive | None = None
    """Longest prompt plus output, in tokens; the model's own limit by default."""

    pack_weights: bool = True
    """On a CPU, hold the weights of linear layers as its matrix kernels read them. Faster, and no larger, but that an
    embedding which is also the model's head is then held twice."""

    share_weights: Literal["auto", "always", "never"] = "auto"
    """On a CPU, have a replica that joins others on this host (`phalanx scale`, auto-grow, an engine that is started
    again) compute with the very weights of one that serves, instead of reading a copy of its own. `auto`: but on hosts
    with several NUMA nodes, where a processor would read weights from the memory of another one."""

    dequantise_weights: bool = False
    """On a GPU, dequantise the experts of a mixture that are stored in 4 bits (AWQ, compressed-tensors) while they are
    read, as all other weights are. They take four times the memory, and worker extensions can read and write them."""


class ParallelConfig(Section, frozen=True, kw_only=True):
    """How many ranks there are, and which part each has."""

    tensor_parallel_size: Ranks = 1
    """Ranks that share every layer."""

    pipeline_parallel_size: Ranks = 1
    """Stages that the layers are shared out to, each of tensor-parallel-size ranks. Several steps are under way at a
    time, one in each stage."""

    data_parallel_size: Ranks = 1
    """Replicas, each of tensor-parallel-size times pipeline-parallel-size ranks, that share the requests. With
    enable-expert-parallel they compute every step together."""

    data_parallel_size_local: Replicas | None = None
    """With launcher ray, how many of the replicas are on the node that the command runs on; the others are elsewhere.
    By default the ranks are on as few nodes as possible, that one first."""

    enable_expert_parallel: bool = False
    """Of a mixture of experts, give each rank whole experts, shared out to all ranks of all replicas, instead of a part
    of every expert."""

    all2all_backend: All2All = "allgather_reducescatter"
    """How tokens get to their experts and back: `allgather_reducescatter` gives every rank the tokens of all replicas,
    `alltoall` sends each token only to the ranks that have its experts."""

    enable_eplb: bool = False
    """Measure the load of every expert, and move experts between ranks when that evens it out."""

    num_redundant_experts: Index = 0
    """With enable-eplb, copies of experts in each layer beyond one of each; the experts with most tokens get them."""

    eplb_interval_steps: Positive = 3000
    """With enable-eplb, steps from one measurement of the load to the next."""

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def engine_size(self) -> int:
        """Ranks that one brain drives: all, unless the replicas have nothing to do with each other."""
        is_one = self.enable_expert_parallel or self.data_parallel_size == 1
        return self.world_size if is_one else self.world_size // self.data_parallel_size


class CacheConfig(Section, frozen=True, kw_only=True):
    """The KV cache."""

    block_size: Positive = 16
    """Tokens in one block of the KV cache."""

    kv_cache_memory: NumBytes | None = None
    """Bytes of KV cache on each rank. By default what the device has left on a GPU, and on a CPU what the limits on
    sequences and length can use, within a quarter of the memory that is free."""

    gpu_memory_utilization: Fraction = 0.9
    """Share of a GPU's memory for weights, activations and KV cache together."""

    enable_prefix_caching: bool = True
    """Keep the KV cache of finished requests for later ones that start with the same tokens."""


class SchedulerConfig(Section, frozen=True, kw_only=True):
    """What a step takes on."""

    max_num_seqs: Positive = 256
    """Most requests that run at a time; the rest wait."""

    max_num_batched_tokens: Positive = 2048
    """Most tokens that one step computes. A longer prompt is computed in chunks."""

    async_scheduling: bool = True
    """Send the next step's plan while the current step computes."""


class ExecutorConfig(Section, frozen=True, kw_only=True):
    """Where ranks run, how long anything may take, and what is kept of it."""

    launcher: Literal["auto", "inline", "local", "ray"] = "auto"
    """How workers start: `inline` runs the one rank inside the engine's process, `local` starts a process per rank on
    this host, `ray` an actor per rank on the nodes of a Ray cluster. `auto` takes `inline` for one rank and `local` for
    more."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute. `auto` takes the GPUs when there are enough of them."""

    collective_backend: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    """How ranks exchange tensors. `auto`: NCCL between GPUs, shared memory between CPU ranks of one host."""

    worker_extension_cls: Name | None = None
    """`package.module:Class` whose methods marked with `remote_method` every rank offers to `collective_rpc`, for
    programs in Python to call; made with the worker when the model is loaded."""

    threads_per_rank: Positive | None = None
    """CPU threads of each rank; by default the cores are shared out evenly, and never more than there are."""

    start_timeout_s: Seconds = 600.0
    """Longest time from start to ready, all in all, once the model's files are here."""

    step_timeout_s: Seconds = 60.0
    """Longest time for one step before the rank that is awaited is named and the run ends. An inline rank cannot be
    interrupted on a CPU: its step is an error when it has ended, and `phalanx serve` kills an engine that is silent for
    15 s longer than this."""

    engine_restarts: Restarts = 3
    """How many times within 10 minutes an engine that ends before its time is started again. Its requests wait, and go
    on where they were. 0: the server ends with its engine."""

    cuda_graphs: bool = True
    """On GPUs, capture decode steps in CUDA graphs at the start and replay them: steps of few requests then take much
    less time. It takes some seconds and up to a few gigabytes of each GPU, depending on max-num-seqs. Models that wait
    for the GPU within a step, all2all-backend alltoall and enable-eplb do without."""

    ledger: bool = True
    """Have each rank note its steps and collectives where they outlive it, and a process watch them that says within a
    second or two which rank is to blame when others wait for it; with Ray on every node. The rank inside the engine's
    process (`inline`) has none."""

    collective_guard: Literal["off", "digest", "strict"] = "digest"
    """What is done about ranks that issue different collectives. `digest`: after each step, what all have issued in it
    is compared, so that the run ends also where nobody hangs. `strict`, for debugging: besides, ranks compare each
    collective before they issue it, so that the call that is wrong raises the error. `off`: nothing."""

    ledger_events: Name | None = None
    """With the ledger, a file to append its verdicts to, and their ends, each a line of JSON."""

    allow_chaos: bool = False
    """Let `phalanx chaos --pid` kill, stop and mislead ranks while they serve. Never where somebody relies on the
    engine."""

    ledger_dump: Name | None = None
    """A directory to which each verdict of the ledger is written, with all that the ranks noted, for `phalanx trace` to
    analyse. The newest 16 are kept."""


class ClusterConfig(Section, frozen=True, kw_only=True):
    """For `launcher` ray alone."""

    ray_address: Name | None = None
    """Host and port of the Ray cluster to join, or `local` to start a Ray of its own. By default the Ray that this
    process is connected to, then RAY_ADDRESS, then the one that runs on this host; if there is none, one is started and
    ended with the engine."""

    placement_group: Name | None = None
    """Name or id of a Ray placement group that exists, with a bundle for each rank. By default the one that the calling
    Ray task or actor is in; otherwise one is made, and removed at the end. From Python the object will do."""

    ray_bundle_indices: tuple[Index, ...] | None = None
    """The bundle of each rank in the placement group, in rank order, such as 0,1,4,5. By default ranks are given to the
    bundles node by node, the engine's own node first."""

    avoid_nodes: tuple[Name, ...] = ()
    """Names or addresses of nodes that no rank is to come to, whatever is free there, such as beta,10.0.0.7. `phalanx
    drain` adds one to an engine that serves."""

    ray_per_worker_gpus: Share = 1.0
    """How much of a GPU (or, computing on the CPU, how many of Ray's CPUs) each rank reserves. A fraction lets several
    engines share a GPU; ranks of one engine never do, so at a half or less only one of them can be on a node."""

    ray_runtime_env: dict[str, Any] | None = None
    """Ray's runtime environment for the workers, a JSON object."""

    ray_workers_use_nsight: bool = False
    """Run each worker under Nsight Systems."""

    allow_split_tensor_parallel: bool = False
    """Let the ranks of a tensor-parallel group be on several nodes if they fit on none. Every layer then waits for the
    network."""

    node_address: Name | None = None
    """Address or name of this host that the other nodes reach it at; Ray's own by default."""

    network_interface: Name | None = None
    """The interface that the other nodes are reached through, such as eth1, for hosts that have several; by default the
    one with the address that Ray uses."""

    node_timeout_s: Seconds = 10.0
    """A node that is silent for so long is given up; shorter stalls of the network are survived (before Linux 6.15
    those of up to half of it)."""


class HealingConfig(Section, frozen=True, kw_only=True):
    """What is done about ranks that fail."""

    heal: bool = True
    """When a rank dies, is stopped, hangs, diverges or fails, end all ranks and go on with new ones. Requests only
    pause, and no token is lost or sent twice. Without it, the first fault ends the engine."""

    standby: Standbys = 0
    """1 keeps a second set of ranks ready behind the one that computes, so that a fault costs a fraction of a second
    instead of a start. It takes a second set of processes on the same weights and KV cache, and 1.5 GiB or more of each
    GPU."""

    heal_timeout_s: Seconds = 120.0
    """Longest time from a fault to ranks that compute again, whatever is tried meanwhile; then the engine ends."""

    auto_grow: bool = False
    """When replicas were lost with their places (a node is gone, or was drained, and no other had room), start them
    again by itself as soon as there is room, such as on a node that joins Ray. Otherwise `phalanx scale` does it."""


class ServerConfig(Section, frozen=True, kw_only=True):
    """How `phalanx serve` is reached, and how it ends."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback should have an API key: see --api-key-file."""

    port: Port = 8000
    """Port to listen on; 0 lets the system pick one, which is then printed."""

    api_key_file: str | None = None
    """File whose lines are the accepted API keys (a key in argv would show in `ps`); PHALANX_API_KEY works too."""

    shutdown_timeout_s: Seconds = 10.0
    """After the first Ctrl-C or SIGTERM, how long running requests may still take before they are cancelled."""


class Config(Section, frozen=True, kw_only=True):
    """All settings of one engine."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    executor: ExecutorConfig = ExecutorConfig()
    cluster: ClusterConfig = ClusterConfig()
    healing: HealingConfig = HealingConfig()

    @classmethod
    def build(cls, **settings: Any) -> Config:
        """Config from flat names, such as `Config.build(model="m", tensor_parallel_size=2)`.

        Raises ConfigError: an unknown name, a wrong type, a value out of range, or values that contradict each other.
        """
        sections: dict[str, dict[str, Any]] = {name: {} for name in cls.__struct_fields__}
        section_of = settings_by_name()
        for name, value in settings.items():
            if name not in section_of:
                raise ConfigError(name, value, f"there is no such setting; known are {', '.join(sorted(section_of))}")
            sections[section_of[name]][name] = _as_setting(value)
        config = convert(sections, cls)
        config.refuse_contradictions()
        return config

    def of_engines(self) -> tuple[Config, ...]:
        """The configuration of each engine: this one, or one for each replica if they run apart."""
        parallel, num_local = self.parallel, self.parallel.data_parallel_size_local
        if parallel.engine_size == parallel.world_size:
            return (self,)
        own = [
            msgspec.structs.replace(
                parallel,
                data_parallel_size=1,
                data_parallel_size_local=None if num_local is None else int(replica < num_local),
            )
            for replica in range(parallel.data_parallel_size)
        ]
        return tuple(msgspec.structs.replace(self, parallel=one) for one in own)

    def with_model(self, model: str, tokenizer: str) -> Config:
        """The same with another checkpoint directory. Its tokenizer stays, or is this one's if it names none."""
        after = msgspec.structs.replace(
            self.model, model=model, revision=None, tokenizer=self.model.tokenizer or tokenizer
        )
        return msgspec.structs.replace(self, model=after)

    def changed(self) -> dict[str, str]:
        """The settings that are not the defaults, as text, without what may be secret."""
        sections = [(section, type(section)) for section in (getattr(self, name) for name in self.__struct_fields__)]
        return {
            field.name: str(as_told(field.name, value))
            for section, kind in sections
            for field in msgspec.structs.fields(kind)
            if (value := getattr(section, field.name)) != field.default
        }

    def check(self) -> None:
        """Check what no single field can tell, when nothing that a launcher has to settle is `auto` any more.

        Raises ConfigError for settings that contradict each other, and warns of those that this run has no use for.
        """
        self.refuse_contradictions()
        for field, reason in self._without_effect():
            self.warn_without_effect(field, reason)

    def warn_without_effect(self, field: str, reason: str) -> None:
        """Say once that nothing reads a setting that the user has changed."""
        value = getattr(getattr(self, settings_by_name()[field]), field)
        _warn_once(f"{field} = {as_told(field, value)!r} has no effect: {reason}")

    def refuse_contradictions(self) -> None:
        """Raises ConfigError, whatever is still `auto`."""
        parallel = self.parallel
        if self.executor.launcher == "inline" and parallel.engine_size > 1:
            raise ConfigError(
                "launcher", "inline", f"it runs one rank, and {parallel.engine_size} are asked for; use local"
            )
        if parallel.engine_size < parallel.world_size:
            for name in ("placement_group", "ray_bundle_indices"):
                if (value := getattr(self.cluster, name)) is not None:
                    raise ConfigError(name, value, "not with replicas that run apart: each has a group of its own")
        self._refuse_local_replicas()
        if self.healing.standby and not self.healing.heal:
            raise ConfigError("standby", self.healing.standby, "only with heal")
        if self.healing.standby and self.executor.device == "cuda" and parallel.enable_eplb:
            reason = "0 with enable_eplb on GPUs: experts move, so that each line would have weights of its own"
            raise ConfigError("standby", self.healing.standby, reason)
        if parallel.enable_eplb and not parallel.enable_expert_parallel:
            raise ConfigError("enable_eplb", True, "only with enable_expert_parallel")
        if parallel.num_redundant_experts and not parallel.enable_eplb:
            raise ConfigError("num_redundant_experts", parallel.num_redundant_experts, "only with enable_eplb")
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                self.scheduler.max_num_batched_tokens,
                f"a step must hold one token of each running request: at least max_num_seqs "
                f"({self.scheduler.max_num_seqs})",
            )
        if self.executor.launcher != "ray":
            for field in msgspec.structs.fields(ClusterConfig):
                if (value := getattr(self.cluster, field.name)) != field.default:
                    raise ConfigError(field.name, value, "only with launcher ray")
        if self.executor.device == "cpu" and self.executor.collective_backend == "nccl":
            raise ConfigError("collective_backend", "nccl", "with device cpu: auto, shm or gloo")
        if self.executor.device == "cuda" and self.executor.collective_backend in ("shm", "gloo"):
            raise ConfigError("collective_backend", self.executor.collective_backend, "with device cuda: auto or nccl")

    def _refuse_local_replicas(self) -> None:
        asked, num_replicas = self.parallel.data_parallel_size_local, self.parallel.data_parallel_size
        if asked is None or asked == num_replicas:
            return
        if asked > num_replicas:
            raise ConfigError("data_parallel_size_local", asked, f"at most data_parallel_size ({num_replicas})")
        if self.executor.launcher != "ray":
            allowed = f"without launcher ray all replicas ({num_replicas}) are on this host"
            raise ConfigError("data_parallel_size_local", asked, allowed)

    def _without_effect(self) -> Iterator[tuple[str, str]]:
        """Settings that the user has changed and nothing will read, with the reason."""
        device = self.executor.device
        if self.cache.gpu_memory_utilization != CacheConfig().gpu_memory_utilization:
            if device == "cpu":
                yield "gpu_memory_utilization", "the ranks compute on the CPU; kv_cache_memory limits the cache there"
            elif self.cache.kv_cache_memory is not None:
                yield "gpu_memory_utilization", "kv_cache_memory says how large the KV cache is"
        if self.executor.collective_backend != "auto" and self.parallel.world_size == 1:
            yield "collective_backend", "one rank has nobody to exchange tensors with"
        if not self.executor.cuda_graphs and device == "cpu":
            yield "cuda_graphs", "the ranks compute on the CPU"
        if self.executor.collective_guard == "strict" and self.parallel.engine_size == 1:
            yield "collective_guard", "one rank has nobody to agree with"
        has_ledger = self.executor.ledger and self.executor.launcher != "inline"
        if self.executor.ledger_events is not None and not has_ledger:
            yield "ledger_events", "there is no ledger"
        if self.executor.ledger_dump is not None and not has_ledger:
            yield "ledger_dump", "there is no ledger"
        yield from self._healing_without_effect()
        if not self.model.pack_weights and device == "cuda":
            yield "pack_weights", "weights are packed on a CPU only"
        elif not self.model.pack_weights and self.model.dtype == "float16":
            yield "pack_weights", "float16 weights are never packed"
        if self.model.share_weights == "always" and (reason := self._why_weights_are_not_shared()):
            yield "share_weights", reason
        if self.model.dequantise_weights and device == "cpu":
            yield "dequantise_weights", "on a CPU all weights are dequantised"
        has_other_way = self.parallel.all2all_backend != ParallelConfig().all2all_backend
        if has_other_way and not self.parallel.enable_expert_parallel:
            yield "all2all_backend", "without enable_expert_parallel every rank has a part of each expert"
        if self.parallel.eplb_interval_steps != ParallelConfig().eplb_interval_steps and not self.parallel.enable_eplb:
            yield "eplb_interval_steps", "without enable_eplb no expert ever moves"
        if self.parallel.enable_eplb and self.parallel.world_size == self.parallel.pipeline_parallel_size:
            yield "enable_eplb", "one rank has all experts of its layers"
        if self.cluster.allow_split_tensor_parallel and self.parallel.tensor_parallel_size == 1:
            yield "allow_split_tensor_parallel", "there is one rank in each tensor-parallel group"

    def _why_weights_are_not_shared(self) -> str | None:
        if self.executor.device == "cuda":
            return "weights are shared on a CPU only"
        if self.parallel.enable_expert_parallel:
            return "replicas that share experts are one engine"
        if not self.healing.heal:
            return "with heal off, nobody holds weights for others"
        if self.executor.launcher == "ray":
            return "replicas with launcher ray read their own"
        return "worker_extension_cls may write to weights" if self.executor.worker_extension_cls else None

    def _healing_without_effect(self) -> Iterator[tuple[str, str]]:
        if self.healing.heal_timeout_s != HealingConfig().heal_timeout_s and not self.healing.heal:
            yield "heal_timeout_s", "nothing is to heal"
        if self.healing.standby and self.executor.launcher == "inline":
            yield "standby", "one rank in the engine's process has no second one behind it; with launcher local it has"
        if self.healing.auto_grow and self.parallel.enable_expert_parallel:
            yield "auto_grow", "replicas that share experts are lost and healed all together"


def convert(values: dict[str, Any], kind: type[AnySection]) -> AnySection:
    """A section, or the whole Config, from dictionaries. Raises ConfigError naming the field and what is allowed."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        complaint, _, where = str(error).partition(" - at `")
        if where.startswith("key` in `"):  # the key itself is wrong, in this dictionary
            complaint, where = f"of each key: {complaint}", where.removeprefix("key` in `")
        path = where.rstrip("`").split(".")[1:]  # the first one is `$`, the whole
        if missing := re.search("missing required field `(.*)`", complaint):
            raise ConfigError(missing[1], None, "it is required") from None
        found: Any = values
        owner: Any = kind
        for name in (part.partition("[")[0] for part in path):
            found = found[name]
            owner = get_type_hints(owner)[name]
        allowed = _choices(owner) if path else None
        field = path[-1].partition("[")[0] if path else kind.__name__
        raise ConfigError(field, found, allowed or complaint) from None


@functools.cache
def _warn_once(warning: str) -> None:
    """A configuration may be checked by several who settle parts of it."""
    log.warning("%s", warning)


def _as_setting(value: Any) -> Any:
    """A Ray placement group becomes its id, which any process can look up."""
    identity: Any = getattr(value, "id", None)
    return identity.hex() if hasattr(identity, "hex") else value


def _choices(hint: Any) -> str | None:
    return f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else None


def settings_by_name() -> dict[str, str]:
    """Each setting's name and the section of Config that it belongs to."""
    hints = get_type_hints(Config)
    return {field: section for section in hints for field in hints[section].__struct_fields__}
