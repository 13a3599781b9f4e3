from treeline.v1 import planning_pb2 as _planning_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "presence_penalty", "frequency_penalty", "min_p", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    min_p: float
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., min_p: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class DraftSequence(_message.Message):
    __slots__ = ("session_id", "start", "token_ids", "sampling", "policy", "max_nodes", "max_depth", "weight", "feature_rows", "features", "prompt_tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    FEATURE_ROWS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: DraftSampling
    policy: str
    max_nodes: int
    max_depth: int
    weight: float
    feature_rows: int
    features: bytes
    prompt_tokens: int
    def __init__(self, session_id: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[DraftSampling, _Mapping]] = ..., policy: _Optional[str] = ..., max_nodes: _Optional[int] = ..., max_depth: _Optional[int] = ..., weight: _Optional[float] = ..., feature_rows: _Optional[int] = ..., features: _Optional[bytes] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class DraftRequest(_message.Message):
    __slots__ = ("step_id", "sequences", "released", "plan")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    sequences: _containers.RepeatedCompositeFieldContainer[DraftSequence]
    released: _containers.RepeatedScalarFieldContainer[int]
    plan: _planning_pb2.Plan
    def __init__(self, step_id: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[DraftSequence, _Mapping]]] = ..., released: _Optional[_Iterable[int]] = ..., plan: _Optional[_Union[_planning_pb2.Plan, _Mapping]] = ...) -> None: ...

class Forest(_message.Message):
    __slots__ = ("sizes", "token_ids", "parents", "draft_probs", "sources")
    SIZES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PROBS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    sizes: _containers.RepeatedScalarFieldContainer[int]
    token_ids: bytes
    parents: bytes
    draft_probs: bytes
    sources: bytes
    def __init__(self, sizes: _Optional[_Iterable[int]] = ..., token_ids: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., draft_probs: _Optional[bytes] = ..., sources: _Optional[bytes] = ...) -> None: ...

class HeldTokens(_message.Message):
    __slots__ = ("session_id", "tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    tokens: int
    def __init__(self, session_id: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class DraftResponse(_message.Message):
    __slots__ = ("step_id", "forest", "held", "draft_s", "layer_nodes", "catch_up_tokens", "layer_s")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    FOREST_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DRAFT_S_FIELD_NUMBER: _ClassVar[int]
    LAYER_NODES_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYER_S_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    forest: Forest
    held: _containers.RepeatedCompositeFieldContainer[HeldTokens]
    draft_s: float
    layer_nodes: _containers.RepeatedScalarFieldContainer[int]
    catch_up_tokens: int
    layer_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, step_id: _Optional[int] = ..., forest: _Optional[_Union[Forest, _Mapping]] = ..., held: _Optional[_Iterable[_Union[HeldTokens, _Mapping]]] = ..., draft_s: _Optional[float] = ..., layer_nodes: _Optional[_Iterable[int]] = ..., catch_up_tokens: _Optional[int] = ..., layer_s: _Optional[_Iterable[float]] = ...) -> None: ...

class GetDrafterInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDrafterInfoResponse(_message.Message):
    __slots__ = ("drafter", "vocab_size", "vocabulary_sha256", "layer_s", "node_s", "feature_width", "feature_layers", "sessions", "streams", "socket_path")
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SHA256_FIELD_NUMBER: _ClassVar[int]
    LAYER_S_FIELD_NUMBER: _ClassVar[int]
    NODE_S_FIELD_NUMBER: _ClassVar[int]
    FEATURE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    FEATURE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    drafter: str
    vocab_size: int
    vocabulary_sha256: str
    layer_s: float
    node_s: float
    feature_width: int
    feature_layers: _containers.RepeatedScalarFieldContainer[int]
    sessions: int
    streams: int
    socket_path: str
    def __init__(self, drafter: _Optional[str] = ..., vocab_size: _Optional[int] = ..., vocabulary_sha256: _Optional[str] = ..., layer_s: _Optional[float] = ..., node_s: _Optional[float] = ..., feature_width: _Optional[int] = ..., feature_layers: _Optional[_Iterable[int]] = ..., sessions: _Optional[int] = ..., streams: _Optional[int] = ..., socket_path: _Optional[str] = ...) -> None: ...
