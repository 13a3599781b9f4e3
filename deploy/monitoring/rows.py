"""What the dashboard shows, row by row."""

from __future__ import annotations

from typing import Any

from deploy.monitoring.panels import (
    ON,
    TOKENS_PER_S,
    heat,
    lines,
    marked,
    mean,
    needed,
    quantiles,
    rate,
    stacked,
    state,
    total,
)

TTFT, ITL, E2E, QUEUE = (
    f"treeline_{name}_seconds"
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
)
DRAFTED, VERIFIED, ACCEPTED, DRAFTS = (
    f"treeline_spec_decode_num_{name}_total" for name in ("drafted_nodes", "draft_tokens", "accepted_tokens", "drafts")
)


def rows() -> dict[str, list[Any]]:
    """Panels by the title of their row."""
    return {
        "What does speculation buy me now": benefit(),
        "Traffic and latency": traffic(),
        "Objectives": objectives(),
        "Queue and KV cache": capacity(),
        "Speculation": speculation(),
        "Step time": steps(),
        "Planner": planner(),
        "Drafter": drafter(),
    }


def benefit() -> list[Any]:
    ratio = {"{{model_name}} {{replica}}": f"treeline_estimated_speedup{{{ON}}}"}
    text = "Speed of recent steps over that of plain decoding by the plan's costs. 1: speculation buys nothing."
    return [lines("Estimated speed-up over plain decoding", "none", ratio, text, width=24)]


def traffic() -> list[Any]:
    requests = {name: f"sum(treeline_num_requests_{name}{{{ON}}})" for name in ("running", "waiting")}
    tokens = {"generated": total("treeline_generation_tokens_total"), "prompt": total("treeline_prompt_tokens_total")}
    codes = {"{{grpc_code}}": total("grpc_server_handled_total", "", by="grpc_code")}
    reasons = {"{{finished_reason}}": total("treeline_request_success_total", by="finished_reason")}
    shared = "Tokens that arrive together share the time since those before them."
    return [
        lines("Requests running and waiting", "short", requests),
        lines("Tokens per second", TOKENS_PER_S, tokens),
        lines("Request latency, end to end", "s", quantiles(E2E, 50, 95)),
        lines("Time to first token", "s", quantiles(TTFT, 50, 95)),
        lines("Inter-token latency", "s", quantiles(ITL, 50, 95, 99), shared),
        lines("Calls by gRPC code", "reqps", codes),
        heat("Time to first token, every request", "s", TTFT),
        heat("Inter-token latency, every token", "s", ITL),
        lines("Requests by finish reason", "reqps", reasons),
        lines(
            "Calls open, by method",
            "short",
            {"{{grpc_method}}": "sum by (grpc_method) (grpc_server_in_flight)"},
            width=16,
        ),
        needed("Verifiers reachable", {"verifiers": "max(treeline_front_door_verifiers)"}),
        state("Drafter state", {"{{instance}}": f"treeline_drafter_ready{{{ON}}}"}, ("away", "ready"), good=1),
    ]


def objectives() -> list[Any]:
    def goal(name: str) -> dict[str, str]:
        return {"objective": f'max(treeline_planner_objective_seconds{{objective="{name}"}})'}

    targets = "treeline_request_target_total"
    met = {"met": " / ".join((total(targets, f'{ON}, met="true"'), total(targets)))}
    reach = {"{{objective}} {{verifier}}": "treeline_planner_objective_unreachable"}
    return [
        lines("Inter-token latency held", "s", quantiles(ITL, 95) | goal("inter_token_p95")),
        lines("Time to first token held", "s", quantiles(TTFT, 95) | goal("time_to_first_token_p95")),
        lines(
            "Step budget",
            "s",
            {"{{verifier}}": "treeline_planner_step_budget_seconds < Inf"},
            "The longest step that the planner allows; empty without an objective.",
        ),
        lines(
            "Weight of waiting requests",
            "none",
            {"{{verifier}}": "treeline_planner_wait_factor"},
            "How many times its ordinary price a waiting request costs.",
        ),
        lines("Targets met", "percentunit", met, "Share of the requests with a latency target of their own.", most=1),
        state("Objectives in reach", reach, ("in reach", "out of reach"), good=0, text="Plain decoding is the limit."),
    ]


def capacity() -> list[Any]:
    used, blocks = f"treeline_kv_blocks_used{{{ON}}}", f"treeline_kv_blocks{{{ON}}}"
    hits = f"{total('treeline_prefix_cache_hits_total')} / {total('treeline_prefix_cache_queries_total')}"
    return [
        marked(lines("KV cache in use", "percentunit", {"{{instance}}": f"{used} / {blocks}"}, most=1), 0.8, 0.95),
        lines("KV cache blocks", "short", {"used": f"sum({used})", "total": f"sum({blocks})"}),
        lines(
            "Preemptions per second",
            "cps",
            {"{{instance}}": rate("treeline_num_preemptions_total")},
            "Requests that lost their KV blocks to others and began again.",
        ),
        lines(
            "Prefix cache hit rate",
            "percentunit",
            {"hit rate": hits},
            "Share of the prompts' tokens that were not computed again, told when a request ends.",
            width=12,
            most=1,
        ),
        marked(
            lines("Queue time", "s", quantiles(QUEUE, 50, 95), "From arrival to admission, told at the end.", width=12),
            10,
        ),
    ]


def speculation() -> list[Any]:
    nodes = {"drafted": total(DRAFTED), "verified": total(VERIFIED), "accepted": total(ACCEPTED)}
    accepted, observed = (
        total(f"treeline_spec_decode_num_{what}_tokens_per_pos_total", by="position")
        for what in ("accepted", "observed")
    )
    worth = {
        "price {{instance}}": f"treeline_price_tokens_per_second{{{ON}}}",
        "goodput {{instance}}": f"treeline_expected_goodput_tokens_per_second{{{ON}}}",
    }
    return [
        lines("Draft nodes per second", "cps", nodes, "Between drafted and verified lies what the batch rule pruned."),
        lines(
            "Mean acceptance length",
            "none",
            {"tokens per tree": f"1 + {total(ACCEPTED)} / {total(DRAFTS)}"},
            "Tokens per verified tree: the accepted nodes and the target's own token.",
            least=1,
        ),
        lines(
            "Acceptance by depth",
            "percentunit",
            {"depth {{position}}": f"{accepted} / {observed}"},
            "Share accepted of the verified nodes whose parent was accepted. Depth 0 follows the root.",
            most=1,
        ),
        heat("Tree size, every step", "none", "treeline_tree_nodes", "Verified nodes per request and step."),
        lines("Tree size", "short", {"mean": mean("treeline_tree_nodes")} | quantiles("treeline_tree_nodes", 95)),
        lines(
            "Price and goodput of a step",
            TOKENS_PER_S,
            worth,
            "A node joins a tree if it brings more expected tokens per second of its cost than the price.",
        ),
    ]


def steps() -> list[Any]:
    phase = "treeline_step_phase_seconds"
    p95 = f"histogram_quantile(0.95, {total(f'{phase}_bucket', by='le, phase')})"
    ways = {
        f"{who} {{{{how}}}}": total(f"treeline_{series}_total", labels, by="how")
        for who, series, labels in (("target", "passes", ON), ("draft", "drafter_passes", ""))
    }
    return [
        stacked(lines("Mean step time by phase", "s", {"{{phase}}": mean(phase, by="phase")})),
        lines("p95 step time by phase", "s", {"{{phase}}": p95}),
        lines("Steps per second", "cps", {"{{instance}}": rate("treeline_steps_total")}),
        lines(
            "Passes per second by how they ran",
            "cps",
            ways,
            "On a GPU all should be replayed; eager and packed ones are slow. On a CPU all are native.",
            width=24,
        ),
    ]


def planner() -> list[Any]:
    errors = {
        f"p{percent} {{{{verifier}}}}": f'treeline_planner_cost_error_ratio{{quantile="{percent / 100:g}"}}'
        for percent in (50, 95)
    }
    work = {f"{what} {{{{verifier}}}}": rate(f"treeline_planner_{what}_total", "") for what in ("steps", "plans")}
    return [
        marked(lines("Cost error", "percentunit", errors, "|predicted - measured| / measured, of recent steps."), 0.5),
        lines(
            "Calibration error",
            "percentunit",
            {"{{verifier}}": "treeline_planner_calibration_error"},
            "Mean distance between the predicted and the observed probability of acceptance.",
        ),
        lines(
            "Scale of the verification cost",
            "none",
            {"{{verifier}}": "treeline_planner_verify_scale"},
            "Measured over profiled: above 1 the device is slower than it was when it was profiled.",
        ),
        lines("Price in the plan", TOKENS_PER_S, {"{{verifier}}": "treeline_planner_price_tokens_per_second"}),
        lines("Age of live signals", "s", {"{{signal}} {{verifier}}": "treeline_planner_signal_age_seconds"}),
        lines("Step records and plans per second", "cps", work),
    ]


def drafter() -> list[Any]:
    return [
        lines("Sessions", "short", {"{{instance}}": "treeline_drafter_sessions"}),
        lines("Draft step", "s", quantiles("treeline_drafter_step_seconds", 50, 95, labels="")),
        lines("Nodes sent", "cps", {"nodes": total("treeline_drafter_nodes_total", "")}),
    ]
