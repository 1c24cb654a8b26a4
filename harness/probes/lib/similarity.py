"""Cosine similarity against a gallery of any size, in bounded memory, and nearest neighbours whose ties go by gallery order.

Shape legend: N gallery rows, Q queries, D features, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harness.probes.lib.features import CHUNK_ROWS, Features

GALLERY_ROWS = 2**16
"""Most gallery rows converted and multiplied at once."""
GALLERY_VALUES = 2**28
"""Most features of them: 1 GiB in float32, which wide projections reach with fewer rows."""
SORTED_ROWS = 32
"""Rows sorted in full at once, where ties cross the border of the nearest k."""


def inverse_norms(features: Features) -> torch.Tensor:
    """float32 [N]: 1 / L2 norm of each row of [N, D]; 0 for a row of zeros, whose cosine is thereby 0 with everything."""
    chunks = [features[start : start + CHUNK_ROWS].float().norm(dim=1) for start in range(0, len(features), CHUNK_ROWS)]
    norms = torch.cat(chunks)
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def unit_length(queries: torch.Tensor) -> torch.Tensor:
    """float32 [Q, D]; a row of zeros stays one."""
    queries = queries.float()
    return queries * inverse_norms(queries)[:, None]


def gallery_chunks(gallery: Features) -> Iterator[slice]:
    """Rows that are converted and multiplied at once."""
    rows = max(1, min(GALLERY_ROWS, GALLERY_VALUES // gallery.shape[1]))
    for start in range(0, len(gallery), rows):
        yield slice(start, min(start + rows, len(gallery)))


def cosines(unit: torch.Tensor, gallery: Features, gallery_inverse: torch.Tensor, chunk: slice, out: torch.Tensor) -> torch.Tensor:
    """`out`, float32 [Q, chunk], filled with the cosines of queries of unit length [Q, D] with a chunk of the gallery, on the queries' device."""
    part = gallery[chunk].to(unit.device, torch.float32)
    return torch.mm(unit, part.T, out=out).mul_(gallery_inverse[chunk].to(unit.device))


def nearest_rows(similarity: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of [Q, n] along a row, highest first, ties by column: similarities [Q, k] and int64 columns [Q, k]; all n where n < k."""
    n = similarity.shape[1]
    values, columns = similarity.topk(min(k + 1, n), dim=1)
    if n > k:
        tied = torch.nonzero(values[:, k - 1] == values[:, k])[:, 0]
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        for rows in torch.split(tied, SORTED_ROWS):
            # topk takes any of the tied ones; only a full stable sort says which come first
            full, order = similarity[rows].sort(dim=1, descending=True, stable=True)
            values[rows], columns[rows] = full[:, :k], order[:, :k]
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def nearest_in_gallery(queries: torch.Tensor, gallery: Features, gallery_inverse: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As nearest_rows over the whole gallery [N, D], merged chunk by chunk: what is kept never exceeds 2k a query."""
    values = torch.empty(len(queries), 0, device=queries.device)
    columns = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    unit, table = unit_length(queries), torch.empty(0, device=queries.device)
    for chunk in gallery_chunks(gallery):
        size = (len(queries), chunk.stop - chunk.start)
        # one table used again: fresh memory costs a page fault every 4 KiB
        table = table if table.shape == size else torch.empty(size, device=queries.device)
        nearest, where = nearest_rows(cosines(unit, gallery, gallery_inverse, chunk, table), k)
        # what was kept comes first and has lower columns, so a stable order keeps the gallery's
        values, columns = torch.cat([values, nearest], dim=1), torch.cat([columns, where + chunk.start], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, columns = values[:, :k], columns.gather(1, order)[:, :k]
    return values, columns
