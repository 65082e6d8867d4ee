"""The instructions of expert_kernel.py, made with LLVM: a layer's experts for sorted pairs, by all threads of a team.

`sort(call)` sorts the pairs by experts. Then each thread of a team calls `compute(call)`, and takes tasks, whose
numbers they draw from a counter in common, in four passes with a barrier after each: tiles of 64 outputs of one
expert's first product, for all its rows; rows to gate; tiles of the second product; tokens to add up. A tile's weights
lie in one piece and come out of memory once, however many rows there are: some 64 KiB of them at a time stay near the
core for all rows, of which several are multiplied at a time, with their sums in registers. What is added up for a row,
and in which order, does not depend on other rows.

bfloat16 is multiplied by instructions for it, where there are some, and otherwise as float32. Sums are in float32.
Addresses are integers here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from llvmlite import ir

from phalanx.moe.expert_kernel import CACHE_LINE, NUM_COUNTERS, TILE, Call, Instructions

NEAR_BYTES = 64 * 1024
"""Of a tile's weights, multiplied with all rows before the next."""

READ_AHEAD_BYTES = 4096
INTO_SECOND_CACHE = 2
"""Where what is read ahead goes, for LLVM: there is room for more reads on their way than into the first cache."""

MOST_ROWS = 6
"""Whose sums are in registers at a time."""

UNROLL = 2
BARRIER = "GOMP_barrier"
"""OpenMP's function for this."""

Element = Literal["float32", "bfloat16"]

_DRAWN, _NUM_PAIRS, _NUM_ACTIVE = range(4), 4, 5
"""Counters, each with a line of the cache for itself: tasks that were drawn in each pass; and what sorting found."""

_I1, _I16, _I32, _I64, _F32, _VOID = (
    ir.IntType(1),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    ir.VoidType(),
)
_POINTER = ir.PointerType()


class _BFloat(ir.Type):  # type: ignore[misc]
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def make(element: Element, instructions: Instructions) -> str:
    """LLVM's text of a module with `sort` and `compute`, which calls BARRIER."""
    return str(_Experts(element, instructions).module)


class _Experts:
    """The functions of one module."""

    def __init__(self, element: Element, instructions: Instructions) -> None:
        self.module = ir.Module("experts")
        self.module.triple = ""
        self._is_bfloat16 = element == "bfloat16"
        self._bytes = 2 if self._is_bfloat16 else 4
        self._step_inputs = 2 if self._is_bfloat16 else 1
        self._lanes, self._dots = instructions
        self._floats = ir.VectorType(_F32, self._lanes)
        self._ints = ir.VectorType(_I32, self._lanes)
        self._declare()
        self._blocks = [self._make_block(num_rows) for num_rows in range(1, MOST_ROWS + 1)]
        self._products = self._make_products()
        self._gate = self._make_gate()
        self._add_up = self._make_add_up()
        self._make_compute()
        self._make_sort()

    # What a thread does

    def _make_compute(self) -> None:
        """void(call)."""
        function, b, (call,) = self._function("compute", [_I64])
        function.linkage = ""
        of = _Fields(b, call)
        numbers, up_at = of.numbers(), of.floats()
        num_pairs, num_active = of.counter(_NUM_PAIRS), of.counter(_NUM_ACTIVE)
        width = b.shl(of.get("inner"), _i64(3))  # bytes of a row of gates and ups in float32
        out_at = b.add(up_at, b.mul(num_pairs, width))
        hidden_width = b.shl(of.get("hidden"), _i64(2))
        drawn = [b.add(numbers, _i64(i * CACHE_LINE)) for i in _DRAWN]
        lists = [of.starts(), of.active(), num_active]
        up_tiles = b.udiv(b.shl(of.get("inner"), _i64(1)), _i64(TILE))
        down_tiles = b.udiv(of.get("hidden"), _i64(TILE))
        b.call(
            self._products,
            [
                *lists,
                *(of.get("at_hidden"), of.sources()),
                *(of.get("at_up"), up_tiles, of.get("hidden")),
                *(up_at, width, drawn[0]),
            ],
        )
        self._wait(b)
        b.call(self._gate, [num_pairs, up_at, of.get("inner"), drawn[1]])
        self._wait(b)
        b.call(
            self._products,
            [
                *lists,
                *(up_at, of.inner_rows()),
                *(of.get("at_down"), down_tiles, of.get("inner")),
                *(out_at, hidden_width, drawn[2]),
            ],
        )
        self._wait(b)
        b.call(self._add_up, [call, out_at, drawn[3]])
        b.ret_void()

    def _make_products(self) -> ir.Function:
        """void(starts, active, num_active, x, offsets, weights, tiles, inputs, out, stride, drawn)."""
        function, b, params = self._function("products", [_I64] * 11)
        starts, active, num_active, x, offsets, weights, tiles, inputs, out, stride, drawn = params
        tile_bytes = b.mul(inputs, _i64(TILE * self._bytes))
        near_inputs = _i64(NEAR_BYTES // (TILE * self._bytes))
        with self._drawing(b, drawn, b.mul(num_active, tiles)) as task:
            slot = self._load(b, _at(b, active, b.udiv(task, tiles)), _I64)
            tile = b.urem(task, tiles)
            first = self._load(b, _at(b, starts, slot), _I64)
            end = self._load(b, _at(b, starts, b.add(slot, _i64(1))), _I64)
            weight = b.add(self._load(b, _at(b, weights, slot), _I64), b.mul(tile, tile_bytes))
            out_tile = b.add(out, b.mul(tile, _i64(TILE * 4)))
            with _counting(b, _i64(0), inputs, near_inputs) as k:
                left = b.sub(inputs, k)
                near = b.select(b.icmp_unsigned("<", left, near_inputs), left, near_inputs)
                steps = b.udiv(near, _i64(self._step_inputs))
                near_x = b.add(x, b.mul(k, _i64(self._bytes)))
                near_weight = b.add(weight, b.mul(k, _i64(TILE * self._bytes)))
                is_first = b.icmp_unsigned("==", k, _i64(0))
                self._all_rows(b, first, end, [near_x, offsets, near_weight, out_tile, stride, steps, is_first])
        b.ret_void()
        return function

    def _all_rows(self, b: ir.IRBuilder, first: ir.Value, end: ir.Value, args: Sequence[ir.Value]) -> None:
        """Multiply rows by a part of a tile: MOST_ROWS at a time, and the last ones in even parts."""
        near_x, offsets, near_weight, out_tile, stride, steps, is_first = args
        with b.goto_entry_block():
            row_at = b.alloca(_I64)
        b.store(first, row_at)
        check, body, done = (b.append_basic_block() for _ in range(3))
        b.branch(check)
        b.position_at_end(check)
        row = b.load(row_at, typ=_I64)
        b.cbranch(b.icmp_unsigned("<", row, end), body, done)
        b.position_at_end(body)
        left = b.sub(end, row)
        half = b.lshr(b.add(left, _i64(1)), _i64(1))
        last = b.select(b.icmp_unsigned("<=", left, _i64(MOST_ROWS)), left, half)
        num_rows = b.select(b.icmp_unsigned(">=", left, _i64(2 * MOST_ROWS)), _i64(MOST_ROWS), last)
        b.store(b.add(row, num_rows), row_at)
        out = b.add(out_tile, b.mul(row, stride))
        choice = b.switch(num_rows, check)
        for count, block in enumerate(self._blocks, start=1):
            case = b.append_basic_block()
            choice.add_case(_i64(count), case)
            b.position_at_end(case)
            b.call(block, [near_x, _at(b, offsets, row), near_weight, out, stride, steps, is_first])
            b.branch(check)
        b.position_at_end(done)

    def _make_block(self, num_rows: int) -> ir.Function:
        """void(x, offsets, weight, out, stride, steps, is_first): some rows' products with a part of a tile."""
        function, b, params = self._function(f"rows_{num_rows}", [*[_I64] * 6, _I1])
        x, offsets, weight, out, stride, steps, is_first = params
        rows = [b.add(x, self._load(b, b.add(offsets, _i64(8 * row)), _I64)) for row in range(num_rows)]
        outs = [b.add(out, b.mul(stride, _i64(row))) for row in range(num_rows)]
        width = self._vectors_at_a_time(num_rows)
        for first in range(0, TILE // self._lanes, width):
            column = first * self._lanes * 4
            sums = [[b.alloca(self._floats) for _ in range(width)] for _ in range(num_rows)]
            places = [[b.add(out_row, _i64(column + 4 * self._lanes * v)) for v in range(width)] for out_row in outs]
            with b.if_else(is_first) as (then, otherwise):
                with then:
                    for row_sums in sums:
                        for total in row_sums:
                            b.store(ir.Constant(self._floats, None), total)
                with otherwise:
                    for row_sums, row_places in zip(sums, places, strict=True):
                        for total, place in zip(row_sums, row_places, strict=True):
                            b.store(self._load(b, place, self._floats), total)
            with _counting(b, _i64(0), steps, _i64(UNROLL)) as step:
                for i in range(UNROLL):
                    number = b.add(step, _i64(i))
                    here = b.add(weight, b.add(b.mul(number, _i64(TILE * 4)), _i64(column)))
                    x_at = b.mul(number, _i64(4))
                    self._multiply(b, [b.add(row, x_at) for row in rows], here, sums)
            for row_sums, row_places in zip(sums, places, strict=True):
                for total, place in zip(row_sums, row_places, strict=True):
                    self._store(b, b.load(total, typ=self._floats), place)
        b.ret_void()
        return function

    def _vectors_at_a_time(self, num_rows: int) -> int:
        """So that sums, weights and an input fit into 32 registers, or 16 of half the size."""
        if self._lanes == 16:
            return 4
        return 4 if num_rows <= 2 else 2

    def _multiply(self, b: ir.IRBuilder, inputs: Sequence[ir.Value], weight: ir.Value, sums: Any) -> None:
        """One input of each row, or two in bfloat16, by the weights of some vectors' outputs."""
        width = len(sums[0])
        for line in range(0, width * self._lanes * 4, CACHE_LINE):
            ahead = b.inttoptr(b.add(weight, _i64(READ_AHEAD_BYTES + line)), _POINTER)
            b.call(self._prefetch, [ahead, _i32(0), _i32(INTO_SECOND_CACHE), _i32(1)])
        vectors = [
            self._load(b, b.add(weight, _i64(v * self._lanes * 4)), self._ints if self._is_bfloat16 else self._floats)
            for v in range(width)
        ]
        weights = [self._parts(b, vector) for vector in vectors]
        for x_at, row_sums in zip(inputs, sums, strict=True):
            x = self._splat(b, self._load(b, x_at, _I32 if self._is_bfloat16 else _F32))
            for parts, total in zip(weights, row_sums, strict=True):
                value = b.load(total, typ=self._floats)
                for x_part, part in zip(self._parts(b, x), parts, strict=True):
                    value = b.call(self._dot if self._is_dot else self._fma, self._operands(x_part, part, value))
                b.store(value, total)

    @property
    def _is_dot(self) -> bool:
        return self._is_bfloat16 and self._dots

    def _operands(self, x: ir.Value, weight: ir.Value, total: ir.Value) -> list[ir.Value]:
        return [total, x, weight] if self._is_dot else [x, weight, total]

    def _parts(self, b: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
        """What is multiplied of a vector: as it is, or in bfloat16 the lower half and the upper half of each lane."""
        if not self._is_bfloat16:
            return [vector]
        if self._is_dot:
            return [b.bitcast(vector, ir.VectorType(_BFloat(), 2 * self._lanes))]
        lower = b.shl(vector, self._constant(self._ints, 16))
        upper = b.and_(vector, self._constant(self._ints, 0xFFFF0000))
        return [b.bitcast(part, self._floats) for part in (lower, upper)]

    def _make_gate(self) -> ir.Function:
        """void(num_pairs, up, inner, drawn): silu(gate) * up of each row, in the weights' type, where it began."""
        function, b, (num_pairs, up_at, inner, drawn) = self._function("gate", [_I64] * 4)
        width = b.shl(inner, _i64(2))
        with self._drawing(b, drawn, num_pairs) as row:
            gates = b.add(up_at, b.mul(row, b.shl(width, _i64(1))))
            with _counting(b, _i64(0), inner, _i64(self._lanes)) as column:
                place = b.add(gates, b.shl(column, _i64(2)))
                gate = self._load(b, place, self._floats)
                up = self._load(b, b.add(place, width), self._floats)
                one = self._constant(self._floats, 1.0)
                silu = b.fdiv(gate, b.fadd(one, self._exp(b, b.fneg(gate))))
                self._store_rounded(b, b.fmul(silu, up), b.add(gates, b.mul(column, _i64(self._bytes))))
        b.ret_void()
        return function

    def _make_add_up(self) -> ir.Function:
        """void(call, out, drawn): the weighted sum of each token's rows."""
        function, b, (call, rows_at, drawn) = self._function("add_up", [_I64] * 3)
        of = _Fields(b, call)
        hidden, top_k, row_of = of.get("hidden"), of.get("top_k"), of.row_of()
        num_vectors = TILE // self._lanes
        with b.goto_entry_block():
            sums = [b.alloca(self._floats) for _ in range(num_vectors)]
        with (
            self._drawing(b, drawn, of.get("num_tokens")) as token,
            _counting(b, _i64(0), hidden, _i64(TILE)) as column,
        ):
            for total in sums:
                b.store(ir.Constant(self._floats, None), total)
            with _counting(b, _i64(0), top_k, _i64(1)) as k:
                pair = b.add(b.mul(token, top_k), k)
                row = self._load(b, _at(b, row_of, pair), _I64)
                with b.if_then(b.icmp_signed(">=", row, _i64(0))):
                    four_bytes = b.shl(pair, _i64(2))
                    weight = self._splat(b, self._load(b, b.add(of.get("at_weights"), four_bytes), _F32))
                    place = b.add(rows_at, b.shl(b.add(b.mul(row, hidden), column), _i64(2)))
                    for v, total in enumerate(sums):
                        value = self._load(b, b.add(place, _i64(v * self._lanes * 4)), self._floats)
                        b.store(b.call(self._fma, [weight, value, b.load(total, typ=self._floats)]), total)
            out = b.add(of.get("at_out"), b.mul(b.add(b.mul(token, hidden), column), _i64(self._bytes)))
            for v, total in enumerate(sums):
                place = b.add(out, _i64(v * self._lanes * self._bytes))
                self._store_rounded(b, b.load(total, typ=self._floats), place)
        b.ret_void()
        return function

    # Before the team starts

    def _make_sort(self) -> None:
        """void(call): put pairs into the order of their experts, by counting."""
        function, b, (call,) = self._function("sort", [_I64])
        function.linkage = ""
        of = _Fields(b, call)
        num_experts, top_k = of.get("num_experts"), of.get("top_k")
        num_choices = b.mul(of.get("num_tokens"), top_k)
        starts, active, nexts, local = of.starts(), of.active(), of.nexts(), of.get("at_local")
        for i in range(NUM_COUNTERS):
            self._store(b, _i64(0), b.add(of.numbers(), _i64(i * CACHE_LINE)))
        with _counting(b, _i64(0), b.add(num_experts, _i64(1))) as expert:
            self._store(b, _i64(0), _at(b, nexts, expert))
        with _counting(b, _i64(0), num_choices) as choice:
            expert = self._load(b, _at(b, local, choice), _I64)
            with b.if_then(b.icmp_unsigned("<", expert, num_experts)):
                self._add_one(b, _at(b, nexts, expert))
        total_at, num_active_at = (b.add(of.numbers(), _i64(i * CACHE_LINE)) for i in (_NUM_PAIRS, _NUM_ACTIVE))
        with _counting(b, _i64(0), num_experts) as expert:
            count = self._load(b, _at(b, nexts, expert), _I64)
            start = self._load(b, total_at, _I64)
            with b.if_then(b.icmp_unsigned("!=", count, _i64(0))):
                self._store(b, expert, _at(b, active, self._add_one(b, num_active_at)))
            self._store(b, start, _at(b, starts, expert))
            self._store(b, start, _at(b, nexts, expert))
            self._store(b, b.add(start, count), total_at)
        self._store(b, self._load(b, total_at, _I64), _at(b, starts, num_experts))
        hidden_width = b.mul(of.get("hidden"), _i64(self._bytes))
        inner_width = b.shl(of.get("inner"), _i64(3))
        with _counting(b, _i64(0), num_choices) as choice:
            expert = self._load(b, _at(b, local, choice), _I64)
            self._store(b, _i64(-1), _at(b, of.row_of(), choice))
            with b.if_then(b.icmp_unsigned("<", expert, num_experts)):
                row = self._add_one(b, _at(b, nexts, expert))
                self._store(b, row, _at(b, of.row_of(), choice))
                self._store(b, b.mul(b.udiv(choice, top_k), hidden_width), _at(b, of.sources(), row))
                self._store(b, b.mul(row, inner_width), _at(b, of.inner_rows(), row))
        b.ret_void()

    def _add_one(self, b: ir.IRBuilder, place: ir.Value) -> ir.Value:
        """Returns what it was."""
        before = self._load(b, place, _I64)
        self._store(b, b.add(before, _i64(1)), place)
        return before

    # Instructions

    def _declare(self) -> None:
        suffix = f"v{self._lanes}f32"
        floats = self._floats
        self._fma = ir.Function(self.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.{suffix}")
        self._barrier = ir.Function(self.module, ir.FunctionType(_VOID, []), BARRIER)
        self._floor = ir.Function(self.module, ir.FunctionType(floats, [floats]), f"llvm.floor.{suffix}")
        self._prefetch = ir.Function(
            self.module, ir.FunctionType(_VOID, [_POINTER, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        if self._is_dot:
            pairs = ir.VectorType(_BFloat(), 2 * self._lanes)
            kind = ir.FunctionType(floats, [floats, pairs, pairs])
            self._dot = ir.Function(self.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")

    def _function(self, name: str, params: Sequence[ir.Type]) -> tuple[ir.Function, ir.IRBuilder, Any]:
        function = ir.Function(self.module, ir.FunctionType(_VOID, params), name)
        function.linkage = "internal"
        return function, ir.IRBuilder(function.append_basic_block("entry")), function.args

    def _wait(self, b: ir.IRBuilder) -> None:
        b.call(self._barrier, [])

    @contextlib.contextmanager
    def _drawing(self, b: ir.IRBuilder, drawn: ir.Value, num_tasks: ir.Value) -> Iterator[ir.Value]:
        """For each task that this thread draws."""
        draw, body, done = (b.append_basic_block() for _ in range(3))
        b.branch(draw)
        b.position_at_end(draw)
        task = b.atomic_rmw("add", b.inttoptr(drawn, _POINTER), _i64(1), "monotonic")
        b.cbranch(b.icmp_unsigned("<", task, num_tasks), body, done)
        b.position_at_end(body)
        yield task
        b.branch(draw)
        b.position_at_end(done)

    def _load(self, b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
        align = 8 if kind == _I64 else 4
        return b.load(b.inttoptr(address, _POINTER), typ=kind, align=align)

    def _store(self, b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
        align = 8 if value.type == _I64 else 2
        b.store(value, b.inttoptr(address, _POINTER), align=align)

    def _store_rounded(self, b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
        """In the weights' type: to the nearest, of two the even one."""
        if not self._is_bfloat16:
            self._store(b, value, address)
            return
        bits = b.bitcast(value, self._ints)
        odd = b.and_(b.lshr(bits, self._constant(self._ints, 16)), self._constant(self._ints, 1))
        rounded = b.lshr(b.add(bits, b.add(odd, self._constant(self._ints, 0x7FFF))), self._constant(self._ints, 16))
        is_nan = b.fcmp_unordered("uno", value, value)
        rounded = b.select(is_nan, self._constant(self._ints, 0x7FC0), rounded)
        self._store(b, b.trunc(rounded, ir.VectorType(_I16, self._lanes)), address)

    def _splat(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        kind = ir.VectorType(value.type, self._lanes)
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, _i32(0))
        return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(self._ints, [0] * self._lanes))

    def _constant(self, kind: ir.VectorType, value: float) -> ir.Constant:
        return ir.Constant(kind, [value] * self._lanes)

    def _exp(self, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """e to the x, within two units of the last place, of what is no more than 88 either way; Cephes' polynomial."""

        def constant(value: float) -> ir.Constant:
            return self._constant(self._floats, _as_float32(value))

        for bound, compare in ((88.0, ">"), (-87.0, "<")):
            x = b.select(b.fcmp_ordered(compare, x, constant(bound)), constant(bound), x)
        n = b.call(self._floor, [b.call(self._fma, [x, constant(1.44269504088896341), constant(0.5)])])
        r = b.call(self._fma, [n, constant(-0.693359375), x])
        r = b.call(self._fma, [n, constant(2.12194440e-4), r])
        y = constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = b.call(self._fma, [y, r, constant(coefficient)])
        y = b.fadd(b.call(self._fma, [y, b.fmul(r, r), r]), constant(1.0))
        power = b.shl(b.fptosi(n, self._ints), self._constant(self._ints, 23))
        return b.bitcast(b.add(b.bitcast(y, self._ints), power), self._floats)


class _Fields:
    """Reads a Call, and finds what lies in its room for numbers."""

    def __init__(self, b: ir.IRBuilder, call: ir.Value) -> None:
        self._b, self._call = b, call

    def get(self, name: str) -> ir.Value:
        address = self._b.add(self._call, _i64(8 * Call._fields.index(name)))
        return self._b.load(self._b.inttoptr(address, _POINTER), typ=_I64, align=8)

    def numbers(self) -> ir.Value:
        return self.get("at_numbers")

    def floats(self) -> ir.Value:
        return self.get("at_floats")

    def counter(self, index: int) -> ir.Value:
        address = self._b.add(self.numbers(), _i64(index * CACHE_LINE))
        return self._b.load(self._b.inttoptr(address, _POINTER), typ=_I64, align=8)

    def starts(self) -> ir.Value:
        """[experts + 1]: the first row of each, and the number of rows."""
        return self._by_expert(0)

    def nexts(self) -> ir.Value:
        """[experts + 1]: where the next pair of each goes."""
        return self._by_expert(1)

    def active(self) -> ir.Value:
        """[experts that have rows]."""
        return self._by_expert(2)

    def sources(self) -> ir.Value:
        """[rows]: how far behind the first token, in bytes, the one lies that is multiplied."""
        return self._by_pair(0)

    def inner_rows(self) -> ir.Value:
        """[rows]: the same of what the second product multiplies."""
        return self._by_pair(1)

    def row_of(self) -> ir.Value:
        """[N, K]: the row that computes it, or -1."""
        return self._by_pair(2)

    def _by_expert(self, index: int) -> ir.Value:
        size = self._b.add(self.get("num_experts"), _i64(1))
        return _at(self._b, self._b.add(self.numbers(), _i64(NUM_COUNTERS * CACHE_LINE)), _times(self._b, size, index))

    def _by_pair(self, index: int) -> ir.Value:
        size = self._b.mul(self.get("num_tokens"), self.get("top_k"))
        return _at(self._b, self._by_expert(3), _times(self._b, size, index))


def _times(b: ir.IRBuilder, value: ir.Value, factor: int) -> ir.Value:
    return b.mul(value, _i64(factor))


def _at(b: ir.IRBuilder, first: ir.Value, index: ir.Value) -> ir.Value:
    """The address of a 64-bit integer."""
    return b.add(first, b.shl(index, _i64(3)))


@contextlib.contextmanager
def _counting(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: ir.Value | None = None) -> Iterator[ir.Value]:
    with b.goto_entry_block():
        place = b.alloca(_I64)
    b.store(start, place)
    check, body, done = (b.append_basic_block() for _ in range(3))
    b.branch(check)
    b.position_at_end(check)
    i = b.load(place, typ=_I64)
    b.cbranch(b.icmp_unsigned("<", i, stop), body, done)
    b.position_at_end(body)
    yield i
    b.store(b.add(i, step if step is not None else _i64(1)), place)
    b.branch(check)
    b.position_at_end(done)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _i32(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


def _as_float32(value: float) -> float:
    """LLVM's text takes no other for a float."""
    return float(np.float32(value))
