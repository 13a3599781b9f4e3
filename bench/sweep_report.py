"""Report of a sweep's blocks: rows, ratios, differences of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.common import Row, spread
from bench.load import Answer
from bench.sweep import OFF, Result

FIXED = ("off", "chain:", "static:", "sequoia:", "eagle2:", "opt-tree:")
"""Policies whose trees have the same size at any load."""
ORACLE = "oracle-fixed"
SMART, PAPER = "smart", "smart-paper"

Rounds = dict[int, float]
"""Tokens per second of one policy at one load, by round."""


def report(results: Sequence[Result]) -> dict[str, Any]:
    """All parts of a sweep's JSON but the common ones, "rows" included."""
    closed = [result for result in results if result.block.loop == "closed"]
    arrived = [result for result in results if result.block.loop == "open"]
    compared, differences = compare_outputs(results)
    return {
        "rows": [*policy_rows(closed, "concurrency"), *oracle_rows(closed)],
        "open_loop": policy_rows(arrived, "rate"),
        "ratios": ratios(closed),
        "identical_outputs": not differences,
        "compared_outputs": compared,
        "different_outputs": differences,
    }


def policy_rows(results: Sequence[Result], load_name: str) -> list[Row]:
    """One row per load and policy: medians over rounds, with the extremes beside them."""
    rows = []
    for (load, policy), cell in _cells(results).items():
        row: Row = {"policy": policy, load_name: load, "rounds": len(cell)}
        if load_name == "rate":
            row["requests_per_s"] = cell[0].requests_per_s
        measured = [asdict(result.measured) for result in cell]
        for name in measured[0]:
            if name != "rejected":
                row |= spread(name, [m[name] for m in measured if m[name] is not None])
        if load_name == "rate":
            row["rejected"] = sum(m["rejected"] for m in measured)
        rows.append(row)
    return rows


def oracle_rows(closed: Sequence[Result]) -> list[Row]:
    """The best fixed setting at each concurrency, chosen in hindsight by its median: no operator could know it."""
    rows = policy_rows(closed, "concurrency")
    best: dict[float, Row] = {}
    for row in rows:
        load = row["concurrency"]
        faster = load not in best or row["tokens_per_s"] > best[load]["tokens_per_s"]
        if row["policy"].startswith(FIXED) and faster:
            best[load] = row
    return [{**row, "policy": ORACLE, "setting": row["policy"]} for row in best.values()]


def ratios(closed: Sequence[Result]) -> list[Row]:
    """Tokens per second of `smart` over those of its baselines, by concurrency.

    A ratio is the median of the rounds' ratios: blocks of one round ran close together, on the same prompts.
    """
    rates = _rates(closed)
    oracle = {row["concurrency"]: row["setting"] for row in oracle_rows(closed)}
    rows = []
    for load in sorted({load for load, _ in rates}):
        row: Row = {"concurrency": load, "setting": oracle.get(load)}
        for name, policy in ((OFF, OFF), (ORACLE, oracle.get(load)), (PAPER, PAPER)):
            values = _over(rates.get((load, SMART), {}), rates.get((load, policy or ""), {}))
            row |= spread(f"{SMART}/{name}", values)
        rows.append(row)
    return rows


def compare_outputs(results: Sequence[Result]) -> tuple[int, list[Row]]:
    """How many answers were compared with those of `off`, and the first different token of each that differs."""
    plain = {_key(result): result.answers for result in results if result.block.policy == OFF}
    compared, differences = 0, []
    for result in results:
        if result.block.policy == OFF:
            continue
        for reference, answer in zip(plain.get(_key(result), []), result.answers, strict=False):
            compared += 1
            position = first_difference(reference, answer)
            if position is not None:
                found = {"prompt": answer.request.prompt.id, "position": position}
                differences.append(vars(result.block) | found)
    return compared, differences


def first_difference(reference: Answer, answer: Answer) -> int | None:
    """Index of the first token in which two answers to one request differ. One that was cut short may end earlier."""
    theirs, ours = reference.token_ids, answer.token_ids
    common = min(len(theirs), len(ours))
    position = next((i for i in range(common) if theirs[i] != ours[i]), None)
    if position is not None or len(theirs) == len(ours):
        return position
    shorter = reference if len(theirs) < len(ours) else answer
    return common if shorter.finished else None


def _cells(results: Sequence[Result]) -> dict[tuple[float, str], list[Result]]:
    """Results by load and policy, in the order in which they were first run."""
    cells: dict[tuple[float, str], list[Result]] = {}
    order = list(dict.fromkeys(result.block.policy for result in results))
    for result in sorted(results, key=lambda r: (r.block.load, order.index(r.block.policy), r.block.round)):
        cells.setdefault((result.block.load, result.block.policy), []).append(result)
    return cells


def _rates(closed: Sequence[Result]) -> dict[tuple[float, str], Rounds]:
    return {
        key: {result.block.round: result.measured.tokens_per_s for result in cell}
        for key, cell in _cells(closed).items()
    }


def _over(numerator: Rounds, denominator: Rounds) -> list[float]:
    return [numerator[round_] / denominator[round_] for round_ in numerator if round_ in denominator]


def _key(result: Result) -> tuple[str, float, int]:
    return result.block.loop, result.block.load, result.block.round
