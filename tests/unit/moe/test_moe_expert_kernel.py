"""One kernel computes a layer's experts as products of each do, with any of the instructions that it may use."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from phalanx.models.packed import can_pack
from phalanx.moe import expert_kernel
from phalanx.moe.expert_kernel import ExpertKernel, Instructions, find_kernel
from phalanx.moe.expert_kernel_llvm import make
from phalanx.moe.expert_products import ExpertProducts, install_products

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 6, 3, 128, 1120
"""More inputs than lie near the core at a time, in float32; and a last part of them that is smaller: 374, 374, 372."""

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, torch.device("cpu"))]
if (host := expert_kernel._find_host()) is None:
    pytest.skip("no kernel on this machine", allow_module_level=True)
KINDS = [
    Instructions(lanes, dots)
    for lanes in (8, 16)
    for dots in (False, True)
    if lanes <= host.instructions.lanes and dots <= (host.instructions.dots and lanes == 16)
]


def make_module(dtype: torch.dtype, family: str = "qwen3_moe", kind: Any = Qwen3MoeExperts) -> Any:
    sizes = {"num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "moe_intermediate_size": INNER}
    config = AutoConfig.for_model(family, hidden_size=HIDDEN, intermediate_size=INNER, **sizes)
    config._experts_implementation = "eager"
    module = kind(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(generator=generator).mul_(0.1)
    return module.to(dtype)


def install(module: Any) -> ExpertProducts:
    products = install_products("experts", module)
    for linear in products.linears.values():
        linear.pack()
    products.compile()
    return products


def use(products: ExpertProducts, instructions: Instructions) -> None:
    products._kernel = find_kernel(HIDDEN, INNER, products._module.down_proj.dtype, instructions)


def make_input(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Some choices are another rank's."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_ND = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    scores_NE = torch.randn(num_tokens, NUM_EXPERTS + 1, generator=generator).softmax(dim=1)
    weights_NK, local_NK = scores_NE.topk(TOP_K)
    return hidden_ND, local_NK, weights_NK.to(dtype)


def exact(module: Any, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """In float64."""
    out_ND = torch.zeros_like(hidden_ND, dtype=torch.float64)
    for token, k in torch.cartesian_prod(*map(torch.arange, local_NK.shape)).tolist():
        if (expert := int(local_NK[token, k])) < NUM_EXPERTS:
            up_O = module.gate_up_proj[expert].double() @ hidden_ND[token].double()
            inner_I = functional.silu(up_O[:INNER]) * up_O[INNER:]
            out_ND[token] += weights_NK[token, k].double() * (module.down_proj[expert].double() @ inner_I)
    return out_ND


@pytest.fixture
def threads() -> Iterator[None]:
    """More than cores, so that some wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("instructions", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_equals_the_exact_result_whatever_is_beside_a_row(dtype: torch.dtype, instructions: Instructions) -> None:
    """Bit for bit the same for a row alone as among others, of which an expert has from none to more than 24."""
    module = make_module(dtype)
    plain = make_module(dtype)
    with torch.inference_mode():
        products = install(module)
        use(products, instructions)
        for num_tokens in (1, 2, 9, 40, 72):
            x = make_input(num_tokens, dtype)
            out_ND, expected_ND = module(*x), exact(plain, *x)
            tolerance = 1e-6 if dtype == torch.float32 else 2**-7
            assert (out_ND - expected_ND).abs().max() <= tolerance * expected_ND.abs().max()
            one_by_one = [module(*(part[token : token + 1] for part in x)) for token in range(num_tokens)]
            assert torch.equal(torch.cat(one_by_one), out_ND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_close_as_products(dtype: torch.dtype) -> None:
    module, plain = make_module(dtype), make_module(dtype)
    x = make_input(30, dtype)
    with torch.inference_mode():
        products = install(module)
        assert products._kernel is not None
        by_kernel_ND, expected_ND = module(*x), exact(plain, *x)
        products._kernel = None
        by_products_ND = module(*x)
    allowed = 1.1 * (by_products_ND - expected_ND).abs().max() + 1e-7 * expected_ND.abs().max()
    assert (by_kernel_ND - expected_ND).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_computed_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(dtype)
    x = make_input(20, dtype)
    with torch.inference_mode():
        install(module)
        at_once_ND = module(*x)
        monkeypatch.setattr(expert_kernel, "_MOST_PAIRS", 7 * TOP_K)
        monkeypatch.setattr(expert_kernel, "_MOST_ROWS", 1)
        assert torch.equal(module(*x), at_once_ND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_with_its_token(dtype: torch.dtype) -> None:
    """And one without an expert here gets zeros."""
    module = make_module(dtype)
    hidden_ND, local_NK, weights_NK = make_input(3, dtype)
    hidden_ND[0] = float("nan")
    local_NK[1] = NUM_EXPERTS
    local_NK[0, 0] = local_NK[2, 0] = 1
    with torch.inference_mode():
        install(module)
        out_ND = module(hidden_ND, local_NK, weights_NK)
        alone_1D = module(hidden_ND[2:], local_NK[2:], weights_NK[2:])
    assert out_ND[0].isnan().all()
    assert not out_ND[1].any()
    assert torch.equal(out_ND[2:], alone_1D)
    assert not out_ND[2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_any_size(dtype: torch.dtype) -> None:
    """Of each input one, as the layer's output."""
    module = make_module(dtype)
    hidden_ND = torch.zeros(9, HIDDEN, dtype=dtype)
    hidden_ND[:, 0] = torch.tensor([0.0, 1e-30, -1e-3, 1.0, -20.0, 60.0, -86.0, 500.0, -500.0])
    for weight in (module.gate_up_proj, module.down_proj):
        weight[0] = 0.0
        weight[0][:, 0] = 1.0
    x = hidden_ND, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1, dtype=dtype)
    with torch.inference_mode():
        expected_ND = exact(module, *x)
        install(module)
        out_ND = module(*x)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out_ND.double(), expected_ND, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_move_are_computed_where_they_are(dtype: torch.dtype) -> None:
    module, plain = make_module(dtype), make_module(dtype)
    x = make_input(12, dtype)
    with torch.inference_mode():
        products = install(module)
        before_ND = module(*x)
        for linear in products.linears.values():
            rows = linear.read([4, 1])
            linear.write([1, 4], rows)
        for weight in (plain.gate_up_proj, plain.down_proj):
            weight[[1, 4]] = weight[[4, 1]]
        moved_ND, expected_ND = module(*x), exact(plain, *x)
        assert not torch.equal(moved_ND, before_ND)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        assert (moved_ND - expected_ND).abs().max() <= tolerance * expected_ND.abs().max()
        for linear in products.linears.values():
            linear.unpack()
        assert (module(*x) - expected_ND).abs().max() <= 2 * tolerance * expected_ND.abs().max()


def test_threads_do_not_share_what_is_between_the_products() -> None:
    """Ranks may be threads of one process."""
    modules = [make_module(torch.float32) for _ in range(2)]
    inputs = [make_input(num_tokens, torch.float32) for num_tokens in (40, 30)]
    wrong: list[int] = []

    def compute(i: int, expected_ND: Tensor) -> None:
        with torch.inference_mode():
            wrong.extend(i for _ in range(30) if not torch.equal(modules[i](*inputs[i]), expected_ND))

    with torch.inference_mode():
        for module in modules:
            install(module)
        expected = [module(*x) for module, x in zip(modules, inputs, strict=True)]
    crew = [threading.Thread(target=compute, args=(i, expected[i])) for i in range(2)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join(60)
    assert not any(thread.is_alive() for thread in crew)
    assert not wrong


def test_matrix_units_get_what_has_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_on(dtype: torch.dtype, *, has_matrix_units: bool) -> ExpertKernel:
        kernel = find_kernel(HIDDEN, INNER, dtype)
        assert kernel is not None
        monkeypatch.setattr(kernel._code, "host", kernel._code.host._replace(has_matrix_units=has_matrix_units))
        return kernel

    few, many = torch.zeros(8, 4, dtype=torch.int64), torch.zeros(9, 4, dtype=torch.int64)
    elsewhere = torch.full((20, 4), 4)
    for dtype in DTYPES:
        kernel = kernel_on(dtype, has_matrix_units=True)
        assert kernel.suits(few, 4)
        assert kernel.suits(elsewhere, 4)
        assert kernel.suits(many, 4) == (dtype == torch.float32)
        assert kernel_on(dtype, has_matrix_units=False).suits(many, 4)


def test_others_are_computed_by_products(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Biases and other activations; sizes that are no multiples; and where there is no LLVM, which is said once."""
    expert_kernel.say_there_is_none.cache_clear()
    with caplog.at_level(logging.INFO, "phalanx.moe"):
        for _ in range(2):
            assert install(make_module(torch.float32, "gpt_oss", GptOssExperts))._kernel is None
            assert find_kernel(HIDDEN + 16, INNER, torch.float32) is None
            assert find_kernel(HIDDEN, INNER, torch.float64) is None
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "they have biases, or another activation than silu",
        f"{HIDDEN + 16} by {INNER} are no multiples of 64 by 32",
        "there is no kernel for torch.float64",
    ]
    caplog.clear()
    assert find_kernel(HIDDEN, INNER + 16, torch.float32) is None
    relu = make_module(torch.float32)
    relu.act_fn = torch.nn.ReLU()
    assert install(relu)._kernel is None
    expert_kernel._find_host.cache_clear()
    expert_kernel.say_there_is_none.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
        with caplog.at_level(logging.INFO, "phalanx.moe"):
            assert find_kernel(HIDDEN, INNER, torch.float32) is None
            assert find_kernel(HIDDEN, INNER, torch.float32) is None
    finally:
        expert_kernel._find_host.cache_clear()
    assert [record.message for record in caplog.records] == [
        "a mixture's experts are multiplied one by one: llvmlite is not installed"
    ]


@pytest.mark.parametrize("lanes", [8, 16])
def test_sums_stay_in_registers(lanes: Literal[8, 16]) -> None:
    """LLVM keeps a variable in memory unless it begins with its function."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(make("float32", Instructions(lanes, dots=False)))
    expert_kernel._optimise(module, llvm.Target.from_default_triple().create_target_machine(opt=3))
    assert "= alloca" not in str(module)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_that_are_forgotten_are_not_read(dtype: torch.dtype) -> None:
    module = make_module(dtype)
    x = make_input(9, dtype)
    with torch.inference_mode():
        products = install(module)
        module(*x)
        for weight in (module.gate_up_proj, module.down_proj):
            weight.mul_(0.5)
        for linear in products.linears.values():
            linear.forget()
        expected_ND = exact(module, *x)
        tolerance = 2e-6 if dtype == torch.float32 else 2**-6
        assert (module(*x) - expected_ND).abs().max() <= tolerance * expected_ND.abs().max()
