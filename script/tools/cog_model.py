"""What Cog's static parser reads from a target, as typed values."""

from dataclasses import dataclass
from enum import Enum

Scalar = str | int | float | bool
Default = Scalar | list[Scalar] | None
Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


class Mode(Enum):
    """Which of Cog's two entry points a target is."""

    PREDICT = "predict"
    TRAIN = "train"


class Primitive(Enum):
    """A scalar type, by the name it has in an annotation."""

    STR = "str"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    PATH = "Path"
    SECRET = "Secret"


@dataclass(frozen=True)
class ValueType:
    """The type of an input, or of a field of an output object."""

    primitive: Primitive
    is_list: bool
    optional: bool


@dataclass(frozen=True)
class InputField:
    """One input. `default` is meaningful only when `required` is false."""

    name: str
    order: int
    line: int
    type: ValueType
    description: str
    required: bool
    default: Default
    ge: int | float | None
    le: int | float | None
    min_length: int | None
    max_length: int | None
    regex: str | None
    choices: tuple[str | int, ...]
    deprecated: bool
    accept: str | None


@dataclass(frozen=True)
class ScalarOutput:
    """One value."""

    primitive: Primitive


@dataclass(frozen=True)
class ListOutput:
    """Many values; `iterator` ones arrive one by one, `concatenate` ones are shown joined."""

    item: Primitive
    iterator: bool
    concatenate: bool


@dataclass(frozen=True)
class OutputField:
    """One field of an output object."""

    name: str
    type: ValueType
    required: bool


@dataclass(frozen=True)
class ObjectOutput:
    """A BaseModel defined in the same file."""

    fields: tuple[OutputField, ...]


Output = ScalarOutput | ListOutput | ObjectOutput


@dataclass(frozen=True)
class Signature:
    """Everything the OpenAPI document needs to know about one target."""

    path: str
    mode: Mode
    inputs: tuple[InputField, ...]
    output: Output
    streaming: bool
