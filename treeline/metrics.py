"""Every metric of every service: names, labels, buckets. vLLM's stems and definitions under our prefix.

Each process has its own registry and page; nothing is shared between processes.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treeline.step_record import StepRecord

PREFIX = "treeline"

_TTFT_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL_BUCKETS = tuple(round(0.002 * 1.15**i, 4) for i in range(50))
"""2 ms to 1.9 s, 15 % apart: the planner reads the 95th percentile from these and controls it to a few per cent."""
_E2E_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 300)
_PHASE_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_LENGTH_BUCKETS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8)
_TOKEN_BUCKETS = tuple(2**i for i in range(16))
_NODE_BUCKETS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256)

_WAYS = "replayed, eager or packed on a GPU, native on a CPU"


class VerifierMetrics:
    """Requests, KV cache, speculation and step time of one verifier."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=registry)

        self._running = gauge("num_requests_running", "Requests in the batch")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue")
        self._kv_used = gauge("kv_blocks_used", "KV cache blocks in use")
        self._kv_total = gauge("kv_blocks", "KV cache blocks in all")
        self._kv_share = gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all")
        self._speedup = gauge("estimated_speedup", "Speed of recent steps over plain decoding's, by the plan's costs")
        self._price = gauge("price_tokens_per_second", "Tokens per second of its cost that a node had to bring")
        self._goodput = gauge("expected_goodput_tokens_per_second", "Goodput expected of the last drafted step")
        self._plan_version = gauge("plan_version", "Version of the plan in force")
        self.refused_plans = counter("plans_refused", "Malformed plans that were ignored")
        self._drafter_ready = gauge("drafter_ready", "1 while drafting is possible")
        self._drafter_problem = gauge("drafter_problem", "1 while the target hardly ever agrees with the drafter")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens run")
        self._prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = counter("prefix_cache_hits", "Prompt tokens taken from the prefix cache")
        self._generation_tokens = counter("generation_tokens", "Tokens generated")
        self._finished = counter("request_success", "Requests that ended, by finish reason", ("finished_reason",))
        self._targets = counter("request_target", "Ended requests with a latency target, by whether met", ("met",))
        self._drafts = counter("spec_decode_num_drafts", "Trees verified, one per request and step")
        self._drafted = counter("spec_decode_num_drafted_nodes", "Draft nodes grown by the drafter")
        self._verified = counter("spec_decode_num_draft_tokens", "Draft nodes verified by the target")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Draft nodes accepted by the target")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Draft nodes accepted, by depth from 0", ("position",)
        )
        self._verified_at = counter(
            "spec_decode_num_observed_tokens_per_pos",
            "Verified draft nodes whose parent was accepted, by depth from 0",
            ("position",),
        )
        self._steps = counter("steps", "Engine steps")
        self._preemptions = counter("num_preemptions", "Requests that lost their KV blocks to others and began again")
        self._passes = counter("passes", f"Verification passes, by how they ran: {_WAYS}", ("how",))
        self._phase = histogram("step_phase_seconds", "Seconds of a step by phase", _PHASE_BUCKETS, ("phase",))
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token", _TTFT_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Between tokens, counted per token", _ITL_BUCKETS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per output token of a request", _ITL_BUCKETS
        )
        self._queue_time = histogram("request_queue_time_seconds", "From arrival to admission", _TTFT_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end", _E2E_BUCKETS)
        self._prefill_time = histogram("request_prefill_time_seconds", "From admission to first token", _TTFT_BUCKETS)
        self._decode_time = histogram("request_decode_time_seconds", "From the first token to the end", _E2E_BUCKETS)
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a request's prompt", _TOKEN_BUCKETS)
        self._answer_length = histogram("request_generation_tokens", "Tokens of a request's answer", _TOKEN_BUCKETS)
        self._length = histogram(
            "request_mean_accepted_length", "Tokens per verification step of a request", _LENGTH_BUCKETS
        )
        self._tree_nodes = histogram("tree_nodes", "Draft nodes verified per request and step", _NODE_BUCKETS)
        for phase in ("draft", "verify", "other"):
            self._phase.labels(phase)
        for reason in ("stop", "length", "aborted"):
            self._finished.labels(reason)
        for met in ("true", "false"):
            self._targets.labels(met)

    def observe_step(self, record: StepRecord) -> None:
        """One engine step."""
        self._steps.inc()
        self._preemptions.inc(record.preempted)
        self._passes.labels(record.pass_how).inc()
        self._plan_version.set(record.plan_version)
        self._prompt_tokens.inc(record.prefill_tokens)
        self._generation_tokens.inc(record.emitted_tokens)
        self._drafted.inc(record.drafted_nodes)
        self._verified.inc(record.verified_nodes)
        self._accepted.inc(record.accepted_nodes)
        self._phase.labels("draft").observe(record.draft_s)
        self._phase.labels("verify").observe(record.verify_s)
        self._phase.labels("other").observe(max(0.0, record.step_s - record.draft_s - record.verify_s))
        if record.goodput:
            self._price.set(record.price)
            self._goodput.set(record.goodput)
        if record.verified_nodes:
            self._drafts.inc(record.sequences)
        if record.sequences:
            self._tree_nodes.observe(record.verified_nodes / record.sequences)
        outcomes = record.outcomes
        for depth, accepted in zip(outcomes.depths.tolist(), outcomes.accepted.tolist(), strict=True):
            self._verified_at.labels(str(depth - 1)).inc()
            if accepted:
                self._accepted_at.labels(str(depth - 1)).inc()

    def set_speedup(self, ratio: float) -> None:
        self._speedup.set(ratio)

    def observe_tokens(self, tokens: int, seconds: float) -> None:
        """`tokens` reached a stream `seconds` after the previous ones, and share the gap equally."""
        for _ in range(tokens):
            self._itl.observe(seconds / tokens)

    def observe_first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def observe_finished(
        self,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        queue_s: float,
        ttft_s: float,
        total_s: float,
        accepted_length: float,
        target_met: bool | None = None,
    ) -> None:
        """A request has ended."""
        self._finished.labels(reason).inc()
        self._queue_time.observe(queue_s)
        self._prefill_time.observe(max(0.0, ttft_s - queue_s))
        self._decode_time.observe(max(0.0, total_s - ttft_s))
        self._prompt_length.observe(prompt_tokens)
        self._answer_length.observe(completion_tokens)
        self._e2e.observe(total_s)
        if completion_tokens > 1:
            self._tpot.observe((total_s - ttft_s) / (completion_tokens - 1))
        if accepted_length:
            self._length.observe(accepted_length)
        if target_met is not None:
            self._targets.labels(str(target_met).lower()).inc()

    def observe_prefix(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt was looked up in the prefix cache, which held `cached_tokens` of its tokens."""
        self._prefix_queries.inc(prompt_tokens)
        self._prefix_hits.inc(cached_tokens)

    def set_load(
        self, running: int, waiting: int, kv_used: int, kv_total: int, drafter_ready: bool, problem: bool
    ) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_used.set(kv_used)
        self._kv_total.set(kv_total)
        self._kv_share.set(kv_used / kv_total)
        self._drafter_ready.set(drafter_ready)
        self._drafter_problem.set(problem)


class DrafterMetrics:
    """Work and state of one drafter."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge(f"{PREFIX}_drafter_sessions", "Sessions held", registry=registry)
        self.steps = Counter(f"{PREFIX}_drafter_steps", "Draft steps answered", registry=registry)
        self.nodes = Counter(f"{PREFIX}_drafter_nodes", "Nodes of the trees sent", registry=registry)
        self.catch_up_tokens = Counter(
            f"{PREFIX}_drafter_catch_up_tokens", "Committed tokens run through the draft model", registry=registry
        )
        self.passes = Counter(
            f"{PREFIX}_drafter_passes", f"Draft passes, by how they ran: {_WAYS}", ("how",), registry=registry
        )
        self.step_seconds = Histogram(
            f"{PREFIX}_drafter_step_seconds", "Seconds of a draft step", buckets=_PHASE_BUCKETS, registry=registry
        )
        self.layer_seconds = Histogram(
            f"{PREFIX}_drafter_layer_seconds", "Seconds of a draft layer", buckets=_PHASE_BUCKETS, registry=registry
        )


class PlannerMetrics:
    """The planner's plan for each verifier, and the errors of its predictions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{PREFIX}_planner_{name}", text, ("verifier", *labels), registry=registry)

        self.plan_version = gauge("plan_version", "Version of the newest plan")
        self.price = gauge("price_tokens_per_second", "Price in the newest plan")
        self.max_nodes = gauge("max_nodes", "Most draft nodes per request in the newest plan")
        self.verify_scale = gauge("verify_scale", "Online correction of the verification cost")
        self.cost_error = gauge("cost_error_ratio", "Recent |predicted - measured| / measured step cost", "quantile")
        self.calibration_error = gauge("calibration_error", "Expected calibration error of acceptance")
        self.step_budget = gauge("step_budget_seconds", "Longest step in the newest plan; infinite: no limit")
        self.wait_factor = gauge("wait_factor", "How many times its ordinary price a waiting request costs")
        self.objective_unreachable = gauge(
            "objective_unreachable", "1 while not even plain decoding reaches the objective", "objective"
        )
        self.signal_age_seconds = gauge("signal_age_seconds", "Age of a live signal", "signal")
        self.steps = Counter(f"{PREFIX}_planner_steps", "Step records received", ("verifier",), registry=registry)
        self.plans = Counter(f"{PREFIX}_planner_plans", "Plans published", ("verifier",), registry=registry)
        self._by_verifier = [*vars(self).values()]
        self.objective = Gauge(
            f"{PREFIX}_planner_objective_seconds", "Latency to be held", ("objective",), registry=registry
        )
        self.prometheus_up = Gauge(
            f"{PREFIX}_planner_prometheus_up", "0 while planner.prometheus_url measures too little", registry=registry
        )
        self.prometheus_up.set(1)

    def forget(self, verifier: str) -> None:
        """A verifier is gone for good."""
        for metric in self._by_verifier:
            metric.remove_by_labels({"verifier": verifier})


class FrontDoorMetrics:
    """Calls at the clients' port, under the gRPC ecosystem's usual names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started", "Calls begun", ("grpc_method",), registry=registry)
        self._handled = Counter(
            "grpc_server_handled", "Calls ended, by code", ("grpc_method", "grpc_code"), registry=registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds of a call",
            ("grpc_method",),
            buckets=_E2E_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("grpc_server_in_flight", "Calls open", ("grpc_method",), registry=registry)
        self.verifiers = Gauge(f"{PREFIX}_front_door_verifiers", "Verifiers that can be reached", registry=registry)

    def started(self, method: str) -> None:
        self._started.labels(method).inc()
        self.in_flight.labels(method).inc()

    def handled(self, method: str, code: str, seconds: float, error: str = "") -> None:
        self._handled.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)
        self.in_flight.labels(method).dec()
