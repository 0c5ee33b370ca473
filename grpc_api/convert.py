"""Messages of `remix.proto` <-> values of ours."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from grpc_api.statuses import INTERNAL, KINDS_BY_NAME, as_json
from jobs.forecast import Quote
from jobs.job import ArtifactInfo, Job, JobEvent, JobFailure, State
from remix.composer import Composer
from remix.errors import InvalidOption
from remix.manifest import ModelEntry, expected_sha256
from remix.options import Options, parse_options
from remix.stages import Stage
from remix_v1 import remix_pb2 as messages

AnyOptions = TypeVar("AnyOptions", bound=Options)

STATES: dict[State, messages.JobState] = {
    "queued": messages.JOB_STATE_QUEUED,
    "running": messages.JOB_STATE_RUNNING,
    "done": messages.JOB_STATE_DONE,
    "failed": messages.JOB_STATE_FAILED,
    "cancelled": messages.JOB_STATE_CANCELLED,
}


def options_of(kind: type[AnyOptions], message: Any) -> AnyOptions:
    """What a caller chose, with everything else at its default.

    Raises:
        InvalidOption: a value out of its range.
    """
    chosen = {
        field.name: list(value) if field.is_repeated else value
        for field, value in message.ListFields()
    }
    # The same way as over HTTP: the same bounds, the same refusals.
    return parse_options(kind, json.dumps(chosen))


def state_of(message: int) -> State | None:
    """The state that a listing is to be of; none for all.

    Raises:
        InvalidOption: there is no such state.
    """
    if message == messages.JOB_STATE_UNSPECIFIED:
        return None
    for state, number in STATES.items():
        if number == message:
            return state
    raise InvalidOption(
        f"state is {message}; it must be one of {sorted(STATES.values())}.",
        value=message,
        limit=sorted(STATES.values()),
        remedy="Leave it out, or send one that remix.proto names.",
    )


def job_message(job: Job) -> messages.Job:
    """A job as its owner may see it."""
    chosen = {k: v for k, v in job.options.model_dump().items() if v is not None}
    return messages.Job(
        id=job.id,
        state=STATES[job.state],
        options=messages.RemixOptions(**chosen),
        created=_time(job.created_s),
        started=_time(job.started_s),
        ended=_time(job.ended_s),
        expires=_time(job.expires_s),
        progress=[progress_message(stage, done) for stage, done in job.progress.items()],
        position=job.position,
        estimate_s=job.estimate_s,
        attempt=job.attempt,
        error=_error(job.error) if job.error is not None else None,
        artifacts=[file_message(artifact) for artifact in job.artifacts],
        trace_id=job.trace_id,
    )


def event_message(event: JobEvent) -> messages.JobEvent:
    """Something that happened to a job."""
    message = messages.JobEvent(id=event.id, time=_time(event.at_s))
    if event.state is not None:
        message.state = STATES[event.state]
    if event.stage is not None:
        message.progress.CopyFrom(progress_message(event.stage, event.fraction or 0.0))
    return message


def progress_message(stage: Stage, fraction: float) -> messages.Progress:
    """How far a stage is."""
    return messages.Progress(stage=stage, fraction=fraction)


def file_message(artifact: ArtifactInfo) -> messages.File:
    """What a file is."""
    return messages.File(
        name=artifact.name,
        media_type=artifact.media_type,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
    )


def quote_message(quote: Quote) -> messages.QuoteResponse:
    """What a song would cost, and when it would be done."""
    return messages.QuoteResponse(
        compute_s=quote.cost.compute_s,
        stages_s={str(stage): took_s for stage, took_s in quote.cost.stages_s.items()},
        alone_s=quote.cost.alone_s,
        jobs_before=quote.jobs_before,
        start_in_s=quote.span.start_s,
        done_in_s=quote.span.end_s,
    )


def voice_messages(composer: Composer) -> list[messages.Voice]:
    """Voices, the default first."""
    return [
        messages.Voice(
            name=name,
            model=entry.name,
            weights=entry.weights,
            licence=entry.licence,
            source=entry.source,
            default=index == 0,
        )
        for index, (name, entry) in enumerate(composer.voices())
    ]


def model_messages(composer: Composer) -> list[messages.Model]:
    """What the manifest says."""
    defaults = composer.default_models()
    return [_model(entry, composer, entry.name in defaults) for entry in composer.manifest.values()]


def _model(entry: ModelEntry, composer: Composer, is_default: bool) -> messages.Model:
    return messages.Model(
        name=entry.name,
        stage=entry.stage,
        weights=entry.weights,
        licence=entry.licence,
        source=entry.source,
        quality=entry.quality,
        sample_rate_hz=entry.sample_rate_hz,
        installed=entry.is_installed(composer.models_dir),
        default=is_default,
        files=[
            messages.ModelFile(path=f.path, sha256=expected_sha256(composer.models_dir, f))
            for f in entry.files
        ],
    )


def _error(failure: JobFailure) -> messages.JobError:
    return messages.JobError(
        reason=KINDS_BY_NAME.get(failure.type, INTERNAL).reason,
        message=failure.detail,
        value=as_json(failure.value) if failure.value is not None else "",
        limit=as_json(failure.limit) if failure.limit is not None else "",
        remedy=failure.remedy or "",
    )


def _time(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    time = Timestamp()
    time.FromMicroseconds(round(seconds * 1e6))
    return time
