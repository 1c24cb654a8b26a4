"""Tokens dropped, misplaced and shuffled: what stays, what is wrong and by how much, and that nothing altered is the plain encoder to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from harness.core import UNMARKED, Alteration, EncoderInfo, View
from harness.data.manifest import load_manifest
from harness.data.views.dropped_tokens import DroppedTokens, Mode
from harness.data.views.misplaced_tokens import MisplacedTokens
from harness.data.views.shuffled_patches import ShuffledPatches
from harness.data.views.whole import Whole
from harness.encoders import EncoderSpec, load
from harness.errors import RequestError
from harness.features.bank import BankSpec
from harness.features.device import Compute
from harness.features.extract import BankJob, Extractor, Pass, ShardWork
from tests.helpers import tiny

GRID = (6, 8)
CELLS = GRID[0] * GRID[1]
KEYS = [f"image-{number}" for number in range(200)]
IMAGE = torch.randn(3, 48, 64, generator=torch.Generator().manual_seed(0))
MODES: list[Mode] = ["random", "centre", "block"]


def misplaced(key: str, grid: tuple[int, int] = GRID, **parameters: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells kept, positions given, and which of these are marked as wrong, all [n]; a token may have no mark where nothing is dropped."""
    altered = MisplacedTokens(**parameters)(IMAGE, grid, key)
    keep = np.arange(grid[0] * grid[1]) if altered.keep is None else altered.keep.numpy()
    positions = keep if altered.positions is None else altered.positions.numpy()
    mark = altered.marks["misplaced"]
    assert mark.dtype == np.uint8
    assert mark.shape == (1, len(keep))
    assert len(positions) == len(keep)
    assert (mark[0][positions != keep] == 1).all()
    return keep, positions, mark[0] == 1


def marks(key: str, grid: tuple[int, int] = GRID, **parameters: Any) -> np.ndarray:
    """uint8 [n]."""
    return MisplacedTokens(**parameters)(IMAGE, grid, key).marks["misplaced"][0]


# --- misplaced ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("theta", [0.2, 1.0])
def test_up_to_one_half_wrong_positions_are_those_of_dropped_tokens_none_twice(kept_share: float, theta: float) -> None:
    for key in KEYS:
        keep, positions, wrong = misplaced(key, kept_share=kept_share, theta=theta)
        assert len(keep) == int(kept_share * CELLS)
        assert (np.diff(keep) > 0).all()
        assert (positions[~wrong] == keep[~wrong]).all()
        assert not set(positions[wrong]) & set(keep)
        assert len(set(positions)) == len(positions)
        if theta == 1.0:
            assert wrong.all()


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), GRID])
@pytest.mark.parametrize("kept_share", [0.8, 0.9, 1.0])
@pytest.mark.parametrize("theta", [0.3, 0.9, 1.0])
def test_where_dropped_positions_run_out_the_rest_are_exchanged_and_none_keeps_its_own(
    grid: tuple[int, int], kept_share: float, theta: float
) -> None:
    ran_out = 0
    for key in KEYS:
        keep, positions, wrong = misplaced(key, grid, kept_share=kept_share, theta=theta)
        dropped = set(range(grid[0] * grid[1])) - set(keep)
        given, wrong_cells = set(positions[wrong]), set(keep[wrong])
        assert (positions[~wrong] == keep[~wrong]).all()
        assert (positions[wrong] != keep[wrong]).all()
        assert len(set(positions)) == len(positions)
        assert given <= dropped | wrong_cells
        if len(wrong_cells) > len(dropped):
            ran_out += 1
            assert dropped <= given, "dropped positions are used up before wrong tokens exchange theirs"
    assert ran_out


def test_a_single_wrong_token_has_nowhere_to_go_where_nothing_was_dropped() -> None:
    alone = 0
    for key in KEYS:
        _, positions, wrong = misplaced(key, (2, 2), kept_share=1.0, theta=0.25)
        mark = marks(key, (2, 2), kept_share=1.0, theta=0.25)
        assert wrong.sum() != 1
        assert wrong.any() or (positions == np.arange(4)).all()
        if (mark == UNMARKED).any():
            alone += 1
            assert sorted(mark.tolist()) == [0, 0, 0, UNMARKED]
            # where one cell is dropped, a token that is wrong goes there
            keep, _, elsewhere = misplaced(key, (2, 2), kept_share=0.75, theta=0.25)
            assert keep[elsewhere].tolist() == [cell for cell in np.flatnonzero(mark) if cell in keep]
    assert alone > 50
    for key in KEYS:
        assert (marks(key, (2, 2), kept_share=0.75, theta=0.25) <= 1).all()


def test_banks_of_what_is_marked_otherwise_have_other_keys() -> None:
    assert MisplacedTokens(kept_share=1.0, theta=0.2).identity == "misplaced_tokens(kept_share=1.0,theta=0.2,seed=0,alone=unmarked)"
    assert MisplacedTokens(kept_share=0.5, theta=0.2).identity == "misplaced_tokens(kept_share=0.5,theta=0.2,seed=0)"


@pytest.mark.parametrize(("grid", "theta"), [((2, 2), 0.2), ((4, 4), 0.05), ((7, 7), 0.02), (GRID, 0.05), (GRID, 0.2), (GRID, 0.5)])
@pytest.mark.parametrize("kept_share", [0.25, 1.0])
def test_the_share_of_tokens_that_are_wrong_or_would_be_is_theta_within_its_binomial_interval(
    grid: tuple[int, int], theta: float, kept_share: float
) -> None:
    wrong = np.concatenate([marks(f"image-{number}", grid, kept_share=kept_share, theta=theta) != 0 for number in range(2000)])
    interval = binomtest(int(wrong.sum()), len(wrong), theta).proportion_ci(confidence_level=0.999)
    assert interval.low <= theta <= interval.high


def test_every_cell_is_kept_as_often_and_goes_wrong_as_often() -> None:
    stayed, wrong, given = (np.zeros(CELLS) for _ in range(3))
    for number in range(2000):
        keep, positions, is_wrong = misplaced(str(number), kept_share=0.25, theta=0.5)
        stayed[keep] += 1
        wrong[keep[is_wrong]] += 1
        given[positions[is_wrong]] += 1
    for count, share in ((stayed, 0.25), (wrong, 0.125), (given, 0.125)):
        assert np.abs(count - 2000 * share).max() < 5 * (2000 * share * (1 - share)) ** 0.5


def test_exchanged_positions_go_to_any_wrong_token() -> None:
    """Of four wrong tokens and one dropped position, every token gets the dropped one as often."""
    gets = np.zeros(5)
    for number in range(2000):
        keep, positions, _ = misplaced(str(number), (1, 5), kept_share=0.8, theta=1.0)
        (dropped,) = set(range(5)) - set(keep)
        gets[np.flatnonzero(positions == dropped)] += 1
    assert np.abs(gets[:4] - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_smaller_share_is_part_of_a_larger_one_and_so_are_wrong_tokens() -> None:
    for key in KEYS[:50]:
        shares = [set(misplaced(key, kept_share=share, theta=0.2)[0]) for share in (0.1, 0.25, 0.5, 1.0)]
        assert all(small < large for small, large in itertools.pairwise(shares))
        by_theta = [misplaced(key, kept_share=0.5, theta=theta) for theta in (0.1, 0.3, 0.9)]
        assert all((small[2] <= large[2]).all() for small, large in itertools.pairwise(by_theta))
        dropped = [set(DroppedTokens(kept_share=share).kept_cells(GRID, key)) for share in (0.1, 0.25, 0.5)]
        assert dropped == shares[:3], "what is kept of an image is the same whether or not some of it is misplaced"


def test_nothing_wrong_and_nothing_dropped_is_nothing_named() -> None:
    plain = MisplacedTokens(kept_share=1.0, theta=0.0)(IMAGE, GRID, "a")
    assert (plain.keep, plain.positions) == (None, None)
    assert not plain.marks["misplaced"].any()
    dropped = MisplacedTokens(kept_share=0.5, theta=0.0)(IMAGE, GRID, "a")
    assert dropped.keep is not None
    assert dropped.positions is None
    # all images of a view must have positions or none, even those of which by chance no token is wrong
    rare = [MisplacedTokens(kept_share=1.0, theta=1e-9)(IMAGE, GRID, key) for key in KEYS]
    assert all(altered.positions is not None and not altered.marks["misplaced"].any() for altered in rare)


# --- dropped --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [(7, 7), (6, 8), (16, 16), (1, 9), (37, 37)])
@pytest.mark.parametrize("kept_share", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_as_many_cells_stay_as_the_share_says(mode: Mode, grid: tuple[int, int], kept_share: float) -> None:
    cells = grid[0] * grid[1]
    for key in KEYS[:20]:
        cells_kept = DroppedTokens(kept_share=kept_share, mode=mode).kept_cells(grid, key)
        assert len(cells_kept) == max(1, int(kept_share * cells + 1e-9))
        assert (np.diff(cells_kept) > 0).all()
        assert cells_kept.min() >= 0
        assert cells_kept.max() < cells


def test_the_centre_goes_first() -> None:
    cells_kept = DroppedTokens(kept_share=0.75, mode="centre").kept_cells((4, 4), "a")
    assert set(range(16)) - set(cells_kept.tolist()) == {5, 6, 9, 10}
    assert (
        DroppedTokens(kept_share=0.5, mode="centre").kept_cells((4, 4), "a").tolist()
        == DroppedTokens(kept_share=0.5, mode="centre").kept_cells((4, 4), "b").tolist()
    )
    gone = [set(range(49)) - set(DroppedTokens(kept_share=share, mode="centre").kept_cells((7, 7), "a").tolist()) for share in (0.9, 0.5, 0.1)]
    assert gone[0] < gone[1] < gone[2]


def test_a_block_is_one_rectangle_whose_last_row_may_be_shorter_and_lies_anywhere() -> None:
    places = set()
    for key in KEYS:
        gone = np.setdiff1d(np.arange(256), DroppedTokens(kept_share=0.5, mode="block").kept_cells((16, 16), key))
        rows, columns = gone // 16, gone % 16
        widths = [np.ptp(columns[rows == row]) + 1 for row in np.unique(rows)]
        assert widths == [12] * 10 + [8], "128 cells, in rows of 16 times the root of one half"
        assert len({columns[rows == row].min() for row in np.unique(rows)}) == 1
        assert np.ptp(rows) + 1 == 11
        places.add((rows.min(), columns.min()))
    assert {place[0] for place in places} == set(range(6))
    assert {place[1] for place in places} == set(range(5))


@pytest.mark.parametrize("size", [(48, 64), (50, 67)])
def test_grey_has_the_mean_where_cells_go_and_the_image_elsewhere(size: tuple[int, int]) -> None:
    image = torch.randn(3, *size) + 10
    alteration = DroppedTokens(kept_share=0.5, how="grey")
    altered = alteration(image, GRID, "a")
    cells_kept = set(alteration.kept_cells(GRID, "a").tolist())
    assert altered.keep is None
    for row in range(size[0]):
        for column in range(size[1]):
            cell = (row * GRID[0] // size[0]) * GRID[1] + column * GRID[1] // size[1]
            expected = image[:, row, column] if cell in cells_kept else torch.zeros(3)
            assert torch.equal(altered.image[:, row, column], expected)


# --- shuffled -------------------------------------------------------------------------------------------------------------


def cells_of(image: torch.Tensor, h: int, w: int) -> list[torch.Tensor]:
    height, width = image.shape[1] // h, image.shape[2] // w
    return [image[:, r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(h) for c in range(w)]


@pytest.mark.parametrize("grid", [0, 2, 4, 8])
def test_shuffling_moves_whole_cells(grid: int) -> None:
    h, w = (grid, grid) if grid else GRID
    after = cells_of(ShuffledPatches(grid=grid)(IMAGE, GRID, "a").image, h, w)
    before = cells_of(IMAGE, h, w)
    order = [next(index for index, cell in enumerate(before) if torch.equal(cell, moved)) for moved in after]
    assert sorted(order) == list(range(h * w))
    assert order != list(range(h * w))


def test_one_cell_is_the_image_itself() -> None:
    assert torch.equal(ShuffledPatches(grid=1)(IMAGE, GRID, "a").image, IMAGE)


def test_pixels_that_are_left_over_stay() -> None:
    image = torch.arange(3 * 11 * 14, dtype=torch.float32).reshape(3, 11, 14)
    shuffled = ShuffledPatches(grid=4)(image, GRID, "a").image
    within = torch.zeros(11, 14, dtype=torch.bool)
    within[1:9, 1:13] = True
    assert torch.equal(shuffled[:, ~within], image[:, ~within])
    assert not torch.equal(shuffled[:, within], image[:, within])
    assert torch.equal(shuffled.flatten().sort().values, image.flatten())


def test_a_cell_keeps_its_place_as_often_as_chance_has_it() -> None:
    image = torch.arange(4.0).reshape(1, 2, 2).expand(3, -1, -1)
    stays = sum(int((ShuffledPatches(grid=2)(image, GRID, key).image == image)[0].sum()) for key in KEYS)
    assert abs(stays - len(KEYS)) < 5 * len(KEYS) ** 0.5


# --- all of them ----------------------------------------------------------------------------------------------------------

ALTERATIONS: list[Alteration] = [
    MisplacedTokens(kept_share=0.5, theta=0.5),
    DroppedTokens(kept_share=0.5),
    DroppedTokens(kept_share=0.5, mode="block"),
    DroppedTokens(kept_share=0.5, how="grey"),
    ShuffledPatches(grid=4),
]


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=lambda alteration: alteration.identity)
def test_what_becomes_of_an_image_depends_on_its_key_and_the_seed_alone(alteration: Alteration) -> None:
    def outcome(alter: Alteration, key: str) -> tuple[object, ...]:
        altered = alter(IMAGE, GRID, key)
        named = [None if cells is None else tuple(cells.tolist()) for cells in (altered.keep, altered.positions)]
        return (*named, altered.image.numpy().tobytes(), *(mark.tobytes() for mark in altered.marks.values()))

    first = outcome(alteration, "a")
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # whatever global state there is must not matter
    assert outcome(alteration, "a") == first
    assert outcome(alteration, "b") != first
    other = type(alteration)(**{**vars(alteration), "seed": 1})
    assert outcome(other, "a") != first
    assert other.identity != alteration.identity


def test_the_identity_tells_every_parameter() -> None:
    changed: list[Alteration] = [
        MisplacedTokens(kept_share=0.5, theta=0.25),
        MisplacedTokens(kept_share=0.25, theta=0.5),
        DroppedTokens(kept_share=0.25),
        DroppedTokens(kept_share=0.5, mode="centre"),
        ShuffledPatches(grid=0),
        ShuffledPatches(grid=2),
    ]
    identities = [Whole(alteration=alteration).identity for alteration in (*ALTERATIONS, *changed)]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize(
    ("kind", "parameters", "reason"),
    [
        (MisplacedTokens, {"kept_share": 0.0, "theta": 0.2}, "kept_share above 0 and at most 1, got 0"),
        (MisplacedTokens, {"kept_share": 0.5, "theta": 1.1}, "theta from 0 to 1, got 1.1"),
        (DroppedTokens, {"kept_share": 1.5}, "at most 1, got 1.5"),
        (DroppedTokens, {"kept_share": 0.5, "mode": "center"}, "random, centre, block, got 'center'"),
        (DroppedTokens, {"kept_share": 0.5, "how": "black"}, "drop, grey, got 'black'"),
        (ShuffledPatches, {"grid": -1}, "got -1"),
    ],
)
def test_parameters_that_cannot_be_are_refused(kind: Any, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        kind(**parameters)


def info_of(architecture: str) -> EncoderInfo:
    return load(EncoderSpec.parse({"name": architecture, "architecture": architecture, "random": True, "preprocessing": {"size": 32}})).info


def test_encoders_without_absolute_positions_are_refused_in_words() -> None:
    vit, resnet = info_of("test_vit"), info_of("test_resnet")
    for alteration in ALTERATIONS:
        assert alteration.refuses(vit) is None
    assert MisplacedTokens(kept_share=0.5, theta=0.2).refuses(resnet) == (
        "test_resnet has no position embeddings: tokens can be misplaced where each is given an absolute position"
    )
    dropped = [DroppedTokens(kept_share=share).refuses(resnet) for share in (0.5, 1.0)]
    assert dropped == ["test_resnet has no position embeddings: tokens can be dropped where each is given an absolute position"] * 2
    assert DroppedTokens(kept_share=0.5, how="grey").refuses(resnet) is None
    assert ShuffledPatches(grid=32).refuses(resnet) is None
    assert ShuffledPatches(grid=33).refuses(resnet) == "an image of 32x32 pixels cannot be cut in 33x33 cells"


# --- through the encoder --------------------------------------------------------------------------------------------------


def extracted(root: Path, view: View, readouts: tuple[str, ...] = ("cls", "mean", "tokens", "tokens@1")) -> dict[str, np.ndarray]:
    """Readout to features of the tiny test split, by a small transformer on the CPU."""
    encoder = load(EncoderSpec.parse({"name": "vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}}))
    manifest = load_manifest(str(root), "tiny")
    shard = manifest.split("test").shards[0]
    specs = [BankSpec(dataset="tiny", split="test", shards=(), readout=name, view=view.identity, identity=()) for name in readouts]
    work = ShardWork(
        dataset="tiny",
        split="test",
        url=str(root / "tiny" / shard.file),
        shard=shard,
        rules=manifest.rules,
        passes=(Pass(encoder="vit", view=view, banks=tuple(BankJob(readout=spec.readout, bank=spec) for spec in specs)),),
    )
    extractor = Extractor(Compute("float32", False, 1), {"vit": encoder}.__getitem__, batch_size=4, decode_threads=1)
    return {spec.readout: np.stack(rows.features) for spec, rows, _ in extractor.run(work, node="here", attempts=1)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    tiny.build(root, splits={"test": 6})
    return root


@pytest.mark.parametrize(
    "alteration",
    [
        MisplacedTokens(kept_share=1.0, theta=0.0),
        DroppedTokens(kept_share=1.0),
        DroppedTokens(kept_share=1.0, how="grey"),
        ShuffledPatches(grid=1),
    ],
    ids=lambda alteration: alteration.identity,
)
def test_what_alters_nothing_gives_the_plain_encoders_features_to_the_bit(shards: Path, alteration: Alteration) -> None:
    plain, altered = extracted(shards, Whole()), extracted(shards, Whole(alteration=alteration))
    for readout, features in plain.items():
        np.testing.assert_array_equal(altered[readout], features)


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=lambda alteration: alteration.identity)
def test_what_alters_something_changes_features(shards: Path, alteration: Alteration) -> None:
    plain, altered = extracted(shards, Whole(), ("cls",)), extracted(shards, Whole(alteration=alteration), ("cls",))
    assert (np.abs(plain["cls"] - altered["cls"]).max(axis=1) > 1e-4).all()


def test_misplaced_tokens_alone_differ_from_dropped_ones_alone(shards: Path) -> None:
    dropped = extracted(shards, Whole(alteration=DroppedTokens(kept_share=0.5)), ("tokens",))["tokens"]
    right = extracted(shards, Whole(alteration=MisplacedTokens(kept_share=0.5, theta=0.0)), ("tokens",))["tokens"]
    wrong = extracted(shards, Whole(alteration=MisplacedTokens(kept_share=0.5, theta=0.5)), ("tokens",))["tokens"]
    assert dropped.shape == (6, 1, 8, 64)
    np.testing.assert_array_equal(dropped, right)
    assert np.abs(wrong - right).max() > 1e-4
