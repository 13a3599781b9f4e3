"""What blocks say together, from blocks made by hand."""

from __future__ import annotations

import pytest

from bench.common import Prompt
from bench.load import Answer, End, Measured, Request
from bench.sweep import Block, Result, capacity
from bench.sweep_report import compare_outputs, first_difference, oracle_rows, policy_rows, report


def answer(token_ids: list[int], finished: bool = True, max_tokens: int = 4) -> Answer:
    request = Request("r", Prompt("p1", "chat", "hello"), max_tokens, "off")
    return Answer(request, 0.0, token_ids, end=End("r", finished=finished))


def block(policy: str, load: float, round_: int, tokens_per_s: float, answers: list[Answer] | None = None) -> Result:
    measured = Measured(tokens_per_s, 1.5, 2.0, None, 10.0, 20.0, rejected=0)
    return Result(Block("closed", load, round_, policy), measured, answers or [answer([1, 2, 3])])


def blocks(load: float, **rates: list[float]) -> list[Result]:
    names = {
        "off": "off",
        "chain": "chain:2",
        "small": "eagle2:2,2,4",
        "large": "eagle2:6,10,60",
        "paper": "smart-paper",
    }
    return [
        block(names.get(name, name), load, round_, rate)
        for name, values in rates.items()
        for round_, rate in enumerate(values, start=1)
    ]


RESULTS = [
    *blocks(1, off=[10, 10, 10], small=[12, 13, 20], large=[18, 19, 17], paper=[9, 9, 9], smart=[20, 19, 18]),
    *blocks(4, off=[40, 30, 50], small=[50, 40, 44], large=[24, 23, 22], paper=[20, 15, 25], smart=[60, 45, 75]),
    *blocks(32, off=[90, 90, 90], small=[80, 80, 80], large=[10, 10, 10], paper=[45, 45, 45], smart=[99, 90, 90]),
]


def test_rows_hold_medians_and_extremes():
    row = next(r for r in policy_rows(RESULTS, "concurrency") if (r["policy"], r["concurrency"]) == ("off", 4))
    assert (row["tokens_per_s"], row["tokens_per_s_min"], row["tokens_per_s_max"]) == (40, 30, 50)
    assert row["ttft_ms_p50"] is None
    assert row["rounds"] == 3


def test_the_oracle_knows_the_best_fixed_setting_of_each_load_and_no_other_policy():
    chosen = {row["concurrency"]: (row["setting"], row["tokens_per_s"]) for row in oracle_rows(RESULTS)}
    assert chosen == {1: ("eagle2:6,10,60", 18), 4: ("eagle2:2,2,4", 44), 32: ("off", 90)}


def test_ratios_are_taken_round_by_round():
    ratios = {row["concurrency"]: row for row in report(RESULTS)["ratios"]}
    assert ratios[4]["smart/off"] == ratios[4]["smart/off_min"] == ratios[4]["smart/off_max"] == 1.5
    assert ratios[4]["smart/smart-paper"] == 3
    assert ratios[1]["smart/oracle-fixed"] == pytest.approx(18 / 17)
    assert (ratios[32]["smart/oracle-fixed"], ratios[32]["smart/oracle-fixed_max"]) == (1, pytest.approx(1.1))


def test_rounds_cut_short_count_where_both_ran():
    results = [r for r in RESULTS if not (r.block.load == 4 and r.block.policy == "off" and r.block.round > 1)]
    results = [r for r in results if r.block.load != 32]
    ratios = {row["concurrency"]: row for row in report(results)["ratios"]}
    assert ratios[4]["smart/off"] == 1.5


@pytest.mark.parametrize(
    ("theirs", "ours", "position"),
    [
        (answer([1, 2, 3]), answer([1, 2, 3]), None),
        (answer([1, 2, 3]), answer([1, 5, 3]), 1),
        (answer([1, 2, 3]), answer([1, 2], finished=False), None),
        (answer([1, 2], finished=False), answer([1, 2, 3]), None),
        (answer([1, 2], finished=False), answer([1, 3, 3]), 1),
        (answer([1, 2, 3]), answer([1, 2]), 2),
        (answer([1, 2]), answer([1, 2, 3], finished=False), 2),
    ],
)
def test_answers_differ_where_one_says_something_else_or_ends_early(theirs, ours, position):
    assert first_difference(theirs, ours) == position


def test_a_different_text_is_found_and_named():
    results = [
        block("off", 4, 1, 10.0, [answer([1, 2, 3]), answer([4, 5])]),
        block("smart", 4, 1, 10.0, [answer([1, 2, 3]), answer([4, 6])]),
        block("off", 4, 2, 10.0, [answer([1, 2, 3])]),
        block("smart", 4, 2, 10.0, [answer([1, 2, 3]), answer([9])]),
    ]
    compared, differences = compare_outputs(results)
    assert compared == 3
    where = {"policy": "smart", "loop": "closed", "load": 4, "round": 1, "prompt": "p1", "position": 1}
    assert differences == [where]
    assert report(results)["identical_outputs"] is False


def test_capacity_is_that_of_plain_decoding_for_answers_of_full_length():
    answers = [answer([1], max_tokens=1), answer([1] * 4), answer([1] * 2), answer([1], finished=False)]
    results = [block("off", 1, 1, 5.0), block("off", 4, 1, 12.0, answers), block("smart", 4, 1, 99.0)]
    assert capacity(results[1:]) == pytest.approx(12 / 3)
