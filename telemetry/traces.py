"""One trace a request: from the caller's header over every hop to the last window of both branches.

    POST /v1/remix ─ remix ─┬─ decode
                            ├─ separate_stems ─── window ─ infer (in the runner) ─┬─ queue
                            ├─ convert_voice ──── window ─ …                      └─ compute
                            ├─ transcribe_notes ─ window ─ …
                            ├─ generate_notes ─── window ─ …
                            ├─ synthesize_audio ─ window ─ …
                            └─ mix_tracks

A request without a `traceparent` gets an id here; each has one, whether spans are written or not. A
job keeps it in the database: whoever carries it on after a crash carries on its trace.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context; OpenTelemetry's API and SDK.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from remix.settings import Settings

HEADER = "traceparent"

FILE = "file:"
"""Begins the address of a file: spans are appended to it, one a line, as JSON."""

EXPORT_EVERY_MS = 1_000

_tracer: trace.Tracer = trace.NoOpTracer()
"""Ours alone: not OpenTelemetry's global one, into which FastAPI and dbos would write too."""

_PROPAGATOR = TraceContextTextMapPropagator()


def start_tracing(process: str, settings: Settings) -> Callable[[], None]:
    """Write spans from now on, if the settings say where to.

    Args:
        process: what they are said to be of: the composer, or a stage's runner.
        settings: where to, and of how many requests.

    Returns:
        What writes the last of them, and then no more.
    """
    resource = Resource.create({"service.name": f"philharmonics.{process}"})
    if settings.traces:
        # By the trace's id, in each process: all of them come to the same. What a caller's header
        # says of sampling is not heeded: how much is written is not a stranger's to decide.
        provider = TracerProvider(TraceIdRatioBased(settings.trace_share), resource)
        exporter = _exporter(settings.traces)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_EVERY_MS)
        )
    else:
        provider = TracerProvider(ALWAYS_OFF, resource)
    global _tracer
    _tracer = provider.get_tracer("philharmonics")
    return provider.shutdown


def trace_id() -> str:
    """Of what is being done here, 32 hexadecimal digits; empty where that is no part of a trace."""
    found = trace.get_current_span().get_span_context()
    return f"{found.trace_id:032x}" if found.is_valid else ""


def trace_id_in(header: str | None) -> str:
    """Of a `traceparent`.

    >>> trace_id_in("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), trace_id_in(None)
    ('0af7651916cd43dd8448eb211c80319c', '')
    """
    return header.split("-")[1] if header else ""


def traceparent() -> str:
    """The header that carries the trace on; empty where there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(HEADER, "")


@contextmanager
def serving(name: str, caller: str | None) -> Iterator[Span]:
    """While a request is answered; in the trace of its caller, if the header names one."""
    parent = _context_of(caller)
    with _tracer.start_as_current_span(name, parent, SpanKind.SERVER) as span:
        yield span


def caller_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The header among a call's metadata."""
    return next((str(value) for name, value in metadata or () if name == HEADER), None)


@contextmanager
def carried_on(name: str, header: str | None, **attributes: str | int | float) -> Iterator[Span]:
    """While something is done for a request that was answered long ago."""
    with _tracer.start_as_current_span(name, _context_of(header), attributes=attributes) as span:
        yield span


@contextmanager
def part(name: str) -> Iterator[Span]:
    """While a part of the work is done."""
    with _tracer.start_as_current_span(name) as span:
        yield span


def past_part(name: str, begin_ns: int, seconds: float) -> int:
    """A part that has been done, for whoever knows only afterwards; when it ended."""
    end_ns = begin_ns + round(seconds * 1e9)
    _tracer.start_span(name, start_time=begin_ns).end(end_ns)
    return end_ns


class StageSpans:
    """Spans of a song's stages, each from its first window to its last."""

    def __init__(self) -> None:
        self._song = context.get_current()
        self._spans: dict[str, Span] = {}
        self._ends_ns: dict[str, int] = {}
        self._cached: dict[str, int] = {}

    def within(self, stage: str) -> context.Context:
        """Where what is done for the stage belongs."""
        if stage not in self._spans:
            self._spans[stage] = _tracer.start_span(stage, self._song)
        return trace.set_span_in_context(self._spans[stage], self._song)

    def did(self, stage: str) -> None:
        """Something of the stage has just been done."""
        self._ends_ns[stage] = time.time_ns()

    def had(self, stage: str, windows: int) -> None:
        """Some windows of the stage were in the cache."""
        self.within(stage)
        self._cached[stage] = self._cached.get(stage, 0) + windows
        self.did(stage)

    def close(self) -> None:
        """No more comes of any stage."""
        for stage, span in self._spans.items():
            span.set_attribute("cached_windows", self._cached.get(stage, 0))
            span.end(self._ends_ns.get(stage))


_STAGES: ContextVar[StageSpans | None] = ContextVar("stages", default=None)


@contextmanager
def song(call: str) -> Iterator[StageSpans]:
    """While a call of the composer works: its stages have spans of their own."""
    with part(call):
        spans = StageSpans()
        token = _STAGES.set(spans)
        try:
            yield spans
        finally:
            _STAGES.reset(token)
            spans.close()


@contextmanager
def window(stage: str, model: str, windows: int) -> Iterator[Span]:
    """While a runner is asked for some windows."""
    stages = _STAGES.get()
    attributes: dict[str, str | int] = {"model": model, "windows": windows}
    parent = stages.within(stage) if stages else None
    with _tracer.start_as_current_span("window", parent, SpanKind.CLIENT, attributes) as span:
        yield span
    if stages:
        stages.did(stage)


def cached(stage: str, windows: int) -> None:
    """Some windows of a stage were in the cache."""
    if stages := _STAGES.get():
        stages.had(stage, windows)


def _context_of(header: str | None) -> context.Context:
    return _PROPAGATOR.extract({HEADER: header} if header else {}, context.Context())


def _exporter(address: str) -> SpanExporter:
    if address.startswith(FILE):
        return FileExporter(address.removeprefix(FILE))
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(address, insecure=address.startswith("http://"))


class FileExporter(SpanExporter):
    """Appends spans to a file, one a line; several processes may write into it.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        # Each batch is one write at the file's end: batches of two processes do not mix.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write a batch."""
        lines = [span.to_json(indent=None) + "\n" for span in spans]
        os.write(self._file, "".join(lines).encode())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        os.close(self._file)
