"""Bytes and DER that are nearly right: changed in a few places, with lengths that still fit or that don't."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

Mutations = list[tuple[str, float, int, int]]

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 6),
    ),
    min_size=1,
    max_size=3,
)
"""For `mutate` and `mutate_der`: what to do, where (as a part of the whole), with which byte, how often."""


def mutate(data: bytes, mutations: Mutations) -> bytes:
    """Change bytes anywhere."""
    changed = bytearray(data)
    for kind, where, value, count in mutations:
        at = int(where * len(changed))
        if not changed or kind == "insert":
            changed[at:at] = bytes([value]) * count
        elif kind == "flip":
            changed[at] ^= 1 << (value % 8)
        elif kind == "set":
            changed[at] = value
        elif kind == "delete":
            del changed[at : at + count]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + 8 * count]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_der(data: bytes, mutations: Mutations) -> bytes:
    """Change elements of a DER structure; every length around them is made to fit again."""
    root = _Element(0, _parsed(data))
    for kind, where, value, count in mutations:
        if not root.children:
            break
        places = root.places()
        parent, index = places[int(where * len(places))]
        element = parent.children[index]
        if kind == "set":
            element.tag = value
        elif kind == "insert":
            parent.children.insert(index, _Element(value, content=bytes(count)))
        elif kind == "delete":
            del parent.children[index]
        elif kind == "repeat":
            parent.children[index:index] = [element] * count
        elif kind == "cut":
            element.children, element.content = [], b""
        elif not element.children:
            element.content = mutate(element.content, [(kind, (value % 16) / 16, value, count)])
    return b"".join(child.encoded() for child in root.children)


def der(tag: int, *parts: bytes) -> bytes:
    """One DER element (X.690 section 8.1)."""
    content = b"".join(parts)
    size = len(content)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    length = bytes([size]) if size < 0x80 else bytes([0x80 | len(octets)]) + octets
    return bytes([tag]) + length + content


@dataclass
class _Element:
    tag: int
    children: list[_Element] = field(default_factory=list)
    content: bytes = b""

    def places(self) -> list[tuple[_Element, int]]:
        """Every element below, as its parent and where it stands there."""
        return [
            place for index, child in enumerate(self.children) for place in ((self, index), *child.places())
        ]

    def encoded(self) -> bytes:
        return der(self.tag, self.content, *(child.encoded() for child in self.children))


def _parsed(data: bytes) -> list[_Element]:
    """The elements that `data` is made of; `ValueError` when it is something else."""
    found = []
    while data:
        if len(data) < 2:
            raise ValueError("no element")
        tag, size, begin = data[0], data[1], 2
        if size & 0x80:
            begin = 2 + (size & 0x7F)
            size = int.from_bytes(data[2:begin], "big")
        content, data = data[begin : begin + size], data[begin + size :]
        if len(content) != size:
            raise ValueError("cut off")
        # Extensions hold DER inside an octet string.
        try:
            children = _parsed(content) if tag & 0x20 or tag == 0x04 else []
        except ValueError:
            children = []
        found.append(_Element(tag, children, b"" if children else content))
    return found
