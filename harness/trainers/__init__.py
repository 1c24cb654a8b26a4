"""What a stream of images does to a stack of heads: draw a training view, take a step, score a batch. Plain torch, one module a kind of probe."""

from __future__ import annotations

from typing import Any

from harness.probes.pictures import Pictured, label_of
from harness.probes.segmentation_stream import SegmentationScorer, SegmentationTrainer
from harness.probes.streaming import Kind, Network, Proposal, Scorer, Setting, State, Trainer
from harness.trainers.attentive import AttentiveScorer, AttentiveTrainer, scored_together
from harness.trainers.linear import LinearScorer, LinearTrainer

__all__ = [
    "KINDS",
    "AttentiveScorer",
    "AttentiveTrainer",
    "Kind",
    "LinearScorer",
    "LinearTrainer",
    "Network",
    "Pictured",
    "Proposal",
    "Scorer",
    "SegmentationScorer",
    "SegmentationTrainer",
    "Setting",
    "State",
    "Trainer",
    "label_of",
]

KINDS: dict[str, Kind[Any]] = {
    "linear": Kind(trainer=LinearTrainer, scorer=LinearScorer),
    "attentive": Kind(trainer=AttentiveTrainer, scorer=AttentiveScorer, together=scored_together),
    "dense": Kind(trainer=SegmentationTrainer, scorer=SegmentationScorer),
}
"""By the name of the task's probe."""
