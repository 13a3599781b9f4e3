"""Trains a draft head on a corpus. The same corpus and settings give the same head, despite interruptions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.batches import Corpus, Sample, TrainingBatch
from distill.unroll import DEPTH_DISCOUNT, Round, unroll
from lm.device import trains_in_bfloat16
from lm.draft_head import HeadModule

WARM_UP_STEPS, LEAST_RATE, WEIGHT_DECAY, CLIP_NORM = 50, 0.02, 0.01, 1.0
"""Usual for AdamW, rates as shares of the highest; the shipped head was trained with them
(bench/results/eval-drafter.json)."""
SAVE_INTERVAL_S, MEASURE_INTERVAL_S = 60.0, 300.0
"""A kill costs a minute of training; measuring the held-out texts takes seconds."""
UNROLLED_FROM = 0.7
"""Share of the steps with a single round: steps of three cost 2.5 times as much, and refine what these taught."""


@dataclass(frozen=True)
class TrainingPlan:
    """Training settings.

    Attributes:
        epochs: passes over the corpus.
        batch_tokens: of one optimiser step.
        depth: rounds that are unrolled in the last part of the training (UNROLLED_FROM); until then one.
        learning_rate: highest; falls linearly.
    """

    epochs: int = 8
    batch_tokens: int = 2048
    depth: int = 3
    learning_rate: float = 1e-3
    seed: int = 1


@dataclass(frozen=True)
class HeldOut:
    """Accuracy of a head on held-out texts.

    Attributes:
        top1, top4: per draft depth, share of tokens whose most likely successor it ranks first, or in the first four.
    """

    top1: tuple[float, ...]
    top4: tuple[float, ...]

    def __str__(self) -> str:
        return "top-1 " + " ".join(f"{x:.2f}" for x in self.top1) + ", top-4 " + " ".join(f"{x:.2f}" for x in self.top4)


@dataclass(frozen=True)
class Progress:
    """Progress of the training.

    Attributes:
        tokens, total_tokens: of texts, each counted once per epoch.
        held_out: as last measured.
    """

    tokens: int
    total_tokens: int
    loss: float
    held_out: HeldOut | None


class Trainer:
    """One training run.

    Args:
        module: initialised; trained in place.
        embedding: the target's [vocab, hidden].
        output: the target's output rows of the draft vocabulary.
        final_norm: factors [hidden] of the target's final norm.
        checkpoint: file of the state; training resumes from an existing one.
    """

    def __init__(
        self,
        module: HeadModule,
        embedding: Tensor,
        output: Tensor,
        final_norm: Tensor,
        corpus: Corpus,
        plan: TrainingPlan,
        checkpoint: Path,
    ) -> None:
        self.module, self.plan, self.corpus = module, plan, corpus
        self._device = embedding.device
        self._in_bfloat16 = trains_in_bfloat16(self._device)
        if not self._in_bfloat16:
            embedding, output, final_norm = embedding.float(), output.float(), final_norm.float()
        self._target = (embedding, output, final_norm)
        self._checkpoint = checkpoint
        matrices = [weight for weight in module.parameters() if weight.ndim >= 2]
        others = [weight for weight in module.parameters() if weight.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
        self._order = [group for epoch in range(plan.epochs) for group in self._epoch(epoch)]
        self._step = 0
        if checkpoint.exists():
            state: dict[str, Any] = torch.load(checkpoint, weights_only=True, map_location=self._device)
            module.load_state_dict(state["module"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._step = state["step"]

    def run(self, on_progress: Callable[[Progress], None]) -> HeldOut:
        """Train to the end of the plan."""
        saved_s = measured_s = time.monotonic()
        held_out = None
        tokens = [0, *accumulate(sum(sample.length for sample in group) for group in self._order)]
        while self._step < len(self._order):
            loss = self._train(self._order[self._step])
            self._step += 1
            if time.monotonic() - saved_s > SAVE_INTERVAL_S:
                self._save()
                saved_s = time.monotonic()
            if time.monotonic() - measured_s > MEASURE_INTERVAL_S:
                held_out, measured_s = self.measure(), time.monotonic()
            on_progress(Progress(tokens[self._step], tokens[-1], loss, held_out))
        self._save()
        return self.measure()

    @torch.no_grad()
    def measure(self) -> HeldOut:
        """On the held-out texts, at every unrolled depth."""
        totals, tokens = torch.zeros(self.plan.depth, 2), 0
        self.module.eval()
        for batch in self.corpus.held_out_batches(self.plan.batch_tokens):
            counted = int(batch.counts.sum())
            rounds = self._unroll(batch, self.plan.depth, measure=True)
            totals += counted * torch.tensor([[r.top1, r.top4] for r in rounds])
            tokens += counted
        self.module.train()
        top1, top4 = (totals / max(1, tokens)).T.tolist()
        return HeldOut(tuple(top1), tuple(top4))

    def _epoch(self, number: int) -> list[list[Sample]]:
        return self.corpus.epoch(number, self.plan.seed, self.plan.batch_tokens)

    def _train(self, samples: list[Sample]) -> float:
        progress = self._step / len(self._order)
        rate = self.plan.learning_rate * min(1.0, (self._step + 1) / WARM_UP_STEPS) * max(LEAST_RATE, 1 - progress)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        depth = self.plan.depth if progress >= UNROLLED_FROM else 1
        rounds = self._unroll(self.corpus.load(samples), depth, measure=False)
        loss = torch.stack([DEPTH_DISCOUNT**number * r.loss for number, r in enumerate(rounds)]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return rounds[0].loss.item()

    def _unroll(self, batch: TrainingBatch, depth: int, *, measure: bool) -> list[Round]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._in_bfloat16):
            return unroll(self.module, *self._target, batch.to(self._device), depth, measure=measure)

    def _save(self) -> None:
        part = self._checkpoint.with_suffix(".tmp")
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict(), "step": self._step}
        torch.save(state, part)
        part.rename(self._checkpoint)
