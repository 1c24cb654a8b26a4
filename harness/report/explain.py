"""Where a record comes from: record → study → chosen head → banks → receipts → shards, in plain text, with its value recomputed.

All of it comes from the run's folder, except what a bank's key hashes: that is in the bank's `bank.json` in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import RequestError, nearest
from harness.features.bank import BankSpec, BankStore
from harness.files import file_name
from harness.report.board import Row, parsed
from harness.report.points import base_protocol
from harness.report.published import read_encoders
from harness.report.recompute import recompute
from harness.report.run import Run

NEIGHBOURS = 2
"""Learning rates that are shown on either side of the chosen one."""
OK_SHARDS = 20
"""Maximum number of faultless shards of a bank that are listed."""
NAMED = 5
"""Maximum number of samples that are named per reason."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    lines: Sequence[str]
    differs: bool
    """Whether a value is not what the predictions give."""


def explain(run: Run, encoder: str, task: str, cache: str) -> Explanation:
    """The chain of every record of an encoder and a task; `task` may end in `@<protocol>`. `cache` is where banks are looked for.

    Raises RequestError, with the nearest name, where there is no such record.
    """
    lines: list[str] = []
    differs = False
    for rows in _asked_for(run, encoder, task):
        chain = _Chain(run, rows, cache)
        lines += [*([""] if lines else []), *chain.lines()]
        differs |= chain.differs
    return Explanation(lines=["".join(c for c in line if c.isprintable()) for line in lines], differs=differs)


def _asked_for(run: Run, encoder: str, task: str) -> list[list[Row]]:
    """Records of that encoder and task, those of one protocol together."""
    encoders = list(dict.fromkeys(row["encoder"] for row in run.results))
    if encoder not in encoders:
        raise RequestError(f"--explain: expected an encoder of the run ({', '.join(encoders)}), got {encoder!r}{nearest(encoder, encoders)}")
    rows = [row for row in run.results if row["encoder"] == encoder]
    name, at, protocol = task.partition("@")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if name not in tasks:
        raise RequestError(f"--explain: expected a task of {encoder} ({', '.join(tasks)}), got {name!r}{nearest(name, tasks)}")
    studies: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] == name:
            studies.setdefault(str(row["protocol"]), []).append(row)
    chosen = {name: rows for name, rows in studies.items() if name == protocol} or {
        name: rows for name, rows in studies.items() if not at or base_protocol(name) == protocol
    }
    if not chosen:
        raise RequestError(f"--explain: expected a protocol of {name} ({', '.join(studies)}), got {protocol!r}{nearest(protocol, studies)}")
    return list(chosen.values())


class _Chain:
    """The records of one study, and what they rest on."""

    def __init__(self, run: Run, rows: Sequence[Row], cache: str) -> None:
        self._run, self._rows, self._record, self._cache = run, rows, rows[0], cache
        self._trials = [row for row in run.trials if self._is_of_study(row)]
        self.differs = False

    def lines(self) -> Iterator[str]:
        yield from self._record_lines()
        yield from self._study_lines()
        yield from self._head_lines()
        yield from self._bank_lines()
        yield from self._recomputed_lines()

    def _is_of_study(self, trial: Row) -> bool:
        same = all(trial[name] == self._record[name] for name in ("encoder", "task", "protocol"))
        return same and trial["study_id"] in (None, self._record["study_id"])

    # --- record -------------------------------------------------------------------------------------------------------

    def _record_lines(self) -> Iterator[str]:
        record = self._record
        yield f"record  {record['task']}@{record['protocol']} of {record['encoder']}"
        for row in self._rows:
            yield f"  {row['metric']}: {_value(row)}, {_text(row['status'])}, of {_text(row['n'])} items"
            if row["error"]:
                yield f"    {row['error']}"
        version = f"version {_text(record['dataset_version'])}"
        yield f"  scored on {_text(record['split'])} of {record['dataset']}, {version}; samples lost: {_text(record['n_failed'])}"
        yield f"  view {_text(record['view'])}, probe {_text(record['probe'])}, readout {_text(record['readout'])}"
        yield f"  protocol {_pairs(parsed(record['protocol_fields']))}"
        yield f"  run {_text(record['run_id'])}, seed {_text(record['seed'])}, {_text(record['precision'])} on {_text(record['device'])}"
        yield f"  scored at {_text(record['created_at'])} by commit {_text(record['git_commit'])}; counters {_pairs(parsed(record['code_versions']))}"

    # --- study and head -----------------------------------------------------------------------------------------------

    def _study_lines(self) -> Iterator[str]:
        record, trials = self._record, self._trials
        if record["status"] == "undefined" and record["study_id"] is None and not trials and not parsed(record["hyperparameters"]):
            yield "study   none: the encoder can have no value here"
            return
        yield f"study   {record['study_id'] or 'of an earlier version, which did not record its id'}"
        if trials:
            rates = [trial["lr"] for trial in trials if trial["lr"] is not None]
            between = f", learning rates {min(rates):.4g} to {max(rates):.4g}" if rates else ""
            readouts = ", ".join(dict.fromkeys(_text(trial["readout"]) for trial in trials))
            counts = f"{_count(len({trial['round'] for trial in trials}), 'round')}, {_count(len(trials), 'head')}"
            yield f"  searched for {trials[0]['metric']} on {_text(record['selected_on'])}: {counts}, readouts {readouts}{between}"
        else:
            yield f"  nothing was searched, or no trial was kept; selected on {_text(record['selected_on'])}"
        if record["study_id"]:
            yield f"  journal {_place(self._run, 'tune', 'studies', record['study_id'])}"
            yield f"  heads of every round {self._in_cache('studies', record['study_id'])}"

    def _head_lines(self) -> Iterator[str]:
        point = parsed(self._record["hyperparameters"])
        if not point:
            yield "chosen  no head"
            for trial in self._trials[:NAMED]:
                yield f"  {_head(trial)}: {_score(trial)}"
            return
        chosen = next((trial for trial in self._trials if (trial["round"], trial["head"]) == (point.get("round"), point.get("head"))), None)
        if chosen is None:
            yield f"chosen  {_pairs(point)}; there was nothing to choose, or its trial was not kept"
        else:
            yield f"chosen  {_head(chosen)}: {_score(chosen)} on {self._record['selected_on']}"
            yield from self._neighbour_lines(chosen)
        weights = f"{self._record['task']}@{self._record['protocol']}.safetensors"
        yield f"  weights {_place(self._run, 'heads', file_name(self._record['encoder']), weights)}"

    def _neighbour_lines(self, chosen: Row) -> Iterator[str]:
        """The neighbours of the chosen head among those of its readout, by learning rate, and the range of the other readouts' heads."""
        alike = sorted(
            (trial for trial in self._trials if trial["readout"] == chosen["readout"]), key=lambda row: (row["lr"] or 0.0, row["round"], row["head"])
        )
        place = alike.index(chosen)
        start = max(0, place - NEIGHBOURS)
        for trial in alike[start : place + NEIGHBOURS + 1]:
            yield f"  {'>' if trial is chosen else ' '} {_head(trial)}: {_score(trial)}"
        others = [trial for trial in self._trials if trial["readout"] != chosen["readout"]]
        for readout in dict.fromkeys(trial["readout"] for trial in others):
            values = [trial["val_value"] for trial in others if trial["readout"] == readout]
            defined = [value for value in values if value is not None]
            between = f"{min(defined):.6g} to {max(defined):.6g}" if defined else "none has a value"
            yield f"    {_count(len(values), 'head')} of readout {readout}: {between}"

    # --- banks --------------------------------------------------------------------------------------------------------

    def _bank_lines(self) -> Iterator[str]:
        keys = self._record["bank_keys"] or []
        yield f"banks   {len(keys) or 'none were read'}"
        before = None
        for key in keys:
            receipts = [row for row in self._run.ledger if row["bank_key"] == key]
            described = self._described(key)
            yield f"  {key} of {_splits(receipts, described)}"
            yield f"    {self._in_cache(key)}"
            if described is None:
                yield "    what it hashes could not be shown: its bank.json is not there"
                identity = f"of that the record says: {self._identity_of_record()}"
            else:
                shards = _count(len(described.get("shards") or ()), "shard")
                yield f"    hashes readout {described.get('readout')}, view {described.get('view')}, {shards} by name, sha256 and samples, and"
                identity = _pairs(described.get("identity") or {})
                if _key_of(described) != key:
                    self.differs = True
                    yield f"    differs: its bank.json gives the key {_key_of(described)}; it was changed"
            yield f"    {'the same as the bank before it' if identity == before else identity}"
            before = identity
            yield from _receipt_lines(receipts)

    def _described(self, key: str) -> Mapping[str, Any] | None:
        """The bank's `bank.json`, None where the cache has none that can be read."""
        try:
            data = BankStore(self._cache).read_bytes(key, "bank.json")
            content = None if data is None else json.loads(data)
        except Exception:  # fsspec's file systems raise many types of error
            return None
        return content if isinstance(content, dict) else None

    def _identity_of_record(self) -> str:
        described = read_encoders(self._run.out).get(self._record["encoder"], {})
        recorded = {name: self._record[name] for name in ("weights_sha256", "view", "precision", "device")}
        return _pairs({**recorded, **{name: described[name] for name in ("family", "architecture", "preprocessing") if name in described}})

    def _in_cache(self, *names: str) -> str:
        place = "/".join((self._cache, *names))
        try:
            exists = BankStore(place).exists()
        except Exception:  # as above
            exists = False
        return f"in the cache: {place}" if exists else f"not in the cache: {place} is not there"

    # --- recomputed ---------------------------------------------------------------------------------------------------

    def _recomputed_lines(self) -> Iterator[str]:
        record = self._record
        path = _place(self._run, "predictions", file_name(record["encoder"]), f"{record['task']}.parquet")
        predictions = self._run.predictions(record["encoder"], record["task"], record["protocol"])
        yield f"value   from {path}, {_count(0 if predictions is None else len(predictions), 'row')} of this protocol"
        for row in self._rows:
            again = recompute(row, predictions)
            self.differs |= again.differs
            yield f"  {row['metric']}: {again.text}"


def _receipt_lines(receipts: Sequence[Row]) -> Iterator[str]:
    """The receipts of a bank's shards: their sum, and one line each."""
    if not receipts:
        yield "    receipts: none, the run's ledger does not know this bank"
        return
    sums = ", ".join(f"{sum(row[name] or 0 for row in receipts):,} {name}" for name in ("expected", "seen", "failed"))
    yield f"    receipts: {_count(len(receipts), 'shard')}, {sums}"
    fine = [row for row in receipts if row["status"] == "ok"]
    for row in receipts:
        if row["status"] != "ok" or len(fine) <= OK_SHARDS:
            yield from _shard_lines(row)
    if len(fine) > OK_SHARDS:
        yield f"      and {_count(len(fine), 'shard')} more, of which nothing was lost"


def _shard_lines(row: Row) -> Iterator[str]:
    digest = f", sha256 {row['sha256'][:12]}…" if row["sha256"] else ""
    yield (
        f"      {row['shard']}: {_text(row['status'])}, {_text(row['seen'])} of {_text(row['expected'])} seen, {_text(row['failed'])} failed, "
        f"attempts {_text(row['attempts'])}{digest}"
    )
    for reason, names in parsed(row["reasons"]).items():
        listed = list(names) if isinstance(names, list) else [names]
        omitted = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
        yield f"        {reason}: {', '.join(map(str, listed[:NAMED]))}{omitted}"


def _key_of(described: Mapping[str, Any]) -> str | None:
    """The key that a `bank.json` gives; None where it lacks what a key hashes."""
    try:
        named = {name: described[name] for name in ("dataset", "split", "shards", "readout", "view")}
        return BankSpec(**named, identity=tuple(sorted(described["identity"].items()))).key
    except (KeyError, TypeError, AttributeError):
        return None


def _splits(receipts: Iterable[Row], described: Mapping[str, Any] | None) -> str:
    splits = dict.fromkeys(f"{row['dataset']}/{row['split']}" for row in receipts)
    return ", ".join(splits) or (f"{described.get('dataset')}/{described.get('split')}" if described else "an unknown split")


def _place(run: Run, *names: str) -> str:
    path = run.out.joinpath(*names)
    return str(path) if path.exists() else f"{path} (not there)"


def _head(trial: Row) -> str:
    rate = f"lr {trial['lr']:.6g}, " if trial["lr"] is not None else ""
    return f"{rate}readout {_text(trial['readout'])}, round {_text(trial['round'])}, head {_text(trial['head'])}"


def _score(trial: Row) -> str:
    if trial["val_value"] is None:
        return f"no {trial['metric']}: {trial['error'] or 'no reason was recorded'}"
    return f"{trial['metric']} {trial['val_value']:.6g}{' (stopped)' if trial['status'] == 'stopped' else ''}"


def _value(row: Row) -> str:
    if row["value"] is None:
        return "no value"
    between = f" [{row['ci_low']:.6g}, {row['ci_high']:.6g}]" if row["ci_low"] is not None and row["ci_high"] is not None else " without interval"
    return f"{row['value']:.6g}{between}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{name} {json.dumps(value) if isinstance(value, dict | list | None) else value}" for name, value in values.items())
        or "not recorded"
    )
