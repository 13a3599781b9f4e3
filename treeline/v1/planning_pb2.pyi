from treeline.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CostCurve(_message.Message):
    __slots__ = ("sequences", "context_tokens", "tokens", "seconds")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    context_tokens: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, sequences: _Optional[int] = ..., context_tokens: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., seconds: _Optional[_Iterable[float]] = ...) -> None: ...

class PaperFit(_message.Message):
    __slots__ = ("lambda_s", "gamma_s", "delta", "rho")
    LAMBDA_S_FIELD_NUMBER: _ClassVar[int]
    GAMMA_S_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    lambda_s: float
    gamma_s: float
    delta: float
    rho: float
    def __init__(self, lambda_s: _Optional[float] = ..., gamma_s: _Optional[float] = ..., delta: _Optional[float] = ..., rho: _Optional[float] = ...) -> None: ...

class CostModel(_message.Message):
    __slots__ = ("verify", "verify_scale", "draft_round_trip_s", "draft_layer_s", "draft_node_s", "step_overhead_s", "paper", "draft_sequence_s", "node_s", "prompt_ratio", "lookup_s")
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    VERIFY_SCALE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_LAYER_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_OVERHEAD_S_FIELD_NUMBER: _ClassVar[int]
    PAPER_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    NODE_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_RATIO_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_S_FIELD_NUMBER: _ClassVar[int]
    verify: _containers.RepeatedCompositeFieldContainer[CostCurve]
    verify_scale: float
    draft_round_trip_s: float
    draft_layer_s: float
    draft_node_s: float
    step_overhead_s: float
    paper: PaperFit
    draft_sequence_s: float
    node_s: float
    prompt_ratio: float
    lookup_s: float
    def __init__(self, verify: _Optional[_Iterable[_Union[CostCurve, _Mapping]]] = ..., verify_scale: _Optional[float] = ..., draft_round_trip_s: _Optional[float] = ..., draft_layer_s: _Optional[float] = ..., draft_node_s: _Optional[float] = ..., step_overhead_s: _Optional[float] = ..., paper: _Optional[_Union[PaperFit, _Mapping]] = ..., draft_sequence_s: _Optional[float] = ..., node_s: _Optional[float] = ..., prompt_ratio: _Optional[float] = ..., lookup_s: _Optional[float] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("acceptance", "kappa")
    ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    KAPPA_FIELD_NUMBER: _ClassVar[int]
    acceptance: _containers.RepeatedScalarFieldContainer[float]
    kappa: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, acceptance: _Optional[_Iterable[float]] = ..., kappa: _Optional[_Iterable[float]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("version", "created_unix_s", "lifetime_s", "cost", "calibration", "price", "max_nodes", "max_depth", "reason", "step_budget_s", "wait_factor", "signals")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STEP_BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    version: int
    created_unix_s: float
    lifetime_s: float
    cost: CostModel
    calibration: Calibration
    price: float
    max_nodes: int
    max_depth: int
    reason: str
    step_budget_s: float
    wait_factor: float
    signals: _containers.RepeatedCompositeFieldContainer[_generation_pb2.PlanSignal]
    def __init__(self, version: _Optional[int] = ..., created_unix_s: _Optional[float] = ..., lifetime_s: _Optional[float] = ..., cost: _Optional[_Union[CostModel, _Mapping]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., price: _Optional[float] = ..., max_nodes: _Optional[int] = ..., max_depth: _Optional[int] = ..., reason: _Optional[str] = ..., step_budget_s: _Optional[float] = ..., wait_factor: _Optional[float] = ..., signals: _Optional[_Iterable[_Union[_generation_pb2.PlanSignal, _Mapping]]] = ...) -> None: ...

class NodeOutcomes(_message.Message):
    __slots__ = ("sources", "depths", "flags", "draft_probs")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DEPTHS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PROBS_FIELD_NUMBER: _ClassVar[int]
    sources: bytes
    depths: bytes
    flags: bytes
    draft_probs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, sources: _Optional[bytes] = ..., depths: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., draft_probs: _Optional[_Iterable[float]] = ...) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("step_id", "unix_s", "plan_version", "sequences", "tokens", "prefill_tokens", "context_tokens", "drafted_nodes", "verified_nodes", "accepted_nodes", "emitted_tokens", "running", "waiting", "startable", "draft_s", "drafter_s", "draft_layer_nodes", "verify_s", "predicted_verify_s", "step_s", "goodput", "outcomes", "price", "catch_up_tokens", "node_s", "drafted_requests", "pass_how", "gap_s", "gap_tokens", "first_token_s", "preempted", "gap_priority", "first_token_priority")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_NODES_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_NODES_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_NODES_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STARTABLE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_S_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_LAYER_NODES_FIELD_NUMBER: _ClassVar[int]
    VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_VERIFY_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NODE_S_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PASS_HOW_FIELD_NUMBER: _ClassVar[int]
    GAP_S_FIELD_NUMBER: _ClassVar[int]
    GAP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    GAP_PRIORITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_PRIORITY_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    unix_s: float
    plan_version: int
    sequences: int
    tokens: int
    prefill_tokens: int
    context_tokens: int
    drafted_nodes: int
    verified_nodes: int
    accepted_nodes: int
    emitted_tokens: int
    running: int
    waiting: int
    startable: int
    draft_s: float
    drafter_s: float
    draft_layer_nodes: _containers.RepeatedScalarFieldContainer[int]
    verify_s: float
    predicted_verify_s: float
    step_s: float
    goodput: float
    outcomes: NodeOutcomes
    price: float
    catch_up_tokens: int
    node_s: float
    drafted_requests: int
    pass_how: str
    gap_s: _containers.RepeatedScalarFieldContainer[float]
    gap_tokens: _containers.RepeatedScalarFieldContainer[int]
    first_token_s: _containers.RepeatedScalarFieldContainer[float]
    preempted: int
    gap_priority: _containers.RepeatedScalarFieldContainer[int]
    first_token_priority: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step_id: _Optional[int] = ..., unix_s: _Optional[float] = ..., plan_version: _Optional[int] = ..., sequences: _Optional[int] = ..., tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., drafted_nodes: _Optional[int] = ..., verified_nodes: _Optional[int] = ..., accepted_nodes: _Optional[int] = ..., emitted_tokens: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., startable: _Optional[int] = ..., draft_s: _Optional[float] = ..., drafter_s: _Optional[float] = ..., draft_layer_nodes: _Optional[_Iterable[int]] = ..., verify_s: _Optional[float] = ..., predicted_verify_s: _Optional[float] = ..., step_s: _Optional[float] = ..., goodput: _Optional[float] = ..., outcomes: _Optional[_Union[NodeOutcomes, _Mapping]] = ..., price: _Optional[float] = ..., catch_up_tokens: _Optional[int] = ..., node_s: _Optional[float] = ..., drafted_requests: _Optional[int] = ..., pass_how: _Optional[str] = ..., gap_s: _Optional[_Iterable[float]] = ..., gap_tokens: _Optional[_Iterable[int]] = ..., first_token_s: _Optional[_Iterable[float]] = ..., preempted: _Optional[int] = ..., gap_priority: _Optional[_Iterable[int]] = ..., first_token_priority: _Optional[_Iterable[int]] = ...) -> None: ...

class VerifierProfile(_message.Message):
    __slots__ = ("verify", "draft_layer_s", "draft_node_s")
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    DRAFT_LAYER_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_NODE_S_FIELD_NUMBER: _ClassVar[int]
    verify: _containers.RepeatedCompositeFieldContainer[CostCurve]
    draft_layer_s: float
    draft_node_s: float
    def __init__(self, verify: _Optional[_Iterable[_Union[CostCurve, _Mapping]]] = ..., draft_layer_s: _Optional[float] = ..., draft_node_s: _Optional[float] = ...) -> None: ...

class WatchPlanRequest(_message.Message):
    __slots__ = ("verifier_id",)
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    verifier_id: str
    def __init__(self, verifier_id: _Optional[str] = ...) -> None: ...

class WatchPlanResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class ReportStepsRequest(_message.Message):
    __slots__ = ("verifier_id", "metrics_url", "profile", "steps")
    VERIFIER_ID_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    verifier_id: str
    metrics_url: str
    profile: VerifierProfile
    steps: _containers.RepeatedCompositeFieldContainer[StepRecord]
    def __init__(self, verifier_id: _Optional[str] = ..., metrics_url: _Optional[str] = ..., profile: _Optional[_Union[VerifierProfile, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ...) -> None: ...

class ReportStepsResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...
