"""Read tables of a flatbuffer by the numbers that the schema gives to their fields."""

import struct

__all__ = ["Table"]


class Table:
    """A table: its fields are numbered from 0, in the schema's order; a union takes two numbers.

    Args:
        data: the buffer.
        at: where the table starts; None takes the root.
    """

    def __init__(self, data: bytes, at: int | None = None) -> None:
        self._data = data
        self._at = self._follow(0) if at is None else at

    def number(self, field: int, kind: str = "I") -> int:
        """A number of the type `kind` of `struct`; 0 where it is left out."""
        at = self._find(field)
        return self._read(kind, at) if at else 0

    def table(self, field: int) -> "Table":
        """A table, or the value of a union.

        Raises:
            ValueError: it is left out.
        """
        if not (at := self._find(field)):
            raise ValueError(f"a flatbuffer without the field {field}")
        return Table(self._data, self._follow(at))

    def tables(self, field: int) -> list["Table"]:
        """The tables of a vector."""
        start, count = self._vector(field)
        return [Table(self._data, self._follow(start + 4 * i)) for i in range(count)]

    def content(self, field: int) -> bytes:
        """The bytes of a string, or of a vector of bytes."""
        start, count = self._vector(field)
        return self._data[start : start + count]

    def _vector(self, field: int) -> tuple[int, int]:
        """Where its elements start, and their number."""
        if not (at := self._find(field)):
            return 0, 0
        start = self._follow(at)
        return start + 4, self._read("I", start)

    def _find(self, field: int) -> int:
        """Where a field is; 0 if it is left out."""
        layout = self._at - self._read("i", self._at)
        entry = 4 + 2 * field
        if entry >= self._read("H", layout):
            return 0
        offset = self._read("H", layout + entry)
        return self._at + offset if offset else 0

    def _follow(self, at: int) -> int:
        return at + self._read("I", at)

    def _read(self, kind: str, at: int) -> int:
        try:
            return int(struct.unpack_from(f"<{kind}", self._data, at)[0])
        except struct.error as error:
            raise ValueError(f"a damaged flatbuffer: {error}") from error
