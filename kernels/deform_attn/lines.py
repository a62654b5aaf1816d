"""Vectors for numba code: a line is 64 bytes of numbers, one cache line, one AVX-512 register, two AVX ones.

Numba leaves vectors to LLVM, which makes them only of loops it finds simple and long enough; here they are written
down. Code in a numba function works on `Line`s with `+ - * < &` and the functions below, and LLVM turns them into the
instructions of the machine at hand. Lines of 32-bit integers and of truths have as many lanes as the numbers they
came from. Indices into arrays count numbers, need no alignment and are not checked.

Numba's cache knows the file with the loops and not this one: `cpu_loops.LINES_DIGEST` changes with it, and a test sees
to that. So whoever gets a new version of this file gets a new file with the loops too, and numba compiles anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LINE_BYTES = 64
_LANE = ir.IntType(32)  # how LLVM numbers the lanes of a vector


class Line(types.Type):
    """The numba type of a vector of `lanes` numbers."""

    def __init__(self, number: Any, lanes: int) -> None:
        self.number, self.lanes = number, lanes
        super().__init__(name=f"Line({number}, {lanes})")


@register_model(Line)
class _LineModel(models.PrimitiveModel):
    def __init__(self, manager: Any, line: Line) -> None:
        truth = line.number == types.boolean
        number = ir.IntType(1) if truth else manager.lookup(line.number).get_value_type()
        super().__init__(manager, line, ir.VectorType(number, line.lanes))


def _line_of(number: Any) -> Line:
    return Line(number, LINE_BYTES * 8 // number.bitwidth)


def _place(context: Any, builder: Any, array: Any, line: Line, arguments: Sequence[Any]) -> Any:
    data = cgutils.create_struct_proxy(array)(context, builder, value=arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), context.get_value_type(line).as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """The line of a contiguous array that starts at `index`."""
    line = _line_of(array.dtype)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, array, line, arguments), align=array.dtype.bitwidth // 8)

    return line(array, index), emit


@intrinsic
def store(typing: Any, array: Any, index: Any, line: Any) -> Any:
    """Writes `line` into a contiguous array from `index` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, array, line, arguments)
        builder.store(arguments[2], place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, line), emit


@intrinsic
def add(typing: Any, array: Any, index: Any, line: Any) -> Any:
    """Adds `line` to the numbers of a contiguous array from `index` on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, align = _place(context, builder, array, line, arguments), array.dtype.bitwidth // 8
        builder.store(builder.fadd(builder.load(place, align=align), arguments[2]), place, align=align)
        return context.get_dummy_value()

    return types.void(array, index, line), emit


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Asks for the line of a contiguous array that starts at `index`, without waiting for it."""
    number = ir.IntType(32)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(_place(context, builder, array, _line_of(array.dtype), arguments), cgutils.voidptr_t)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(0), number(3), number(1)])  # to read; into the nearest cache; data
        return context.get_dummy_value()

    return types.void(array, index), emit


@intrinsic
def spread(typing: Any, number: Any) -> Any:
    """The same number in every lane."""
    line = _line_of(number)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nothing = ir.Constant(context.get_value_type(line), ir.Undefined)
        one = builder.insert_element(nothing, arguments[0], _LANE(0))
        return _shuffled(builder, one, nothing, [0] * line.lanes)

    return line(number), emit


def _shuffled(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    """A vector of the given lanes, where those of `b` are counted on after those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_LANE, len(lanes)), list(lanes)))


def _operator(symbol: Callable[[Any, Any], Any], build: Callable[[Any, Any, Any], Any], truth: bool = False) -> None:
    """Lets `symbol` work on two lines of one type. build(LLVM builder, a, b)."""

    @intrinsic
    def operation(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, *arguments)

        return (Line(types.boolean, a.lanes) if truth else a)(a, b), emit

    @overload(symbol)
    def choose(a: Any, b: Any) -> Any:
        def call(a: Any, b: Any) -> Any:
            return operation(a, b)

        return call if isinstance(a, Line) and a == b else None


def _whole(vector: Any) -> bool:
    return isinstance(vector.type.element, ir.IntType)


for _plus in (operator.add, operator.iadd):
    _operator(_plus, lambda builder, a, b: builder.add(a, b) if _whole(a) else builder.fadd(a, b))
_operator(operator.sub, lambda builder, a, b: builder.sub(a, b) if _whole(a) else builder.fsub(a, b))
_operator(operator.mul, lambda builder, a, b: builder.mul(a, b) if _whole(a) else builder.fmul(a, b))
_operator(operator.lt, lambda builder, a, b: builder.fcmp_ordered("<", a, b), truth=True)
_operator(operator.and_, lambda builder, a, b: builder.and_(a, b))


@intrinsic
def select(typing: Any, truths: Any, a: Any, b: Any) -> Any:
    """Lane by lane `a` where true, otherwise `b`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return a(truths, a, b), emit


@intrinsic
def floor(typing: Any, a: Any) -> Any:
    """Lane by lane the next lower whole number, still a floating one."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = arguments[0].type
        name = f"llvm.floor.v{a.lanes}f{a.number.bitwidth}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name), arguments
        )

    return a(a), emit


@intrinsic
def whole(typing: Any, a: Any) -> Any:
    """Lane by lane as a 32-bit integer, which must hold it."""
    line = Line(types.int32, a.lanes)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], context.get_value_type(line))

    return line(a), emit


@intrinsic
def bits(typing: Any, truths: Any) -> Any:
    """Truths as the bits of an unsigned integer, the first lane lowest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.bitcast(arguments[0], ir.IntType(truths.lanes)), ir.IntType(64))

    return types.uint64(truths), emit


@intrinsic
def lowest(typing: Any, number: Any) -> Any:
    """Index of the lowest bit set; `number` must not be 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(number), emit


def _shuffle(lane: Callable[[int, int], int], summary: str) -> Any:
    """A function of two lines; lane(i, lanes) tells which lane of both, counted on, becomes lane i."""

    def shuffle(typing: Any, a: Any, b: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first, second = arguments
            return _shuffled(builder, first, second, [lane(index, a.lanes) for index in range(a.lanes)])

        return a(a, b), emit

    shuffle.__doc__ = summary
    return intrinsic(shuffle)


evens = _shuffle(lambda i, n: 2 * i, "Every second number of two lines on end, from the first on.")
odds = _shuffle(lambda i, n: 2 * i + 1, "Every second number of two lines on end, from the second on.")
first_pairs = _shuffle(lambda i, n: i // 2 + i % 2 * n, "The first half of a[0], b[0], a[1], b[1], ...")
last_pairs = _shuffle(lambda i, n: (n + i) // 2 + i % 2 * n, "The second half of a[0], b[0], a[1], b[1], ...")


@intrinsic
def sums_of_four(typing: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four lanes: the sum of every line. Half as many shuffles as four sums on their own."""
    lanes = a.lanes

    def fold(builder: Any, p: Any, q: Any, lower: Sequence[int], upper: Sequence[int]) -> Any:
        """Picks in every group of four lanes, and adds."""
        groups = range(0, lanes, 4)
        low, high = ([group + lane for group in groups for lane in picked] for picked in (lower, upper))
        return builder.fadd(_shuffled(builder, p, q, low), _shuffled(builder, p, q, high))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, third, fourth = arguments
        pair = fold(builder, first, second, (0, lanes, 1, lanes + 1), (2, lanes + 2, 3, lanes + 3))
        other = fold(builder, third, fourth, (0, lanes, 1, lanes + 1), (2, lanes + 2, 3, lanes + 3))
        sums, width = fold(builder, pair, other, (0, 1, lanes, lanes + 1), (2, 3, lanes + 2, lanes + 3)), lanes
        while width > 4:
            width //= 2
            lower, upper = range(width), range(width, 2 * width)
            sums = builder.fadd(_shuffled(builder, sums, sums, lower), _shuffled(builder, sums, sums, upper))
        return sums

    return Line(a.number, 4)(a, b, c, d), emit


@intrinsic
def total(typing: Any, line: Any) -> Any:
    """The sum of all lanes, by halves."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, width = arguments[0], line.lanes
        while width > 1:
            width //= 2
            lower, upper = range(width), range(width, 2 * width)
            sums = builder.fadd(_shuffled(builder, sums, sums, lower), _shuffled(builder, sums, sums, upper))
        return builder.extract_element(sums, _LANE(0))

    return line.number(line), emit
