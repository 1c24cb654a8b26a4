"""The journal of a run: what each study has come to, which a later run resumes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from harness.files import publish
from harness.search.state import StudyState
from harness.search.study import Round, Score, Study

T = TypeVar("T")


class Journal:
    """What each study has come to, one small file a round, under `<out>/tune/studies/<study id>/`: what a run resumes from."""

    def __init__(self, out: Path) -> None:
        self._root = out / "tune" / "studies"

    def folder(self, study: Study) -> Path:
        return self._root / study.id

    def load(self, state: StudyState, has_heads: Callable[[Study, int], bool]) -> None:
        """Bring `state` up to what was journalled; rounds whose heads are gone from the cache do not count, unless the study was scored."""
        folder = self.folder(state.study)
        score = _read(folder / "score.json", Score.from_json)
        rounds: list[Round] = []
        while (journalled := _read(folder / f"round-{len(rounds)}.json", Round.from_json)) is not None:
            if score is None and not has_heads(state.study, len(rounds)):
                break
            rounds.append(journalled)
        state.rounds = rounds[: state.planned_rounds]
        if score is not None and len(state.rounds) == state.planned_rounds:
            state.score = score

    def forget(self, state: StudyState) -> None:
        """Begin the study anew."""
        shutil.rmtree(self.folder(state.study), ignore_errors=True)
        state.rounds, state.score = [], None

    def save(self, state: StudyState) -> None:
        """Journal what is new."""
        folder = self.folder(state.study)
        for finished in state.rounds:
            _write(folder / f"round-{finished.index}.json", finished.to_json())
        if state.score is not None:
            _write(folder / "score.json", state.score.to_json())


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """A journalled file, or None where there is none, or one that was cut short: that one goes, so that it can be written again."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, text: str) -> None:
    if not path.exists():
        with publish(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
