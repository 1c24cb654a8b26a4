"""Ways in which the records of a shard can be wrong: each changes those of a whole one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.helpers import tiny

Records = list[list[tuple[str, bytes]]]


def broken_image(made: Records) -> None:
    name, data = made[2][0]
    made[2][0] = (name, data[: len(data) // 2])


def not_an_image(made: Records) -> None:
    made[2][0] = (made[2][0][0], b"no image at all")


def broken_json(made: Records) -> None:
    made[2][1] = (made[2][1][0], b'{"label": 1')


def json_of_another_shape(made: Records) -> None:
    made[2][1] = (made[2][1][0], b'{"label": 1, "keypoints": [{"nose": 3}]}')


def broken_mask(made: Records) -> None:
    made[2][2] = (made[2][2][0], b"\x89PNG no")


def missing_json(made: Records) -> None:
    del made[2][1]


def missing_image(made: Records) -> None:
    del made[2][0]


def duplicate_key(made: Records) -> None:
    made.append(made[0])


def key_with_a_suffix(made: Records) -> None:
    made[2] = [(name.replace("-", "#"), data) for name, data in made[2]]


def key_in_latin_1(made: Records) -> None:
    made[2] = [(f"caf\udce9.{name.partition('.')[2]}", data) for name, data in made[2]]


def twelve_bits(made: Records) -> None:
    grey = np.arange(tiny.SIZE**2, dtype=np.uint16).reshape(tiny.SIZE, tiny.SIZE)
    made[2][0] = (made[2][0][0].replace("jpg", "png"), tiny.encode(grey, "PNG"))


def duplicate_member(made: Records) -> None:
    made[2].append(made[2][1])


def not_adjacent(made: Records) -> None:
    made[3].append(made[2].pop())


def about(**fields: object) -> Callable[[Records], None]:
    """Other values in the third record's JSON."""

    def spoil(made: Records) -> None:
        name, data = made[2][1]
        made[2][1] = (name, json.dumps({**json.loads(data), **fields}).encode())

    return spoil


def point(**fields: object) -> Callable[[Records], None]:
    return about(keypoints=[{"part": "head", "x": 3, "y": 4.5, "visible": True, **fields}])


def mask(array: np.ndarray) -> Callable[[Records], None]:
    def spoil(made: Records) -> None:
        made[2][2] = (made[2][2][0], tiny.encode(array, "PNG"))

    return spoil


def with_value(value: int, dtype: type[np.unsignedinteger[Any]] = np.uint8) -> Callable[[Records], None]:
    array = np.zeros((tiny.SIZE, tiny.SIZE), dtype)
    array[3, 5] = value
    return mask(array)
