"""A pickle as a description of what it would make: read without importing or calling anything, edited, written again.

Reading gives Python's own plain values, dicts, lists and tuples, shared where the pickle shares them, and nodes for all
else: a name that would be imported is a `Global`, what a call would make is an `Object` with what is done to it after.
The reader is an interpreter of its own for the few opcodes that `torch.save` writes (protocol 2: see `pickletools`),
and the four that `pickle.dump` has for text, names and frames (protocol 4), since Python's has too many ways to come to
code: names with dots, registered extensions, `__setstate__`.

| a hostile pickle | what comes of it |
|---|---|
| names what would run code, or calls it | a node; whoever writes it again asks first whether it is trusted |
| cut short, or with other opcodes | pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError or TypeError |
| claims a length | EOFError before there is memory for it; memory is in proportion to the pickle's own bytes |
| deep, or shares without end | read and written without recursion, each thing once |
| has tuples of tuples for keys | refused: Python would hash every path through them |
| holds itself in many ways | refused: each way is written once more |
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MOST_IN_A_KEY = 100
"""How many tuples there may be in a dict's key, each counted as often as it is met."""
_HASHES_PER_BYTE = 10
"""How many elements of tuples may be hashed for each byte of the pickle."""
_MOST_AGAIN = 100_000
"""How many elements of what holds itself may be written more than once."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that would be imported, as the pickle spells it (in protocol 2, `__builtin__` and not `builtins`)."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Object:
    """What would be made by a call.

    Attributes:
        opcode: pickle.REDUCE, if the function is called, or pickle.NEWOBJ, if its `__new__` is.
        function: what is called.
        arguments: of the call.
        steps: what is done to it then, in this order: pickle.BUILD and a state, pickle.APPENDS and a list of items,
            pickle.SETITEMS and a list of keys and values by turns, or pickle.POP and a call whose result is of no use.
    """

    opcode: bytes
    function: Any
    arguments: tuple[Any, ...]
    steps: list[tuple[bytes, Any]] = field(default_factory=list)


class Ordered(dict[Any, Any]):
    """An OrderedDict; `states` are what is done to its attributes."""

    __slots__ = ("states",)

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []


ORDERED_DICT = Global("collections", "OrderedDict")


# --------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a pickle describes.

    Attributes:
        value: that it would make.
        names: every name that it would import.
        unusual: whether `torch.load(weights_only=True)` may refuse what it does, whatever the names: it knows fewer
            opcodes, puts items into few classes, sets states of few; and what is called with a number, perhaps a
            length, may need more memory than there is.
    """

    value: Any
    names: frozenset[Global]
    unusual: bool


def read_pickle(content: bytes, persistent_load: Callable[[Any], object]) -> Pickled:
    """Read a pickle: see the module.

    Args:
        content: the pickle.
        persistent_load: makes a value of what a persistent id says.
    """
    reader = _Reader(content, persistent_load)
    return Pickled(reader.load(), frozenset(reader.names), reader.unusual)


class _Reader:
    def __init__(self, content: bytes, persistent_load: Callable[[Any], object]) -> None:
        self._content = content
        self._position = 0
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # what lies below each mark, where nothing but the mark's own opcode reaches
        self._memo: dict[int, Any] = {}
        self._known: dict[int, Any] = {}  # what was put into the memo, by its identity
        self._hashes_left = _HASHES_PER_BYTE * len(content)
        self.names: set[Global] = set()
        self.unusual = False

    def load(self) -> Any:
        while (opcode := self._take(1)) != pickle.STOP:
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise pickle.UnpicklingError(f"the opcode {opcode!r} is none that torch.save writes")
            operation(self)
            self.unusual |= opcode in _UNUSUAL
        return self._stack.pop()

    def _take(self, nbytes: int) -> bytes:
        begin, self._position = self._position, self._position + nbytes
        if self._position > len(self._content):
            raise EOFError("the pickle ends too early")
        return self._content[begin : self._position]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _line(self) -> str:
        line = self._take(self._content.index(b"\n", self._position) + 1 - self._position)
        return line[:-1].decode()

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self, length: int) -> None:
        items = [self._stack.pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    def _global(self) -> None:
        name = Global(self._line(), self._line())
        self.names.add(name)
        self._push(name)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not all(type(text) is str and text.isprintable() for text in (module, name)):
            # A line break in it would be more than a name, in protocol 2
            raise pickle.UnpicklingError("a name that would be imported is no text, or more than a line")
        self._push(Global(module, name))
        self.names.add(Global(module, name))

    def _make(self, opcode: bytes) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple or type(function) not in (Global, Object):
            raise pickle.UnpicklingError("what is called is no name, or its arguments are no tuple")
        self.unusual |= type(function) is Object or (arguments != () and type(arguments[0]) is int)
        empty = function == ORDERED_DICT and not arguments
        self._push(Ordered() if empty else Object(opcode, function, arguments))

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Ordered:
            target.states.append(state)
        elif type(target) is Object:
            target.steps.append((pickle.BUILD, state))
            self.unusual = True
        else:
            raise pickle.UnpicklingError(f"a state is set of {type(target).__name__}")

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        else:
            self._step(pickle.APPENDS, items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        for key, _ in pairs:
            self._require_key(key)
        if type(target) in (dict, Ordered):
            target.update(pairs)
        else:
            self._step(pickle.SETITEMS, items)

    def _require_key(self, key: object) -> None:
        waiting, tuples = [key], 0
        while waiting:
            value = waiting.pop()
            if type(value) is tuple:
                tuples += 1
                self._hashes_left -= len(value)
            if type(value) in (dict, Ordered, list) or tuples > _MOST_IN_A_KEY or self._hashes_left < 0:
                raise TypeError("the key of a dict is no key, or a tuple of too many things")
            if type(value) is tuple:
                waiting.extend(value)

    def _step(self, opcode: bytes, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not Object:
            raise pickle.UnpicklingError(f"items are put into {type(target).__name__}")
        target.steps.append((opcode, items))
        self.unusual |= target.function != Global("collections", "Counter")

    def _pop(self) -> None:
        value = self._stack.pop()
        if type(value) is Object and id(value) not in self._known:
            # What was called for its effect, on an object: a state setter of copyreg's
            target = value.arguments[0] if value.arguments else None
            if type(target) is not Object:
                raise pickle.UnpicklingError("what a call gives is thrown away")
            target.steps.append((pickle.POP, value))

    def _persistent(self) -> None:
        self._push(self._persistent_load(self._stack.pop()))

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = value = self._stack[-1]
        self._known[id(value)] = value


_OPERATIONS: dict[bytes, Callable[[_Reader], object]] = {
    pickle.PROTO: lambda it: it._take(1),
    pickle.MARK: _Reader._mark,
    pickle.NONE: lambda it: it._push(None),
    pickle.NEWTRUE: lambda it: it._push(True),
    pickle.NEWFALSE: lambda it: it._push(False),
    pickle.BININT: lambda it: it._push(it._number("<i")),
    pickle.BININT1: lambda it: it._push(it._number("<B")),
    pickle.BININT2: lambda it: it._push(it._number("<H")),
    pickle.LONG1: lambda it: it._push(pickle.decode_long(it._take(it._number("<B")))),
    pickle.BINFLOAT: lambda it: it._push(it._number(">d")),
    pickle.BINUNICODE: lambda it: it._push(it._take(it._number("<I")).decode(errors="surrogatepass")),
    pickle.EMPTY_TUPLE: lambda it: it._push(()),
    pickle.TUPLE1: lambda it: it._tuple(1),
    pickle.TUPLE2: lambda it: it._tuple(2),
    pickle.TUPLE3: lambda it: it._tuple(3),
    pickle.TUPLE: lambda it: it._push(tuple(it._pop_mark())),
    pickle.EMPTY_LIST: lambda it: it._push([]),
    pickle.APPEND: lambda it: it._append([it._stack.pop()]),
    pickle.APPENDS: lambda it: it._append(it._pop_mark()),
    pickle.EMPTY_DICT: lambda it: it._push({}),
    pickle.SETITEM: lambda it: it._set_items([it._stack.pop(), it._stack.pop()][::-1]),
    pickle.SETITEMS: lambda it: it._set_items(it._pop_mark()),
    pickle.GLOBAL: _Reader._global,
    pickle.REDUCE: lambda it: it._make(pickle.REDUCE),
    pickle.NEWOBJ: lambda it: it._make(pickle.NEWOBJ),
    pickle.BUILD: _Reader._build,
    pickle.BINPERSID: _Reader._persistent,
    pickle.BINGET: lambda it: it._get(it._number("<B")),
    pickle.LONG_BINGET: lambda it: it._get(it._number("<I")),
    pickle.BINPUT: lambda it: it._put(it._number("<B")),
    pickle.LONG_BINPUT: lambda it: it._put(it._number("<I")),
    pickle.POP: _Reader._pop,
    pickle.POP_MARK: _Reader._pop_mark,
    pickle.LONG4: lambda it: it._push(pickle.decode_long(it._take(it._number("<I")))),
    pickle.FRAME: lambda it: it._take(8),
    pickle.SHORT_BINUNICODE: lambda it: it._push(it._take(it._number("<B")).decode(errors="surrogatepass")),
    pickle.MEMOIZE: lambda it: it._put(len(it._memo)),
    pickle.STACK_GLOBAL: _Reader._stack_global,
}
_PROTOCOL_4 = frozenset((pickle.FRAME, pickle.SHORT_BINUNICODE, pickle.MEMOIZE, pickle.STACK_GLOBAL))
_UNUSUAL = frozenset((pickle.POP, pickle.POP_MARK, pickle.LONG4)) | _PROTOCOL_4
"""What only tuples that hold themselves, state setters and huge numbers need; and what `torch.save` never writes."""


# -------------------------------------------------------------------------------------------------------- write


def write_pickle(
    value: object, persistent_id: Callable[[object], tuple[Any, ...] | None], reduce: Callable[[object], Object]
) -> bytes:
    """Write what `read_pickle` reads; what was written before is referred to.

    Args:
        value: made of what `read_pickle` gives.
        persistent_id: the persistent id of a value that is written elsewhere, or None.
        reduce: describes any other value.

    Raises:
        pickle.PicklingError: something holds itself in too many ways.
    """
    return _Writer(persistent_id, reduce).dump(value)


@dataclass(frozen=True, slots=True, eq=False)
class _Then:
    """An opcode, to be written when what it needs is on the stack.

    Attributes:
        opcode: to write.
        made: what it makes, to be remembered.
        discard: takes away what it needs, where that in turn has made the same thing already.
        steps: what is done to it then.
    """

    opcode: bytes
    made: object = None
    discard: bytes = b""
    steps: Iterable[tuple[bytes, Any]] = ()


class _Writer:
    def __init__(
        self, persistent_id: Callable[[object], tuple[Any, ...] | None], reduce: Callable[[object], Object]
    ) -> None:
        self._persistent_id = persistent_id
        self._reduce = reduce
        self._out = bytearray()
        self._memo: dict[object, tuple[int, object]] = {}  # keeps what it knows: an id may not become another's
        self._waiting: list[object] = []
        self._begun: set[int] = set()  # tuples and objects, by their identity
        self._again = 0

    def dump(self, value: object) -> bytes:
        self._out += pickle.PROTO + b"\x02"
        self._waiting.append(value)
        while self._waiting:
            item = self._waiting.pop()
            if type(item) is not _Then:
                self._write(item)
            elif item.made is not None and _identity(item.made) in self._memo:
                self._out += item.discard
                self._get(item.made)
            else:
                self._out += item.opcode
                if item.made is not None:
                    self._put(item.made)
                self._do(item.steps)
        self._out += pickle.STOP
        return bytes(self._out)

    def _write(self, value: Any) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self._out += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        elif kind is int:
            self._out += _integer(value)
        elif kind is float:
            self._out += pickle.BINFLOAT + struct.pack(">d", value)
        elif kind is tuple and not value:
            self._out += pickle.EMPTY_TUPLE
        elif _identity(value) in self._memo:
            self._get(value)
        elif kind is str:
            text = value.encode(errors="surrogatepass")
            self._out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
            self._put(value)
        elif kind is Global:
            self._out += pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
            self._put(value)
        elif kind is tuple:
            self._begin(value, len(value))
            if len(value) <= 3:
                short = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)[len(value) - 1]
                self._later(*value, _Then(short, value, pickle.POP * len(value)))
            else:
                self._later(_Then(pickle.MARK), *value, _Then(pickle.TUPLE, value, pickle.POP_MARK))
        elif kind is list:
            self._out += pickle.EMPTY_LIST
            self._put(value)
            self._do([(pickle.APPENDS, value)])
        elif kind is dict:
            self._out += pickle.EMPTY_DICT
            self._put(value)
            self._do([(pickle.SETITEMS, _flat(value))])
        elif kind is Ordered:
            states = ((pickle.BUILD, state) for state in value.states)
            self._object(value, Object(pickle.REDUCE, ORDERED_DICT, (), [(pickle.SETITEMS, _flat(value)), *states]))
        elif kind is Object:
            self._object(value, value)
        elif (pid := self._persistent_id(value)) is not None:
            self._later(pid, _Then(pickle.BINPERSID))
        else:
            self._object(value, self._reduce(value))

    def _object(self, made: object, described: Object) -> None:
        self._begin(made, 2)
        end = _Then(described.opcode, made, pickle.POP * 2, described.steps)
        self._later(described.function, described.arguments, end)

    def _begin(self, value: object, count: int) -> None:
        """What isn't in the memo till all that it is made of is written: till then, it is written where it is met."""
        if id(value) in self._begun:
            self._again += count
        self._begun.add(id(value))
        if self._again > _MOST_AGAIN:
            raise pickle.PicklingError("something in it holds itself in too many ways")

    def _do(self, steps: Iterable[tuple[bytes, Any]]) -> None:
        items: list[object] = []
        for opcode, argument in steps:
            one = {pickle.APPENDS: pickle.APPEND, pickle.SETITEMS: pickle.SETITEM}.get(opcode)
            if one is None:
                items += [argument, _Then(opcode)]
            elif len(argument) == (1 if opcode == pickle.APPENDS else 2):
                items += [*argument, _Then(one)]
            elif argument:
                items += [_Then(pickle.MARK), *argument, _Then(opcode)]
        self._later(*items)

    def _later(self, *items: object) -> None:
        self._waiting.extend(reversed(items))

    def _put(self, value: object) -> None:
        index = len(self._memo)
        self._memo[_identity(value)] = index, value
        self._out += pickle.BINPUT + bytes([index]) if index < 256 else pickle.LONG_BINPUT + struct.pack("<I", index)

    def _get(self, value: object) -> None:
        index, _ = self._memo[_identity(value)]
        self._out += pickle.BINGET + bytes([index]) if index < 256 else pickle.LONG_BINGET + struct.pack("<I", index)


def _identity(value: object) -> object:
    return value if type(value) in (Global, str) else id(value)


def _flat(items: Mapping[Any, Any]) -> list[Any]:
    return [part for pair in items.items() for part in pair]


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + bytes([value])
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    content = pickle.encode_long(value)
    if len(content) < 1 << 8:
        return pickle.LONG1 + bytes([len(content)]) + content
    return pickle.LONG4 + struct.pack("<I", len(content)) + content
