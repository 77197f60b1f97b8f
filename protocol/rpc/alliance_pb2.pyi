from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Document(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Documents(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, data: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("document", "token")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    token: str
    def __init__(self, document: _Optional[bytes] = ..., token: _Optional[str] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("certificate", "memberships")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIPS_FIELD_NUMBER: _ClassVar[int]
    certificate: str
    memberships: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, certificate: _Optional[str] = ..., memberships: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Since(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class StudySince(_message.Message):
    __slots__ = ("study", "after")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    study: str
    after: int
    def __init__(self, study: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class LogSince(_message.Message):
    __slots__ = ("log", "after")
    LOG_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    log: str
    after: int
    def __init__(self, log: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class StudyItem(_message.Message):
    __slots__ = ("document", "state", "standing", "round")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    state: str
    standing: _containers.RepeatedScalarFieldContainer[bytes]
    round: int
    def __init__(self, document: _Optional[bytes] = ..., state: _Optional[str] = ..., standing: _Optional[_Iterable[bytes]] = ..., round: _Optional[int] = ...) -> None: ...

class StudyList(_message.Message):
    __slots__ = ("studies",)
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    studies: _containers.RepeatedCompositeFieldContainer[StudyItem]
    def __init__(self, studies: _Optional[_Iterable[_Union[StudyItem, _Mapping]]] = ...) -> None: ...

class NumberedDocument(_message.Message):
    __slots__ = ("number", "data")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    number: int
    data: bytes
    def __init__(self, number: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Numbered(_message.Message):
    __slots__ = ("documents",)
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[NumberedDocument]
    def __init__(self, documents: _Optional[_Iterable[_Union[NumberedDocument, _Mapping]]] = ...) -> None: ...

class LogHead(_message.Message):
    __slots__ = ("checkpoint", "proof")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    checkpoint: bytes
    proof: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[bytes] = ..., proof: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LogHeads(_message.Message):
    __slots__ = ("heads",)
    HEADS_FIELD_NUMBER: _ClassVar[int]
    heads: _containers.RepeatedCompositeFieldContainer[LogHead]
    def __init__(self, heads: _Optional[_Iterable[_Union[LogHead, _Mapping]]] = ...) -> None: ...

class StudyStatus(_message.Message):
    __slots__ = ("study", "code")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    study: str
    code: str
    def __init__(self, study: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("version", "codes", "time", "studies")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    version: str
    codes: _containers.RepeatedScalarFieldContainer[str]
    time: str
    studies: _containers.RepeatedCompositeFieldContainer[StudyStatus]
    def __init__(self, version: _Optional[str] = ..., codes: _Optional[_Iterable[str]] = ..., time: _Optional[str] = ..., studies: _Optional[_Iterable[_Union[StudyStatus, _Mapping]]] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("time", "membership", "witness")
    TIME_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    WITNESS_FIELD_NUMBER: _ClassVar[int]
    time: str
    membership: int
    witness: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, time: _Optional[str] = ..., membership: _Optional[int] = ..., witness: _Optional[_Iterable[str]] = ...) -> None: ...
