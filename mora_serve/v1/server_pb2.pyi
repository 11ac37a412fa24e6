from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "base", "limits", "router_digest", "adapters", "adapter_dtype")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    version: str
    base: BaseModel
    limits: Limits
    router_digest: str
    adapters: int
    adapter_dtype: str
    def __init__(self, version: _Optional[str] = ..., base: _Optional[_Union[BaseModel, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., router_digest: _Optional[str] = ..., adapters: _Optional[int] = ..., adapter_dtype: _Optional[str] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "fingerprint", "architecture", "quantization", "dtype", "device", "vocab_size", "chat")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    architecture: str
    quantization: str
    dtype: str
    device: str
    vocab_size: int
    chat: bool
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., architecture: _Optional[str] = ..., quantization: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., vocab_size: _Optional[int] = ..., chat: _Optional[bool] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_context", "max_tokens", "max_mixture", "max_rank", "max_stop", "max_logprobs", "max_adapters", "slots", "max_adapter_bytes", "max_prompts", "max_queue", "max_message_bytes")
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MIXTURE_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_context: int
    max_tokens: int
    max_mixture: int
    max_rank: int
    max_stop: int
    max_logprobs: int
    max_adapters: int
    slots: int
    max_adapter_bytes: int
    max_prompts: int
    max_queue: int
    max_message_bytes: int
    def __init__(self, max_context: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_mixture: _Optional[int] = ..., max_rank: _Optional[int] = ..., max_stop: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., max_adapters: _Optional[int] = ..., slots: _Optional[int] = ..., max_adapter_bytes: _Optional[int] = ..., max_prompts: _Optional[int] = ..., max_queue: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...
