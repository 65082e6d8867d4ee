"""What expert_kernel_llvm.py is written in: LLVM's numbers at addresses, loops, and vectors as a processor has them.

Addresses are integers. Floats are computed in float32. bfloat16 is multiplied by instructions for it, where there are
some, and otherwise as float32. A *step* is four bytes of a row: one input, or two in bfloat16, that are multiplied and
added up at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from llvmlite import ir

from phalanx.moe.expert_kernel import Instructions

Element = Literal["float32", "bfloat16"]

STEP_OF_ROW = 4
"""Bytes."""

INTO_FIRST_CACHE = 3
"""Where what is read ahead goes, for LLVM."""

I1, I32, I64, F32, VOID = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
POINTER = ir.PointerType()
_I16 = ir.IntType(16)


class _BFloat(ir.Type):  # type: ignore[misc]
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class Vectors:
    """Of as many floats as a register has, in one module."""

    def __init__(self, module: ir.Module, element: Element, instructions: Instructions) -> None:
        """`element` is the type of what is in memory."""
        self.lanes = instructions.lanes
        self.floats = ir.VectorType(F32, self.lanes)
        self._ints = ir.VectorType(I32, self.lanes)
        self._is_bfloat16 = element == "bfloat16"
        self._is_dot = self._is_bfloat16 and instructions.dots
        self.element_bytes = 2 if self._is_bfloat16 else 4
        suffix, floats = f"v{self.lanes}f32", self.floats
        self._fma = ir.Function(module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.{suffix}")
        self._floor = ir.Function(module, ir.FunctionType(floats, [floats]), f"llvm.floor.{suffix}")
        self._prefetch = ir.Function(module, ir.FunctionType(VOID, [POINTER, I32, I32, I32]), "llvm.prefetch.p0")
        if self._is_dot:
            pairs = ir.VectorType(_BFloat(), 2 * self.lanes)
            kind = ir.FunctionType(floats, [floats, pairs, pairs])
            self._dot = ir.Function(module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")

    def floats_of(self, value: float) -> ir.Constant:
        return ir.Constant(self.floats, [float(np.float32(value))] * self.lanes)  # LLVM's text takes no other

    def spread(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """One number in all lanes."""
        kind = ir.VectorType(value.type, self.lanes)
        one = b.insert_element(ir.Constant(kind, ir.Undefined), value, _i32(0))
        return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), self._ints_of(0))

    def fma(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, added: ir.Value) -> ir.Value:
        return b.call(self._fma, [x, y, added])

    def load_step(self, b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
        """The weights that one step of a row is multiplied by, of as many outputs as there are lanes."""
        return self._parts(b, load(b, address, self._ints if self._is_bfloat16 else self.floats))

    def spread_step(self, b: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
        """One step of a row, in all lanes."""
        return self._parts(b, self.spread(b, load(b, address, I32 if self._is_bfloat16 else F32)))

    def multiply_step(
        self, b: ir.IRBuilder, x: Sequence[ir.Value], weights: Sequence[ir.Value], total: ir.Value
    ) -> ir.Value:
        """`total`, and what one step adds to it."""
        for part, weight in zip(x, weights, strict=True):
            total = b.call(self._dot, [total, part, weight]) if self._is_dot else self.fma(b, part, weight, total)
        return total

    def read_ahead(self, b: ir.IRBuilder, address: ir.Value) -> None:
        b.call(self._prefetch, [b.inttoptr(address, POINTER), _i32(0), _i32(INTO_FIRST_CACHE), _i32(1)])

    def store_rounded(self, b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
        """In the type of what is in memory: to the nearest, of two the even one."""
        if not self._is_bfloat16:
            store(b, value, address)
            return
        bits = b.bitcast(value, self._ints)
        odd = b.and_(b.lshr(bits, self._ints_of(16)), self._ints_of(1))
        rounded = b.lshr(b.add(bits, b.add(odd, self._ints_of(0x7FFF))), self._ints_of(16))
        is_nan = b.fcmp_unordered("uno", value, value)
        rounded = b.select(is_nan, self._ints_of(0x7FC0), rounded)
        store(b, b.trunc(rounded, ir.VectorType(_I16, self.lanes)), address)

    def exp(self, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """e to the x, within two units of the last place, of what is no more than 88 either way; Cephes' polynomial."""
        constant = self.floats_of
        for bound, compare in ((88.0, ">"), (-87.0, "<")):
            x = b.select(b.fcmp_ordered(compare, x, constant(bound)), constant(bound), x)
        n = b.call(self._floor, [self.fma(b, x, constant(1.44269504088896341), constant(0.5))])
        r = self.fma(b, n, constant(-0.693359375), x)
        r = self.fma(b, n, constant(2.12194440e-4), r)
        y = constant(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = self.fma(b, y, r, constant(coefficient))
        y = b.fadd(self.fma(b, y, b.fmul(r, r), r), constant(1.0))
        power = b.shl(b.fptosi(n, self._ints), self._ints_of(23))
        return b.bitcast(b.add(b.bitcast(y, self._ints), power), self.floats)

    def _ints_of(self, value: int) -> ir.Constant:
        return ir.Constant(self._ints, [value] * self.lanes)

    def _parts(self, b: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
        """What is multiplied of a vector: as it is, or in bfloat16 the lower half and the upper half of each lane."""
        if not self._is_bfloat16:
            return [vector]
        if self._is_dot:
            return [b.bitcast(vector, ir.VectorType(_BFloat(), 2 * self.lanes))]
        lower = b.shl(vector, self._ints_of(16))
        upper = b.and_(vector, self._ints_of(0xFFFF0000))
        return [b.bitcast(part, self.floats) for part in (lower, upper)]


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    align = 8 if kind == I64 else 4
    return b.load(b.inttoptr(address, POINTER), typ=kind, align=align)


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    align = 8 if value.type == I64 else 2
    b.store(value, b.inttoptr(address, POINTER), align=align)


def at(b: ir.IRBuilder, first: ir.Value, index: ir.Value) -> ir.Value:
    """The address of a 64-bit integer."""
    return b.add(first, b.shl(index, i64(3)))


def divide_up(b: ir.IRBuilder, value: ir.Value, divisor: ir.Value) -> ir.Value:
    return b.udiv(b.add(value, b.sub(divisor, i64(1))), divisor)


@contextlib.contextmanager
def counting(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: ir.Value | None = None) -> Iterator[ir.Value]:
    with b.goto_entry_block():
        place = b.alloca(I64)
    b.store(start, place)
    with while_below(b, place, stop) as i:
        yield i
        b.store(b.add(i, step if step is not None else i64(1)), place)


@contextlib.contextmanager
def while_below(b: ir.IRBuilder, place: ir.Value, stop: ir.Value) -> Iterator[ir.Value]:
    """As long as the number that lies there is below another."""
    check, body, done = (b.append_basic_block() for _ in range(3))
    b.branch(check)
    b.position_at_end(check)
    i = b.load(place, typ=I64)
    b.cbranch(b.icmp_unsigned("<", i, stop), body, done)
    b.position_at_end(body)
    yield i
    b.branch(check)
    b.position_at_end(done)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _i32(value: int) -> ir.Constant:
    return ir.Constant(I32, value)
