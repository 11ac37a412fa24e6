import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from mora_serve.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("prompt", "selection")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    prompt: _generation_pb2.Prompt
    selection: _generation_pb2.Selection
    def __init__(self, prompt: _Optional[_Union[_generation_pb2.Prompt, _Mapping]] = ..., selection: _Optional[_Union[_generation_pb2.Selection, _Mapping]] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: _generation_pb2.Decision
    def __init__(self, decision: _Optional[_Union[_generation_pb2.Decision, _Mapping]] = ...) -> None: ...

class LoadRouterRequest(_message.Message):
    __slots__ = ("path", "data")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    path: str
    data: bytes
    def __init__(self, path: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class LoadRouterResponse(_message.Message):
    __slots__ = ("router",)
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    router: Router
    def __init__(self, router: _Optional[_Union[Router, _Mapping]] = ...) -> None: ...

class GetRouterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRouterResponse(_message.Message):
    __slots__ = ("router",)
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    router: Router
    def __init__(self, router: _Optional[_Union[Router, _Mapping]] = ...) -> None: ...

class Router(_message.Message):
    __slots__ = ("digest", "routable_adapters", "max_adapters", "dims", "base_fingerprint", "features")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTABLE_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    routable_adapters: int
    max_adapters: int
    dims: int
    base_fingerprint: str
    features: str
    def __init__(self, digest: _Optional[str] = ..., routable_adapters: _Optional[int] = ..., max_adapters: _Optional[int] = ..., dims: _Optional[int] = ..., base_fingerprint: _Optional[str] = ..., features: _Optional[str] = ...) -> None: ...

class ExportFeedbackRequest(_message.Message):
    __slots__ = ("cursor", "since")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    since: _timestamp_pb2.Timestamp
    def __init__(self, cursor: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ExportFeedbackResponse(_message.Message):
    __slots__ = ("rows", "cursor")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[FeedbackRow]
    cursor: str
    def __init__(self, rows: _Optional[_Iterable[_Union[FeedbackRow, _Mapping]]] = ..., cursor: _Optional[str] = ...) -> None: ...

class FeedbackRow(_message.Message):
    __slots__ = ("prompt", "tasks", "adapters", "routed_adapters", "router_digest", "base_fingerprint", "accept_time")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_TIME_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedScalarFieldContainer[str]
    routed_adapters: _containers.RepeatedScalarFieldContainer[str]
    router_digest: str
    base_fingerprint: str
    accept_time: _timestamp_pb2.Timestamp
    def __init__(self, prompt: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[str]] = ..., routed_adapters: _Optional[_Iterable[str]] = ..., router_digest: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., accept_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
