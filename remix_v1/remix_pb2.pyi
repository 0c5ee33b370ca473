import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AudioFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUDIO_FORMAT_UNSPECIFIED: _ClassVar[AudioFormat]
    AUDIO_FORMAT_WAV: _ClassVar[AudioFormat]
    AUDIO_FORMAT_FLAC: _ClassVar[AudioFormat]
    AUDIO_FORMAT_MP3: _ClassVar[AudioFormat]

class NotesFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOTES_FORMAT_UNSPECIFIED: _ClassVar[NotesFormat]
    NOTES_FORMAT_MIDI: _ClassVar[NotesFormat]
    NOTES_FORMAT_JSON: _ClassVar[NotesFormat]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_DONE: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
AUDIO_FORMAT_UNSPECIFIED: AudioFormat
AUDIO_FORMAT_WAV: AudioFormat
AUDIO_FORMAT_FLAC: AudioFormat
AUDIO_FORMAT_MP3: AudioFormat
NOTES_FORMAT_UNSPECIFIED: NotesFormat
NOTES_FORMAT_MIDI: NotesFormat
NOTES_FORMAT_JSON: NotesFormat
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_DONE: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState

class SeparateOptions(_message.Message):
    __slots__ = ("separator",)
    SEPARATOR_FIELD_NUMBER: _ClassVar[int]
    separator: str
    def __init__(self, separator: _Optional[str] = ...) -> None: ...

class GenerateOptions(_message.Message):
    __slots__ = ("seed", "mode", "tracks", "temperature", "top_p", "density", "prompt_bars")
    SEED_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TRACKS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BARS_FIELD_NUMBER: _ClassVar[int]
    seed: int
    mode: str
    tracks: _containers.RepeatedScalarFieldContainer[str]
    temperature: float
    top_p: float
    density: int
    prompt_bars: int
    def __init__(self, seed: _Optional[int] = ..., mode: _Optional[str] = ..., tracks: _Optional[_Iterable[str]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., density: _Optional[int] = ..., prompt_bars: _Optional[int] = ...) -> None: ...

class ConvertOptions(_message.Message):
    __slots__ = ("voice", "octaves", "noise_seed")
    VOICE_FIELD_NUMBER: _ClassVar[int]
    OCTAVES_FIELD_NUMBER: _ClassVar[int]
    NOISE_SEED_FIELD_NUMBER: _ClassVar[int]
    voice: str
    octaves: int
    noise_seed: int
    def __init__(self, voice: _Optional[str] = ..., octaves: _Optional[int] = ..., noise_seed: _Optional[int] = ...) -> None: ...

class RemixOptions(_message.Message):
    __slots__ = ("separator", "seed", "mode", "tracks", "temperature", "top_p", "voice", "octaves", "noise_seed", "vocal_gain_db", "loudness_lufs", "density", "prompt_bars")
    SEPARATOR_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TRACKS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    VOICE_FIELD_NUMBER: _ClassVar[int]
    OCTAVES_FIELD_NUMBER: _ClassVar[int]
    NOISE_SEED_FIELD_NUMBER: _ClassVar[int]
    VOCAL_GAIN_DB_FIELD_NUMBER: _ClassVar[int]
    LOUDNESS_LUFS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BARS_FIELD_NUMBER: _ClassVar[int]
    separator: str
    seed: int
    mode: str
    tracks: _containers.RepeatedScalarFieldContainer[str]
    temperature: float
    top_p: float
    voice: str
    octaves: int
    noise_seed: int
    vocal_gain_db: float
    loudness_lufs: float
    density: int
    prompt_bars: int
    def __init__(self, separator: _Optional[str] = ..., seed: _Optional[int] = ..., mode: _Optional[str] = ..., tracks: _Optional[_Iterable[str]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., voice: _Optional[str] = ..., octaves: _Optional[int] = ..., noise_seed: _Optional[int] = ..., vocal_gain_db: _Optional[float] = ..., loudness_lufs: _Optional[float] = ..., density: _Optional[int] = ..., prompt_bars: _Optional[int] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "media_type", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    media_type: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., media_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("file", "chunk")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    file: File
    chunk: bytes
    def __init__(self, file: _Optional[_Union[File, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SubmitRemixRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: SubmitRemixHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[SubmitRemixHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SubmitRemixHead(_message.Message):
    __slots__ = ("options", "job_id", "webhook_url")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WEBHOOK_URL_FIELD_NUMBER: _ClassVar[int]
    options: RemixOptions
    job_id: str
    webhook_url: str
    def __init__(self, options: _Optional[_Union[RemixOptions, _Mapping]] = ..., job_id: _Optional[str] = ..., webhook_url: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "fraction")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    stage: str
    fraction: float
    def __init__(self, stage: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class JobError(_message.Message):
    __slots__ = ("reason", "message", "value", "limit", "remedy")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    value: str
    limit: str
    remedy: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., value: _Optional[str] = ..., limit: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "state", "options", "created", "started", "ended", "expires", "progress", "position", "estimate_s", "attempt", "error", "artifacts", "trace_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_S_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    state: JobState
    options: RemixOptions
    created: _timestamp_pb2.Timestamp
    started: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    expires: _timestamp_pb2.Timestamp
    progress: _containers.RepeatedCompositeFieldContainer[Progress]
    position: int
    estimate_s: float
    attempt: int
    error: JobError
    artifacts: _containers.RepeatedCompositeFieldContainer[File]
    trace_id: str
    def __init__(self, id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., options: _Optional[_Union[RemixOptions, _Mapping]] = ..., created: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., started: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., progress: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., position: _Optional[int] = ..., estimate_s: _Optional[float] = ..., attempt: _Optional[int] = ..., error: _Optional[_Union[JobError, _Mapping]] = ..., artifacts: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., trace_id: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "state")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    state: JobState
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "after_event")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_EVENT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_event: int
    def __init__(self, job_id: _Optional[str] = ..., after_event: _Optional[int] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("id", "time", "state", "progress")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    id: int
    time: _timestamp_pb2.Timestamp
    state: JobState
    progress: Progress
    def __init__(self, id: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., state: _Optional[_Union[JobState, str]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class StreamAudioRequest(_message.Message):
    __slots__ = ("job_id", "offset")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    offset: int
    def __init__(self, job_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class AudioChunk(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class GetArtifactRequest(_message.Message):
    __slots__ = ("job_id", "name", "offset")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    offset: int
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class QuoteRequest(_message.Message):
    __slots__ = ("duration_s",)
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    duration_s: float
    def __init__(self, duration_s: _Optional[float] = ...) -> None: ...

class QuoteResponse(_message.Message):
    __slots__ = ("compute_s", "stages_s", "alone_s", "jobs_before", "start_in_s", "done_in_s")
    class StagesSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_S_FIELD_NUMBER: _ClassVar[int]
    ALONE_S_FIELD_NUMBER: _ClassVar[int]
    JOBS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    START_IN_S_FIELD_NUMBER: _ClassVar[int]
    DONE_IN_S_FIELD_NUMBER: _ClassVar[int]
    compute_s: float
    stages_s: _containers.ScalarMap[str, float]
    alone_s: float
    jobs_before: int
    start_in_s: float
    done_in_s: float
    def __init__(self, compute_s: _Optional[float] = ..., stages_s: _Optional[_Mapping[str, float]] = ..., alone_s: _Optional[float] = ..., jobs_before: _Optional[int] = ..., start_in_s: _Optional[float] = ..., done_in_s: _Optional[float] = ...) -> None: ...

class WorkEvent(_message.Message):
    __slots__ = ("progress", "file", "chunk")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    file: File
    chunk: bytes
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., file: _Optional[_Union[File, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class RemixRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: RemixHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[RemixHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class RemixHead(_message.Message):
    __slots__ = ("options", "format", "everything")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    options: RemixOptions
    format: AudioFormat
    everything: bool
    def __init__(self, options: _Optional[_Union[RemixOptions, _Mapping]] = ..., format: _Optional[_Union[AudioFormat, str]] = ..., everything: _Optional[bool] = ...) -> None: ...

class SeparateRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: SeparateHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[SeparateHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SeparateHead(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: SeparateOptions
    def __init__(self, options: _Optional[_Union[SeparateOptions, _Mapping]] = ...) -> None: ...

class TranscribeRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: TranscribeHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[TranscribeHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class TranscribeHead(_message.Message):
    __slots__ = ("format",)
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    format: NotesFormat
    def __init__(self, format: _Optional[_Union[NotesFormat, str]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: GenerateHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[GenerateHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GenerateHead(_message.Message):
    __slots__ = ("options", "format")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    options: GenerateOptions
    format: NotesFormat
    def __init__(self, options: _Optional[_Union[GenerateOptions, _Mapping]] = ..., format: _Optional[_Union[NotesFormat, str]] = ...) -> None: ...

class ConvertRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: ConvertHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[ConvertHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ConvertHead(_message.Message):
    __slots__ = ("options", "format")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    options: ConvertOptions
    format: AudioFormat
    def __init__(self, options: _Optional[_Union[ConvertOptions, _Mapping]] = ..., format: _Optional[_Union[AudioFormat, str]] = ...) -> None: ...

class SynthesizeRequest(_message.Message):
    __slots__ = ("head", "chunk")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    head: SynthesizeHead
    chunk: bytes
    def __init__(self, head: _Optional[_Union[SynthesizeHead, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class SynthesizeHead(_message.Message):
    __slots__ = ("format",)
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    format: AudioFormat
    def __init__(self, format: _Optional[_Union[AudioFormat, str]] = ...) -> None: ...

class ListVoicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListVoicesResponse(_message.Message):
    __slots__ = ("voices",)
    VOICES_FIELD_NUMBER: _ClassVar[int]
    voices: _containers.RepeatedCompositeFieldContainer[Voice]
    def __init__(self, voices: _Optional[_Iterable[_Union[Voice, _Mapping]]] = ...) -> None: ...

class Voice(_message.Message):
    __slots__ = ("name", "model", "weights", "licence", "source", "default")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    weights: str
    licence: str
    source: str
    default: bool
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., weights: _Optional[str] = ..., licence: _Optional[str] = ..., source: _Optional[str] = ..., default: _Optional[bool] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "stage", "weights", "licence", "source", "quality", "sample_rate_hz", "installed", "default", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_HZ_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    stage: str
    weights: str
    licence: str
    source: str
    quality: str
    sample_rate_hz: int
    installed: bool
    default: bool
    files: _containers.RepeatedCompositeFieldContainer[ModelFile]
    def __init__(self, name: _Optional[str] = ..., stage: _Optional[str] = ..., weights: _Optional[str] = ..., licence: _Optional[str] = ..., source: _Optional[str] = ..., quality: _Optional[str] = ..., sample_rate_hz: _Optional[int] = ..., installed: _Optional[bool] = ..., default: _Optional[bool] = ..., files: _Optional[_Iterable[_Union[ModelFile, _Mapping]]] = ...) -> None: ...

class ModelFile(_message.Message):
    __slots__ = ("path", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    sha256: str
    def __init__(self, path: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...
