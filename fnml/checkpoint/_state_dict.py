"""The pickle inside a ``.pt`` file, read and written as data: nothing in it is ever called."""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_DTYPES = {
    **{name: name for name in STORAGES.values()},
    **{name: name for name in ("uint16", "uint32", "uint64")},
}


class Storage(NamedTuple):
    """A flat array that other records of the archive hold; ``dtype`` is ``None`` for bytes."""

    key: str
    dtype: str | None
    size: int


class Tensor(NamedTuple):
    """A view of a storage, in elements of ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    """A name that the pickle asks for; it stands for itself and is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSORS = {
    _Global("torch._utils", "_rebuild_tensor_v2"),
    _Global("torch._utils", "_rebuild_tensor_v3"),
}
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_UNTYPED = _Global("torch.storage", "UntypedStorage")
_ALLOWED = {
    _ORDERED_DICT,
    *_TENSORS,
    _PARAMETER,
    _UNTYPED,
    *(_Global("torch", name) for name in (*STORAGES, *_DTYPES)),
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def parse(data: bytes) -> Any:
    """Interpret the opcodes of a state dict: dicts, lists, tuples, numbers, texts and tensors.

    Raises:
      ValueError: the pickle asks for anything else, by name, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int) -> list[Any]:
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise ValueError("its pickle takes more from the stack than is there")
        items = stack[start:]
        del stack[start:]
        return items

    def since_mark() -> list[Any]:
        if not marks:
            raise ValueError("its pickle has the end of a sequence without a beginning")
        items = take(len(stack) - marks[-1])
        marks.pop()
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            (value,) = stack
            return value
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            stack.append(tuple(take(_TUPLES[name])))
        elif name in ("SETITEM", "SETITEMS"):
            items = take(2) if name == "SETITEM" else since_mark()
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = take(1) if name == "APPEND" else since_mark()
            _expect(list, stack[-1]).extend(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_allowed(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_allowed(*take(2)))
        elif name == "REDUCE":
            function, arguments = take(2)
            stack.append(_build(_expect(_Global, function), _expect(tuple, arguments)))
        elif name == "BINPERSID":
            stack.append(_storage(*take(1)))
        elif name == "BUILD":
            # Attributes of a dict, such as the versions of modules: no weights.
            take(1)
            _expect(dict, stack[-1])
        else:
            raise ValueError(f"its pickle uses {name}, which no state dict needs")
    raise ValueError("its pickle does not end")


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    # Hashing a tuple of tuples of ... ends the process when it is deep enough.
    if any(type(key) not in (str, int) for key in items[::2]):
        raise ValueError("its pickle has a dict whose keys are neither texts nor integers")
    _expect(dict, target).update(zip(items[::2], items[1::2], strict=True))


def _allowed(module: Any, name: Any) -> _Global:
    found = _Global(_expect(str, module), _expect(str, name))
    if found not in _ALLOWED:
        raise ValueError(
            f"its pickle asks for {str(found)!r}, which is not a part of weights: refused"
        )
    return found


def _build(function: _Global, arguments: tuple[Any, ...]) -> Any:
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _PARAMETER and arguments:
        return _expect(Tensor, arguments[0])
    if function in _TENSORS and len(arguments) >= 6:
        storage, offset, shape, strides = arguments[:4]
        storage = _expect(Storage, storage)
        dtype = storage.dtype
        if str(function).endswith("v3"):
            dtype = _DTYPES.get(_expect(_Global, arguments[6]).name)
        if dtype is None:
            raise ValueError("its pickle has a tensor without a dtype")
        counts = (offset, *_expect(tuple, shape), *_expect(tuple, strides))
        if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"its pickle has a tensor of {arguments[1:4]!r}")
        return Tensor(storage, dtype, offset, shape, strides)
    raise ValueError(f"its pickle calls {function} with {len(arguments)} arguments: refused")


def _storage(identity: Any) -> Storage:
    kind, storage, key, _, count = _expect(tuple, identity)
    if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError(f"its pickle names the storage {identity!r}")
    if _expect(_Global, storage) == _UNTYPED:
        return Storage(key, None, count)
    if storage.name not in STORAGES:
        raise ValueError(f"its pickle has a storage of {storage}")
    return Storage(key, STORAGES[storage.name], count)


def render(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> bytes:
    """Write the pickle of a state dict: for each name the shape and dtype of a tensor.

    Tensor number ``i`` is the whole of storage ``str(i)``, in C order.
    """
    classes = {dtype: storage for storage, dtype in STORAGES.items()}
    out = io.BytesIO()

    def put(value: Any) -> None:
        # The body of a plain value's own pickle: between the protocol and the end.
        out.write(pickle.dumps(value, protocol=2)[2:-1])

    def ask(name: _Global) -> None:
        out.write(pickle.GLOBAL + f"{name.module}\n{name.name}\n".encode())

    out.write(pickle.PROTO + b"\x02")
    ask(_ORDERED_DICT)
    out.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.MARK)
    for number, (name, (shape, dtype)) in enumerate(shapes.items()):
        put(name)
        ask(_Global("torch._utils", "_rebuild_tensor_v2"))
        out.write(pickle.MARK + pickle.MARK)
        put("storage")
        ask(_Global("torch", classes[dtype]))
        for part in (str(number), "cpu", math.prod(shape)):
            put(part)
        out.write(pickle.TUPLE + pickle.BINPERSID)
        for value in (0, shape, _strides(shape), False):
            put(value)
        ask(_ORDERED_DICT)
        out.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
    out.write(pickle.SETITEMS + pickle.STOP)
    return out.getvalue()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
