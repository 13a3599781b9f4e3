"""The systems in `treeline bench peers`: ours, transformers, and those of the others that are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.local_engine import PlannedEngine, greedy_answers, planned_engine
from bench.peers.compare import Answerer, Lineup, MissingPeerError
from bench.peers.llama_cpp import llama_cpp
from bench.peers.openvino import openvino_genai
from bench.peers.transformers import PROMPT_LOOKUP_TOKENS, continuous_batching, generate_one_by_one
from bench.step.passes import load_transformers
from lm.model import LanguageModel
from lm.store import resolve_gguf
from treeline.config import Config
from treeline.errors import ConfigError
from treeline.plan import CostCurve

ONE_BY_ONE = "one request after the other"
FOUR_BITS = "reads the GGUF file's own quantised weights"
EXACT = f"{FOUR_BITS}; those of type Q4_1, whose minima its reader rounds, are put right"


def build_lineup(
    model: LanguageModel,
    config: Config,
    curves: tuple[CostCurve, ...],
    max_tokens: int,
    concurrencies: list[int],
    on_progress: Callable[[str], None] = lambda what: None,
) -> Lineup:
    """All peers, transformers' plain `generate` first.

    Args:
        model: the configuration's target; transformers runs it in the same dtype.
        curves: of this device, for the planner.
        on_progress: called with the system that is loaded next.
    """
    spec, lineup = config.verifier.target.model, Lineup(on_progress)
    hf = load_transformers(spec, model)

    def assisted() -> Answerer:
        kind, draft = config.drafter.kind, config.drafter.model
        if draft is None or "model" not in kind:
            raise MissingPeerError(f"the drafter is of kind '{kind}'; an assistant is a language model of its own")
        return generate_one_by_one(hf, max_tokens, assistant_model=load_transformers(draft.model, model))

    def openvino(prompt_lookup: bool) -> Answerer:
        return openvino_genai(_gguf(spec), max_tokens, concurrencies, model.eos_token_ids, prompt_lookup=prompt_lookup)

    lineup.add("transformers", "plain", lambda: generate_one_by_one(hf, max_tokens), serial=True, note=ONE_BY_ONE)
    lineup.add("transformers", "assistant_model", assisted, serial=True, note=ONE_BY_ONE)
    lineup.add(
        "transformers",
        "prompt_lookup",
        lambda: generate_one_by_one(hf, max_tokens, prompt_lookup_num_tokens=PROMPT_LOOKUP_TOKENS),
        serial=True,
        note=ONE_BY_ONE,
    )
    batching = load_transformers(spec, model)  # it changes its model's attention
    lineup.add("transformers", "continuous_batching", lambda: continuous_batching(batching, max_tokens))
    planned = planned_engine(model, config, curves)
    for policy in ("off", "smart"):
        lineup.add("treeline", policy, partial(_treeline, planned, policy, max_tokens))
    lineup.add("openvino-genai", "plain", lambda: openvino(False), note=EXACT)
    lineup.add("openvino-genai", "prompt_lookup", lambda: openvino(True), note=EXACT)
    lineup.add(
        "llama.cpp",
        "plain",
        lambda: llama_cpp(_gguf(spec), max_tokens, config.limits.max_context_tokens, model.eos_token_ids),
        serial=True,
        note=f"{FOUR_BITS}; {ONE_BY_ONE}",
    )
    return lineup


def _treeline(planned: PlannedEngine, policy: str, max_tokens: int) -> Answerer:
    """Our engine in this process, with its planner and drafter."""

    def answer(prompts: list[list[int]], concurrency: int) -> list[list[int]]:
        return greedy_answers(planned, prompts, [policy] * len(prompts), max_tokens, concurrency)[0]

    return answer


def _gguf(spec: str) -> Path:
    try:
        return resolve_gguf(spec)
    except ConfigError as error:
        raise MissingPeerError(str(error)) from error
