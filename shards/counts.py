"""The items that a build includes and leaves out, by split and reason: for counts.json beside the manifest, and for the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from harness.errors import RequestError

FILE_NAME = "counts.json"
UNFIT = "unfit samples"
"""The reason where a recipe's refusal gives none."""
_LEFT_OUT = " left out"
_EXAMPLE = 120
"""Characters of an example in a message."""


class Unfit(RequestError):
    """An item that cannot be a sample. Left out and counted under `reason` with --partial, or always where `lawful`; else it ends the build."""

    def __init__(self, message: str, reason: str, lawful: bool = False) -> None:
        super().__init__(message, reason, lawful)  # all arguments, since it must pickle
        self.reason, self.lawful = reason, lawful
        """Lawful: the data set as published has such items, so leaving them out does not depart from it."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Counts:
    """Numbers by the splits' official names."""

    included: dict[str, Counter[str]] = field(default_factory=dict)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Split → reason, a plural noun → number."""
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    """(split, reason) → the first item that was left out so, in words."""

    def keep(self, split: str, noun: str, count: int = 1) -> None:
        self.included.setdefault(split, Counter())[noun] += count

    def leave_out(self, split: str, reason: str, count: int = 1, *, example: str = "") -> None:
        if count:
            self.left_out.setdefault(split, Counter())[reason] += count
            if example:
                self.examples.setdefault((split, reason), example)

    def with_left_out(self, additions: Mapping[str, Mapping[str, int]]) -> Counts:
        """These counts and `additions`, split → reason → number, left out."""
        total = Counts(included={split: Counter(counts) for split, counts in self.included.items()}, examples=dict(self.examples))
        for table in (self.left_out, additions):
            for split, counts in table.items():
                for reason, count in counts.items():
                    total.leave_out(split, reason, count)
        return total

    def reasons(self, split: str, *, examples: bool = False) -> str:
        """What was left out of a split, in words, with `examples` also the first item of each reason; empty where nothing was."""
        left_out = sorted(self.left_out.get(split, Counter()).items())
        words = ", ".join(f"{count} {reason}" for reason, count in left_out)
        firsts = [self.examples[split, reason][:_EXAMPLE] for reason, _ in left_out if examples and (split, reason) in self.examples]
        return f"{words} (such as {'; '.join(firsts)})" if firsts else words

    def lines(self) -> Iterator[str]:
        """One line for every split that something was left out of."""
        for split in self.left_out:
            yield f"left out of {split}: {self.reasons(split)}"

    def to_json(self) -> str:
        """The text of counts.json: split → noun → number; nouns of what was left out say so at their end."""
        plain: dict[str, dict[str, int]] = {split: dict(counts) for split, counts in self.included.items()}
        for split, counts in self.left_out.items():
            plain.setdefault(split, {}).update({f"{reason}{_LEFT_OUT}": count for reason, count in counts.items()})
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"
