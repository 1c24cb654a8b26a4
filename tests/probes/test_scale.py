"""k-NN and retrieval on a bank of 200,000 rows x 384 in eight parts, in a separate process that reports its peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_KIB = 2 * 1024**2

SCRIPT = """
import json, resource, sys
import numpy as np, torch
from harness.features.bank import BankSpec, BankStore, ShardRows, Receipt
from harness.core import Rows
from harness.metrics.retrieval import average_precision
from harness.probes import probe

torch.set_num_threads(2)
N, D, QUERIES, CLASSES = 202_000, 384, 2_000, 20
rng = np.random.default_rng(0)
targets = rng.integers(0, CLASSES, N)
features = rng.standard_normal((N, D), dtype=np.float32)
features += rng.standard_normal((CLASSES, D), dtype=np.float32)[targets] * np.float32(0.2)
names = [str(i) for i in range(N)]
groups = [str(i // 4) for i in range(N)]
store, each = BankStore(sys.argv[1]), N // 8
spec = BankSpec(dataset="x", split="s", shards=tuple((f"{n}.tar", "", each) for n in range(8)), readout="cls", view="v", identity=())
for number in range(8):
    own = slice(number * each, (number + 1) * each)
    part = ShardRows(keys=names[own], groups=groups[own], targets=targets[own].tolist(), features=list(features[own]))
    told = {"failed": 0, "duplicates": 0, "reasons": {}, "sha256": "", "attempts": 1, "node": "", "seconds": 0.0, "images": each}
    store.write_part(spec, part, Receipt(bank_key=spec.key, shard=f"{number}.tar", expected=each, seen=each, rows=each, **told))
del features
rows = store.rows(spec)
features = rows.features
how = {"classes": CLASSES, "seed": 0, "device": torch.device("cpu")}

retrieval = probe("retrieval").fit(None, [None], protocol=probe("retrieval").fields(max_queries=QUERIES), **how).predict(rows, 0)

def part(chosen):
    return Rows(keys=names[chosen], groups=groups[chosen], targets=targets[chosen], features=features[chosen])

knn = probe("knn").fit(part(slice(QUERIES, N)), [None], protocol=probe("knn").fields(), **how).predict(part(slice(QUERIES)), 0)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

norms = np.linalg.norm(features, axis=1)

def cosine(query):
    return features @ features[query] / norms / norms[query]

def precision(query):
    kept = np.arange(N) // 4 != query // 4
    return average_precision(cosine(query)[kept], (targets == targets[query])[kept])

def vote(query):
    near = cosine(query)[QUERIES:]
    nearest = np.argsort(-near)[:20]
    votes = np.bincount(targets[QUERIES:][nearest], weights=np.exp(near[nearest].astype(np.float64) / 0.07), minlength=CLASSES)
    return votes.max() / votes.sum()

print(json.dumps({
    "peak_kib": peak,
    "queries": len(retrieval),
    "scores": retrieval.scores[:5].tolist(),
    "precisions": [precision(int(key)) for key in retrieval.keys[:5]],
    "shares": knn.scores[:5].tolist(),
    "votes": [vote(query) for query in range(5)],
}))
"""


@pytest.mark.slow
def test_200_000_rows_are_searched_within_2_gib(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["peak_kib"] < LIMIT_KIB
    assert output["queries"] == 2000
    assert output["scores"] == pytest.approx(output["precisions"], abs=1e-5)
    assert output["shares"] == pytest.approx(output["votes"], abs=1e-4)
