from mora_serve.v1 import generation_pb2 as _generation_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
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
    __slots__ = ("digest", "routable_adapters", "max_adapters", "dims", "base_fingerprint")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTABLE_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    routable_adapters: int
    max_adapters: int
    dims: int
    base_fingerprint: str
    def __init__(self, digest: _Optional[str] = ..., routable_adapters: _Optional[int] = ..., max_adapters: _Optional[int] = ..., dims: _Optional[int] = ..., base_fingerprint: _Optional[str] = ...) -> None: ...
