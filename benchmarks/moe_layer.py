"""The experts of one layer: as our rank computes them, against transformers' own module and, on a CPU, vLLM's kernel.

    python benchmarks/moe_layer.py [--peer-python PATH] [--tokens 1 --tokens 512] [--threads 2] [--short]
    python benchmarks/moe_layer.py --device cuda [--tokens 1 --tokens 64 --tokens 4096]

Qwen3-MoE's experts with random weights and routes, the same for all: on a CPU hidden size 1024, 32 experts, 4 for each
token, inner size 384; on a GPU, in bfloat16 alone, Qwen3-30B-A3B's 2048, 128, 8 and 768. A GPU is given ten calls, then
waited for. *Ours* is what a rank that is alone computes; *EP 2* is one of two ranks with half of the experts
(`share_out`), and *TP 2* one of two with half of each expert, both without what the ranks exchange: that is measured by
all_reduce.py. On a CPU all three have packed weights, as our models. *4-bit*, on a GPU, is *ours* with weights that
stay in 4 bits, in groups of 128 inputs with zero points; its ratio is to *ours* in bfloat16. *transformers* is its
module as its models call it, *vLLM* the kernel that its CPU build would choose. All have the same threads, take turns
in rounds, and go through several inputs, so that the next call finds other experts in the caches. Medians in
microseconds; ratios are ours to theirs, the median over the rounds.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from control_plane import CONTESTANTS, Case, Contestant
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.models.packed import can_pack
from phalanx.moe.dispatcher import AllGatherReduceScatter
from phalanx.moe.expert_groups import install_groups
from phalanx.moe.expert_products import install_products
from phalanx.moe.experts import share_out
from phalanx.moe.four_bits import FourBitWeight, pack
from phalanx.topology.sharding import Span

NUM_INPUTS = 8
NUM_CALLS = {1: 200, 8: 100, 64: 40}
LEAST_CALLS = 10
GROUP = 128
"""Inputs that have a scale in common, of weights in 4 bits."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of the largest output."""


class Shape(NamedTuple):
    hidden: int
    experts: int
    top_k: int
    inner: int


class Bench(NamedTuple):
    """What is measured on a device."""

    device: str
    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    calls_in_turn: int
    """Calls from one look at the clock to the next."""


BENCHES = {
    "cpu": Bench("cpu", Shape(1024, 32, 4, 384), (torch.bfloat16, torch.float32), 1),
    "cuda": Bench("cuda", Shape(2048, 128, 8, 768), (torch.bfloat16,), 10),
}


class Input(NamedTuple):
    hidden_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


class Row(NamedTuple):
    """Microseconds of one round."""

    ours: float
    ep: float
    tp: float
    four_bits: float | None
    transformers: float
    vllm: float | None


def make_experts(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.inner,
    )
    config._experts_implementation = "grouped_mm"  # what a model has by default
    module = Qwen3MoeExperts(copy.deepcopy(config)).to(device, dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(std=0.02)
    return module


def make_input(shape: Shape, num_tokens: int, dtype: torch.dtype, device: str) -> Input:
    weights_TK, experts_TK = torch.randn(num_tokens, shape.experts).softmax(dim=-1).topk(shape.top_k)
    weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    hidden_TD = torch.randn(num_tokens, shape.hidden)
    return Input(hidden_TD.to(device, dtype), experts_TK.to(device), weights_TK.to(device, dtype))


def install(module: Any) -> None:
    """Have it compute as a model of ours does."""
    if module.down_proj.device.type == "cuda":
        install_groups(module)
        return
    products = install_products("experts", module)
    if can_pack(module.down_proj.dtype, module.down_proj.device):
        for linear in products.linears.values():
            linear.pack()
        products.compile()


def on_one_of_two(module: Any, mine: Span) -> Callable[[Input], Tensor]:
    """The module with the experts `mine`, as a rank that shares the experts out calls it, without its peers."""
    alone = SingleGroup(GroupSpec("alone", "single", (0,), epoch=1, timeout_s=1.0, join_timeout_s=1.0))
    dispatcher = AllGatherReduceScatter(alone, alone)
    install(module)
    share_out(module, mine, dispatcher)

    def compute(x: Input) -> Tensor:
        dispatcher.begin([len(x.hidden_TD)])
        out_TD: Tensor = module(*x)
        return out_TD

    return compute


def in_four_bits(weight_EOI: Tensor) -> tuple[FourBitWeight, Tensor]:
    """Each group's range in 16 steps; and the weight that this stands for."""
    group_EOGN = weight_EOI.float().view(*weight_EOI.shape[:2], -1, GROUP)
    low_EOG, high_EOG = group_EOGN.amin(3).clamp(max=0), group_EOGN.amax(3).clamp(min=0)
    scale_EOG = ((high_EOG - low_EOG) / 15).to(weight_EOI.dtype)
    zero_EOG = (-low_EOG / scale_EOG.float()).round().clamp(0, 15)
    scale_EOG1, zero_EOG1 = scale_EOG.float()[..., None], zero_EOG[..., None]
    number_EOGN = (group_EOGN / scale_EOG1 + zero_EOG1).round().clamp(0, 15)
    stands_for_EOI = ((number_EOGN - zero_EOG1) * scale_EOG1).flatten(2).to(weight_EOI.dtype)
    numbers_EOB = torch.stack([pack(number_OI) for number_OI in number_EOGN.flatten(2).to(torch.uint8)])
    scales_EGO, zeros_EGO = (part.transpose(1, 2).contiguous() for part in (scale_EOG, zero_EOG.to(torch.int8)))
    return FourBitWeight(numbers_EOB, scales_EGO, zeros_EGO), stands_for_EOI


class Layer:
    """One dtype: the same experts several times, and inputs."""

    def __init__(self, bench: Bench, dtype: torch.dtype, sizes: Sequence[int]) -> None:
        shape = bench.shape
        self.bench, self.dtype = bench, dtype
        self.weights = dict(make_experts(shape, dtype, bench.device).state_dict())
        self.inputs = {
            size: [make_input(shape, size, dtype, bench.device) for _ in range(NUM_INPUTS)] for size in sizes
        }
        half, inner = shape.experts // 2, shape.inner // 2
        gate, up = self.weights["gate_up_proj"].chunk(2, dim=1)
        theirs = self._module(self.weights)
        whole = self._module(self.weights)
        some = self._module({name: weight[:half].clone() for name, weight in self.weights.items()}, experts=half)
        parts = self._module(
            {
                "gate_up_proj": torch.cat([gate[:, :inner], up[:, :inner]], dim=1),
                "down_proj": self.weights["down_proj"][:, :, :inner].clone(),
            },
            inner=inner,
        )
        install(whole)
        install(parts)
        self.contestants: dict[str, Callable[[Input], Tensor]] = {
            "ours": lambda x: whole(*x),
            "ep": on_one_of_two(some, Span(0, half)),
            "tp": lambda x: parts(*x),
            "transformers": lambda x: theirs(*x),
        }
        if bench.device == "cuda":
            self._add_four_bits()

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def save(self, folder: Path) -> None:
        """For the peer."""
        tensors = dict(self.weights)
        for size, inputs in self.inputs.items():
            for i, x in enumerate(inputs):
                for part, tensor in zip(("hidden", "indices", "weights"), x, strict=True):
                    tensors[f"{size}.{i}.{part}"] = tensor.contiguous()
        save_file(tensors, folder / f"{self.name}.safetensors")

    def check(self, found: dict[str, Tensor]) -> None:
        """That ours, and what the peer `found` by number of tokens, is what transformers makes."""
        for size, (x, *_) in self.inputs.items():
            expected_TD = self.contestants["transformers"](x)
            self._compare("ours", self.contestants["ours"](x), expected_TD)
            if str(size) in found:
                self._compare("vLLM", found[str(size)], expected_TD)
            if "four_bits" in self.contestants:
                stands_for_TD = self._stands_for(*x)
                self._compare("4-bit", self.contestants["four_bits"](x), stands_for_TD)

    def _add_four_bits(self) -> None:
        packed = self._module(self.weights)
        stands_for = {}
        weights = {}
        for name, weight in self.weights.items():
            weights[name], stands_for[name] = in_four_bits(weight)
        install(packed)
        for name, four_bits in weights.items():
            delattr(packed, name)
            setattr(packed, name, four_bits)
        self.contestants["four_bits"] = lambda x: packed(*x)
        self._stands_for = self._module(stands_for)

    def _compare(self, name: str, out_TD: Tensor, expected_TD: Tensor) -> None:
        error = (out_TD.float() - expected_TD.float()).abs().max() / expected_TD.float().abs().max()
        if error > TOLERANCE[self.dtype]:
            raise click.ClickException(f"{name} computes something else in {self.name}: {error:.2e}")

    def _module(self, weights: dict[str, Tensor], **sizes: int) -> Any:
        module = make_experts(self.bench.shape._replace(**sizes), self.dtype, self.bench.device)
        module.load_state_dict(weights)
        return module


def median_us(compute: Callable[[Input], Tensor], inputs: Iterator[Input], num_calls: int, bench: Bench) -> float:
    times_s = []
    for call in range(3 + num_calls):
        turn = list(itertools.islice(inputs, bench.calls_in_turn))
        began_at = time.perf_counter()
        for x in turn:
            compute(x)
        if bench.device == "cuda":
            torch.cuda.synchronize()
        if call >= 3:
            times_s.append((time.perf_counter() - began_at) / len(turn))
    return statistics.median(times_s) * 1e6


def measure(layer: Layer, size: int, peer: Contestant | None, num_calls: int, rounds: int) -> list[Row]:
    inputs = {name: itertools.cycle(layer.inputs[size]) for name in layer.contestants}
    rows = []
    for _ in range(rounds):
        times = {name: median_us(run, inputs[name], num_calls, layer.bench) for name, run in layer.contestants.items()}
        theirs = peer.measure(Case(f"{layer.name} {size}", 0.0, num_calls)).median_us if peer else None
        ours = (times["ours"], times["ep"], times["tp"], times.get("four_bits"))
        rows.append(Row(*ours, times["transformers"], theirs))
    return rows


def report(layer: Layer, size: int, rows: Sequence[Row]) -> None:
    """One line of the table."""
    ours, ep, tp = (statistics.median(column) for column in list(zip(*rows, strict=True))[:3])
    transformers = statistics.median(row.transformers for row in rows)
    ratio = statistics.median(row.ours / row.transformers for row in rows)
    line = f"{layer.name:8} {size:6} | {ours:8.0f} {ep:8.0f} {tp:8.0f} | {transformers:12.0f} {ratio:6.2f}"
    if all(row.four_bits for row in rows):
        four_bits = statistics.median(row.four_bits for row in rows if row.four_bits)
        line += (
            f" | {four_bits:8.0f} {statistics.median(row.four_bits / row.ours for row in rows if row.four_bits):6.2f}"
        )
    if all(row.vllm for row in rows):
        vllm = statistics.median(row.vllm for row in rows if row.vllm)
        line += f" | {vllm:8.0f} {statistics.median(row.ours / row.vllm for row in rows if row.vllm):6.2f}"
    click.echo(line)


@contextlib.contextmanager
def running_peer(python: Path | None, folder: Path, threads: int) -> Iterator[Contestant | None]:
    """vLLM's kernel in its own process; None, and a line that says why, if it cannot be had."""
    if python is None or not python.exists():
        click.echo(f"skipped vLLM: {'give --peer-python to compare' if python is None else f'there is no {python}'}")
        yield None
        return
    os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_NO_USAGE_STATS": "1"}
    try:
        peer = Contestant("vllm", [str(python), str(CONTESTANTS / "vllm_experts.py")], folder)
    except click.ClickException as error:
        click.echo(f"skipped vLLM: {error.message}")
        yield None
        return
    with contextlib.closing(peer):
        yield peer


@click.command()
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--tokens", "sizes", type=click.IntRange(1), multiple=True, default=(1, 8, 64, 512), show_default=True)
@click.option("--device", type=click.Choice(list(BENCHES)), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), show_default="all cores")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--short", is_flag=True, help="A tenth of the calls: to see that it works.")
def main(peer_python: Path | None, sizes: tuple[int, ...], device: str, threads: int, rounds: int, short: bool) -> None:
    """Time the experts of one layer."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestant, a stopped one too, is ended
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bench = BENCHES[device]
    if device != "cpu" and peer_python is not None:
        raise click.UsageError("--peer-python: vLLM's CPU kernel is compared on a CPU only")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        layers = [Layer(bench, dtype, sizes) for dtype in bench.dtypes]
        if peer_python is not None:
            for layer in layers:
                layer.save(Path(folder))
        with running_peer(peer_python, Path(folder), threads) as peer:
            for layer in layers:
                layer.check(load_file(Path(folder) / f"{layer.name}.vllm") if peer else {})
            where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"
            click.echo(f"{where}, load {os.getloadavg()[0]:.2f}")
            click.echo(
                "dtype    tokens |     ours     EP 2     TP 2 | transformers  ratio"
                + (" |    4-bit  ratio" if device == "cuda" else "")
                + (" |     vLLM  ratio" if peer else "")
            )
            for layer, size in itertools.product(layers, sizes):
                num_calls = NUM_CALLS.get(size, LEAST_CALLS)
                num_calls = max(3, num_calls // 10) if short else num_calls
                report(layer, size, measure(layer, size, peer, num_calls, rounds))


if __name__ == "__main__":
    main()
