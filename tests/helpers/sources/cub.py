"""A source of CUB-200-2011 in the layout of its archives, as small as the tests of its recipe need it."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import built

PARTS = ("back", "beak", "left eye")
IMAGES = {
    1: ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", 1, "1"),
    2: ("001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg", 1, "0"),
    3: ("002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg", 2, "1"),
    4: ("002.Laysan_Albatross/Laysan_Albatross_0003_1033.jpg", 2, "0"),
}
PLACES = """
1 1 12.0 9.0 1
1 2 40.0 30.0 1
1 3 0.0 0.0 0
2 1 0.0 0.0 1
2 2 40.5 3.0 1
2 3 7.5 8.5 0
3 1 0.0 0.0 0
3 2 0.0 0.0 0
3 3 0.0 0.0 0
4 1 1.0 2.0 1
4 2 3.0 4.0 1
4 3 5.0 6.0 1
"""


def cub_source(tmp_path: Path) -> Path:
    """The archive's layout, with three parts and four images of 40 × 30 pixels."""
    root = tmp_path / "CUB_200_2011"
    for number, (file, _, _) in IMAGES.items():
        built.write(root / "images" / file, built.picture(number, mode="L" if number == 4 else "RGB"))
    built.write(root / "images.txt", "".join(f"{number} {file}\n" for number, (file, _, _) in IMAGES.items()))
    built.write(root / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    built.write(root / "image_class_labels.txt", "".join(f"{number} {label}\n" for number, (_, label, _) in IMAGES.items()))
    built.write(root / "train_test_split.txt", "".join(f"{number} {train}\n" for number, (_, _, train) in IMAGES.items()))
    built.write(root / "bounding_boxes.txt", "".join(f"{number} 2.0 3.0 {20 + number}.0 15.0\n" for number in IMAGES))
    built.write(root / "parts" / "parts.txt", "".join(f"{number} {part}\n" for number, part in enumerate(PARTS, 1)))
    built.write(root / "parts" / "part_locs.txt", PLACES)
    return root
