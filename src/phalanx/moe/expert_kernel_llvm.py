"""The instructions of expert_kernel.py, made with LLVM: a layer's experts for sorted pairs, by all threads of a team.

`sort(call)` sorts the pairs by experts. Then each thread of a team calls `compute(call)`, and takes tasks, whose
numbers they draw from a counter in common, in four passes with a barrier after each: tiles of 64 outputs of one
expert's first product, for all its rows; rows to gate; tiles of the second product; tokens to add up.

A tile's weights lie in one piece, are read from its beginning to its end, and come out of memory once, however many
rows there are: a part of them at a time stays near the core for all rows, of which several are multiplied at a time,
with their sums in registers. Where multiplying takes longer than reading, the next part is read meanwhile. What is
added up for a row, and in which order, does not depend on other rows.

Sums are in float32. Addresses are integers here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from phalanx.moe.expert_kernel import CACHE_LINE, NUM_COUNTERS, TILE, Call, Instructions
from phalanx.moe.llvm_vectors import (
    F32,
    I1,
    I64,
    POINTER,
    STEP_OF_ROW,
    VOID,
    Element,
    Vectors,
    at,
    counting,
    divide_up,
    i64,
    load,
    store,
    while_below,
)

NEAR_BYTES = 128 * 1024
"""Of a tile's weights, at most, multiplied with all rows before the next. What such a part adds is summed up by itself,
which is closer to the exact sum than one long sum."""

PAGE_BYTES = 4 * 1024
"""Which the processor does not read ahead across by itself."""

MOST_ROWS = 6
"""Whose sums are in registers at a time."""

UNROLL = 2
"""Divides the steps of any tile."""

STEP_BYTES = TILE * STEP_OF_ROW
"""Of a tile's weights."""

LINES_OF_STEP = STEP_BYTES // CACHE_LINE

BARRIER = "GOMP_barrier"
"""OpenMP's function for this."""

_DRAWN, _NUM_PAIRS, _NUM_ACTIVE = range(4), 4, 5
"""Counters, each with a line of the cache for itself: tasks that were drawn in each pass; and what sorting found."""


def make(element: Element, instructions: Instructions) -> str:
    """LLVM's text of a module with `sort` and `compute`, which calls BARRIER."""
    return str(_Experts(element, instructions).module)


class _Experts:
    """The functions of one module."""

    def __init__(self, element: Element, instructions: Instructions) -> None:
        self.module = ir.Module("experts")
        self.module.triple = ""
        self._vectors = Vectors(self.module, element, instructions)
        self._barrier = ir.Function(self.module, ir.FunctionType(VOID, []), BARRIER)
        self._blocks = [self._make_block(num_rows) for num_rows in range(1, MOST_ROWS + 1)]
        self._place = self._make_place()
        self._products = self._make_products()
        self._gate = self._make_gate()
        self._add_up = self._make_add_up()
        self._make_compute()
        self._make_sort()

    # What a thread does

    def _make_compute(self) -> None:
        """void(call)."""
        function, b, (call,) = self._function("compute", [I64])
        function.linkage = ""
        of = _Fields(b, call)
        numbers, up_at = of.numbers(), of.floats()
        num_pairs, num_active = of.counter(_NUM_PAIRS), of.counter(_NUM_ACTIVE)
        width = b.shl(of.get("inner"), i64(3))  # bytes of a row of gates and ups in float32
        out_at = b.add(up_at, b.mul(num_pairs, width))
        hidden_width = b.shl(of.get("hidden"), i64(2))
        drawn = [b.add(numbers, i64(i * CACHE_LINE)) for i in _DRAWN]
        lists = [of.starts(), of.active(), num_active]
        up_tiles = b.udiv(b.shl(of.get("inner"), i64(1)), i64(TILE))
        down_tiles = b.udiv(of.get("hidden"), i64(TILE))
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

    def _make_place(self) -> ir.Function:
        """i64(active, weights, tiles, tile_bytes, num_tasks, task): where its weights lie; 0 if there is none."""
        function, b, params = self._function("place", [I64] * 6, I64)
        active, weights, tiles, tile_bytes, num_tasks, task = params
        with b.if_then(b.icmp_unsigned(">=", task, num_tasks)):
            b.ret(i64(0))
        slot = load(b, at(b, active, b.udiv(task, tiles)), I64)
        b.ret(b.add(load(b, at(b, weights, slot), I64), b.mul(b.urem(task, tiles), tile_bytes)))
        return function

    def _make_products(self) -> ir.Function:
        """void(starts, active, num_active, x, offsets, weights, tiles, inputs, out, stride, drawn)."""
        function, b, params = self._function("products", [I64] * 11)
        starts, active, num_active, x, offsets, weights, tiles, inputs, out, stride, drawn = params
        num_tasks, tile_bytes = b.mul(num_active, tiles), b.mul(inputs, i64(TILE * self._vectors.element_bytes))
        steps = b.udiv(tile_bytes, i64(STEP_BYTES))
        with b.goto_entry_block():
            task_at, ahead_at = b.alloca(I64), b.alloca(I64)
        b.store(self._draw(b, drawn), task_at)
        with while_below(b, task_at, num_tasks) as task:
            slot = load(b, at(b, active, b.udiv(task, tiles)), I64)
            first = load(b, at(b, starts, slot), I64)
            end = load(b, at(b, starts, b.add(slot, i64(1))), I64)
            weight = b.call(self._place, [active, weights, tiles, tile_bytes, num_tasks, task])
            out_tile = b.add(out, b.mul(b.urem(task, tiles), i64(TILE * 4)))
            near_steps = self._near_steps(b, steps)
            with counting(b, i64(0), steps, near_steps) as k:
                left = b.sub(steps, k)
                is_last = b.icmp_unsigned("<=", left, near_steps)
                near_weight = b.add(weight, b.mul(k, i64(STEP_BYTES)))
                b.store(b.add(near_weight, b.mul(near_steps, i64(STEP_BYTES))), ahead_at)
                with b.if_then(is_last):  # not before: who has a task that is not begun lets others wait
                    b.store(self._draw(b, drawn), task_at)
                    following = [active, weights, tiles, tile_bytes, num_tasks, b.load(task_at, typ=I64)]
                    b.store(b.call(self._place, following), ahead_at)
                near = b.select(is_last, left, near_steps)
                near_x = b.add(x, b.mul(k, i64(STEP_OF_ROW)))
                is_first = b.icmp_unsigned("==", k, i64(0))
                part = [near_x, offsets, near_weight, out_tile, stride, near, is_first]
                self._all_rows(b, first, end, b.load(ahead_at, typ=I64), part)
        b.ret_void()
        return function

    def _near_steps(self, b: ir.IRBuilder, steps: ir.Value) -> ir.Value:
        """Multiplied with all rows before the next: even parts of `steps`."""
        most = i64(NEAR_BYTES // STEP_BYTES)
        even = divide_up(b, steps, divide_up(b, steps, most))
        return b.and_(b.add(even, i64(UNROLL - 1)), i64(-UNROLL))

    def _all_rows(
        self, b: ir.IRBuilder, first: ir.Value, end: ir.Value, ahead: ir.Value, part: Sequence[ir.Value]
    ) -> None:
        """Multiply rows by a part of a tile: MOST_ROWS at a time, and the last ones in even parts.

        Each group of rows reads a line of each step ahead, of the next part, which begins at `ahead`, where there are
        groups enough to read all of it, and `ahead` is not 0. With fewer it is reading that takes long: they read their
        own part, whose next page begins to come by that, and the processor sees to the rest.
        """
        near_x, offsets, near_weight, out_tile, stride, steps, is_first = part
        with b.goto_entry_block():
            row_at, ahead_at = b.alloca(I64), b.alloca(I64)
        b.store(first, row_at)
        next_page, ahead_end = b.add(near_weight, i64(PAGE_BYTES)), b.add(ahead, i64(STEP_BYTES))
        are_few = b.icmp_unsigned("<=", b.sub(end, first), i64((LINES_OF_STEP - 1) * MOST_ROWS))
        reads_own = b.or_(are_few, b.icmp_unsigned("==", ahead, i64(0)))
        b.store(b.select(reads_own, next_page, ahead), ahead_at)
        with while_below(b, row_at, end) as row:
            left = b.sub(end, row)
            half = divide_up(b, left, i64(2))
            last = b.select(b.icmp_unsigned("<=", left, i64(MOST_ROWS)), left, half)
            num_rows = b.select(b.icmp_unsigned(">=", left, i64(2 * MOST_ROWS)), i64(MOST_ROWS), last)
            b.store(b.add(row, num_rows), row_at)
            line = b.load(ahead_at, typ=I64)
            next_line = b.add(line, i64(CACHE_LINE))
            is_read = b.icmp_unsigned("==", next_line, ahead_end)
            b.store(b.select(b.or_(reads_own, is_read), next_page, next_line), ahead_at)
            out = b.add(out_tile, b.mul(row, stride))
            args = [near_x, at(b, offsets, row), near_weight, out, stride, steps, line, is_first]
            self._call_block(b, num_rows, args)

    def _call_block(self, b: ir.IRBuilder, num_rows: ir.Value, args: Sequence[ir.Value]) -> None:
        done = b.append_basic_block()
        choice = b.switch(num_rows, done)
        for count, block in enumerate(self._blocks, start=1):
            case = b.append_basic_block()
            choice.add_case(i64(count), case)
            b.position_at_end(case)
            b.call(block, args)
            b.branch(done)
        b.position_at_end(done)

    def _make_block(self, num_rows: int) -> ir.Function:
        """void(x, offsets, weight, out, stride, steps, ahead, is_first): some rows' products with so many steps of a
        tile, while a line of each step from `ahead` on is read.
        """
        function, b, params = self._function(f"rows_{num_rows}", [*[I64] * 7, I1])
        x, offsets, weight, out, stride, steps, ahead, is_first = params
        rows = [b.add(x, load(b, b.add(offsets, i64(8 * row)), I64)) for row in range(num_rows)]
        outs = [b.add(out, b.mul(stride, i64(row))) for row in range(num_rows)]
        width = self._vectors_at_a_time(num_rows)
        for first in range(0, TILE // self._vectors.lanes, width):
            column = first * self._vectors.lanes * 4
            with b.goto_entry_block():  # elsewhere LLVM leaves them in memory
                sums = [[b.alloca(self._vectors.floats) for _ in range(width)] for _ in range(num_rows)]
            places = [
                [b.add(out_row, i64(column + 4 * self._vectors.lanes * v)) for v in range(width)] for out_row in outs
            ]
            for row_sums in sums:
                for total in row_sums:
                    b.store(ir.Constant(self._vectors.floats, None), total)
            with counting(b, i64(0), steps, i64(UNROLL)) as first_step:
                for i in range(UNROLL):
                    step = b.add(first_step, i64(i))
                    weight_at, x_at = b.mul(step, i64(STEP_BYTES)), b.mul(step, i64(STEP_OF_ROW))
                    if column == 0:
                        self._vectors.read_ahead(b, b.add(ahead, weight_at))
                    here = b.add(b.add(weight, weight_at), i64(column))
                    self._multiply(b, [b.add(row, x_at) for row in rows], here, sums)
            for row_sums, row_places in zip(sums, places, strict=True):
                for total, place in zip(row_sums, row_places, strict=True):
                    before = b.select(is_first, self._vectors.floats_of(0.0), load(b, place, self._vectors.floats))
                    store(b, b.fadd(before, b.load(total, typ=self._vectors.floats)), place)
        b.ret_void()
        return function

    def _vectors_at_a_time(self, num_rows: int) -> int:
        """So that sums, weights and an input fit into 32 registers, or 16 of half the size."""
        if self._vectors.lanes == 16:
            return 4
        return 4 if num_rows <= 2 else 2

    def _multiply(self, b: ir.IRBuilder, inputs: Sequence[ir.Value], weight: ir.Value, sums: Any) -> None:
        """One input of each row, or two in bfloat16, by the weights of some vectors' outputs."""
        width, vectors = len(sums[0]), self._vectors
        weights = [vectors.load_step(b, b.add(weight, i64(v * vectors.lanes * STEP_OF_ROW))) for v in range(width)]
        for x_at, row_sums in zip(inputs, sums, strict=True):
            x = vectors.spread_step(b, x_at)
            for weights_of_vector, total in zip(weights, row_sums, strict=True):
                value = vectors.multiply_step(b, x, weights_of_vector, b.load(total, typ=vectors.floats))
                b.store(value, total)

    def _make_gate(self) -> ir.Function:
        """void(num_pairs, up, inner, drawn): silu(gate) * up of each row, in the weights' type, where it began."""
        function, b, (num_pairs, up_at, inner, drawn) = self._function("gate", [I64] * 4)
        width = b.shl(inner, i64(2))
        with self._drawing(b, drawn, num_pairs) as row:
            gates = b.add(up_at, b.mul(row, b.shl(width, i64(1))))
            with counting(b, i64(0), inner, i64(self._vectors.lanes)) as column:
                place = b.add(gates, b.shl(column, i64(2)))
                gate = load(b, place, self._vectors.floats)
                up = load(b, b.add(place, width), self._vectors.floats)
                one = self._vectors.floats_of(1.0)
                silu = b.fdiv(gate, b.fadd(one, self._vectors.exp(b, b.fneg(gate))))
                self._vectors.store_rounded(
                    b, b.fmul(silu, up), b.add(gates, b.mul(column, i64(self._vectors.element_bytes)))
                )
        b.ret_void()
        return function

    def _make_add_up(self) -> ir.Function:
        """void(call, out, drawn): the weighted sum of each token's rows."""
        function, b, (call, rows_at, drawn) = self._function("add_up", [I64] * 3)
        of = _Fields(b, call)
        hidden, top_k, row_of = of.get("hidden"), of.get("top_k"), of.row_of()
        num_vectors = TILE // self._vectors.lanes
        with b.goto_entry_block():
            sums = [b.alloca(self._vectors.floats) for _ in range(num_vectors)]
        with (
            self._drawing(b, drawn, of.get("num_tokens")) as token,
            counting(b, i64(0), hidden, i64(TILE)) as column,
        ):
            for total in sums:
                b.store(ir.Constant(self._vectors.floats, None), total)
            with counting(b, i64(0), top_k, i64(1)) as k:
                pair = b.add(b.mul(token, top_k), k)
                row = load(b, at(b, row_of, pair), I64)
                with b.if_then(b.icmp_signed(">=", row, i64(0))):
                    four_bytes = b.shl(pair, i64(2))
                    weight = self._vectors.spread(b, load(b, b.add(of.get("at_weights"), four_bytes), F32))
                    place = b.add(rows_at, b.shl(b.add(b.mul(row, hidden), column), i64(2)))
                    for v, total in enumerate(sums):
                        value = load(b, b.add(place, i64(v * self._vectors.lanes * 4)), self._vectors.floats)
                        b.store(self._vectors.fma(b, weight, value, b.load(total, typ=self._vectors.floats)), total)
            out = b.add(of.get("at_out"), b.mul(b.add(b.mul(token, hidden), column), i64(self._vectors.element_bytes)))
            for v, total in enumerate(sums):
                place = b.add(out, i64(v * self._vectors.lanes * self._vectors.element_bytes))
                self._vectors.store_rounded(b, b.load(total, typ=self._vectors.floats), place)
        b.ret_void()
        return function

    # Before the team starts

    def _make_sort(self) -> None:
        """void(call): put pairs into the order of their experts, by counting."""
        function, b, (call,) = self._function("sort", [I64])
        function.linkage = ""
        of = _Fields(b, call)
        num_experts, top_k = of.get("num_experts"), of.get("top_k")
        num_choices = b.mul(of.get("num_tokens"), top_k)
        starts, active, nexts, local = of.starts(), of.active(), of.nexts(), of.get("at_local")
        for i in range(NUM_COUNTERS):
            store(b, i64(0), b.add(of.numbers(), i64(i * CACHE_LINE)))
        with counting(b, i64(0), b.add(num_experts, i64(1))) as expert:
            store(b, i64(0), at(b, nexts, expert))
        with counting(b, i64(0), num_choices) as choice:
            expert = load(b, at(b, local, choice), I64)
            with b.if_then(b.icmp_unsigned("<", expert, num_experts)):
                self._add_one(b, at(b, nexts, expert))
        total_at, num_active_at = (b.add(of.numbers(), i64(i * CACHE_LINE)) for i in (_NUM_PAIRS, _NUM_ACTIVE))
        with counting(b, i64(0), num_experts) as expert:
            count = load(b, at(b, nexts, expert), I64)
            start = load(b, total_at, I64)
            with b.if_then(b.icmp_unsigned("!=", count, i64(0))):
                store(b, expert, at(b, active, self._add_one(b, num_active_at)))
            store(b, start, at(b, starts, expert))
            store(b, start, at(b, nexts, expert))
            store(b, b.add(start, count), total_at)
        store(b, load(b, total_at, I64), at(b, starts, num_experts))
        hidden_width = b.mul(of.get("hidden"), i64(self._vectors.element_bytes))
        inner_width = b.shl(of.get("inner"), i64(3))
        with counting(b, i64(0), num_choices) as choice:
            expert = load(b, at(b, local, choice), I64)
            store(b, i64(-1), at(b, of.row_of(), choice))
            with b.if_then(b.icmp_unsigned("<", expert, num_experts)):
                row = self._add_one(b, at(b, nexts, expert))
                store(b, row, at(b, of.row_of(), choice))
                store(b, b.mul(b.udiv(choice, top_k), hidden_width), at(b, of.sources(), row))
                store(b, b.mul(row, inner_width), at(b, of.inner_rows(), row))
        b.ret_void()

    def _add_one(self, b: ir.IRBuilder, place: ir.Value) -> ir.Value:
        """Returns what it was."""
        before = load(b, place, I64)
        store(b, b.add(before, i64(1)), place)
        return before

    def _function(
        self, name: str, params: Sequence[ir.Type], result: ir.Type = VOID
    ) -> tuple[ir.Function, ir.IRBuilder, Any]:
        function = ir.Function(self.module, ir.FunctionType(result, params), name)
        function.linkage = "internal"
        return function, ir.IRBuilder(function.append_basic_block("entry")), function.args

    def _wait(self, b: ir.IRBuilder) -> None:
        b.call(self._barrier, [])

    @contextlib.contextmanager
    def _drawing(self, b: ir.IRBuilder, drawn: ir.Value, num_tasks: ir.Value) -> Iterator[ir.Value]:
        """For each task that this thread draws."""
        with b.goto_entry_block():
            place = b.alloca(I64)
        b.store(self._draw(b, drawn), place)
        with while_below(b, place, num_tasks) as task:
            yield task
            b.store(self._draw(b, drawn), place)

    def _draw(self, b: ir.IRBuilder, drawn: ir.Value) -> ir.Value:
        return b.atomic_rmw("add", b.inttoptr(drawn, POINTER), i64(1), "monotonic")


class _Fields:
    """Reads a Call, and finds what lies in its room for numbers."""

    def __init__(self, b: ir.IRBuilder, call: ir.Value) -> None:
        self._b, self._call = b, call

    def get(self, name: str) -> ir.Value:
        address = self._b.add(self._call, i64(8 * Call._fields.index(name)))
        return self._b.load(self._b.inttoptr(address, POINTER), typ=I64, align=8)

    def numbers(self) -> ir.Value:
        return self.get("at_numbers")

    def floats(self) -> ir.Value:
        return self.get("at_floats")

    def counter(self, index: int) -> ir.Value:
        address = self._b.add(self.numbers(), i64(index * CACHE_LINE))
        return self._b.load(self._b.inttoptr(address, POINTER), typ=I64, align=8)

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
        size = self._b.add(self.get("num_experts"), i64(1))
        return at(self._b, self._b.add(self.numbers(), i64(NUM_COUNTERS * CACHE_LINE)), self._b.mul(size, i64(index)))

    def _by_pair(self, index: int) -> ir.Value:
        size = self._b.mul(self.get("num_tokens"), self.get("top_k"))
        return at(self._b, self._by_expert(3), self._b.mul(size, i64(index)))
