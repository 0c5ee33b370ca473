"""Rows of panels -> the dashboards' JSON: `python docker/grafana/make_dashboards.py`.

Grafana imports them as they are (Dashboards, New, Import), and asks for a Prometheus data source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"

WIDTH, HEIGHT = 8, 8
"""Of a panel, in Grafana's grid of 24 columns."""


@dataclass(frozen=True)
class Panel:
    """A picture.

    Args:
        title: of it.
        unit: Grafana's name of the unit.
        says: how to read it.
        queries: legend -> PromQL.
        kind: Grafana's type of panel.
        is_stacked: whether lines add up.
    """

    title: str
    unit: str
    says: str
    queries: dict[str, str]
    kind: str = "timeseries"
    is_stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Rows of panels."""

    uid: str
    title: str
    description: str
    rows: dict[str, list[Panel]] = field(default_factory=dict)


RATE = "[$__rate_interval]"


def quantile(q: float, metric: str, *by: str) -> str:
    """Of a histogram."""
    labels = ", ".join([*by, "le"])
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{RATE})))"


def rate(metric: str, *by: str, where: str = "") -> str:
    """A second, summed."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({metric}{where}{RATE}))"


def mean(metric: str, *by: str) -> str:
    """Of a histogram."""
    return f"{rate(metric + '_sum', *by)} / {rate(metric + '_count', *by)}"


GOOD = '{le="0.5"}'
COMPUTED = '{outcome="computed"}'
MODEL = "{{model}}"
STAGE = "{{stage}}"

CALLERS = Dashboard(
    "philharmonics-callers",
    "Deep Philharmonics: callers",
    "What callers notice: how long songs take, how many are good, what is refused.",
    {
        "Songs": [
            Panel(
                "Seconds of a remix, by the song's length",
                "s",
                "Half and 99 % of the remixes take at most so long, from the decoded song on. The "
                "legend has the length of the songs: at most so many seconds.",
                {
                    "{{song_seconds}} s, half": quantile(
                        0.5, "philharmonics_remix_seconds", "song_seconds"
                    ),
                    "{{song_seconds}} s, 99 %": quantile(
                        0.99, "philharmonics_remix_seconds", "song_seconds"
                    ),
                },
            ),
            Panel(
                "Pace",
                "none",
                "Seconds of work for each second of a song, whatever its length: below 1 a song is "
                "done before it could be heard.",
                {
                    "half": quantile(0.5, "philharmonics_remix_pace_ratio"),
                    "90 %": quantile(0.9, "philharmonics_remix_pace_ratio"),
                    "99 %": quantile(0.99, "philharmonics_remix_pace_ratio"),
                },
            ),
            Panel(
                "Goodput",
                "percentunit",
                "Share of the remixes that took at most half as long as their song.",
                {
                    "good": f"{rate('philharmonics_remix_pace_ratio_bucket', where=GOOD)} / "
                    f"{rate('philharmonics_remix_pace_ratio_count')}"
                },
            ),
            Panel(
                "Sound that is worked on",
                "none",
                "Seconds of sound a second, by what was asked for.",
                {"{{call}}": rate("philharmonics_audio_seconds_total", "call")},
                is_stacked=True,
            ),
            Panel(
                "First sound of a job",
                "s",
                "From a job's submission to the first of its sound that can be played.",
                {
                    "half": quantile(0.5, "philharmonics_first_audio_seconds"),
                    "90 %": quantile(0.9, "philharmonics_first_audio_seconds"),
                },
            ),
            Panel(
                "Seconds of a job",
                "s",
                "From a job's submission to its end, waiting and all, by how it ended.",
                {
                    "{{state}}, half": quantile(0.5, "philharmonics_job_seconds", "state"),
                    "{{state}}, 90 %": quantile(0.9, "philharmonics_job_seconds", "state"),
                },
            ),
        ],
        "Answers": [
            Panel(
                "Requests",
                "reqps",
                "Over HTTP, by route and status; over gRPC, by method and code.",
                {
                    "{{method}} {{route}} {{status}}": rate(
                        "philharmonics_http_seconds_count",
                        "method",
                        "route",
                        "status",
                        where='{route=~"/v1/.*"}',
                    ),
                    "{{method}} {{code}}": rate(
                        "philharmonics_grpc_seconds_count", "method", "code"
                    ),
                },
            ),
            Panel(
                "Refused",
                "reqps",
                "Answers that are errors, by their type. `queue-full` is a lack of room; the rest "
                "is for callers or for us to mend.",
                {
                    "{{reason}} ({{transport}})": rate(
                        "philharmonics_refusals_total", "reason", "transport"
                    )
                },
                is_stacked=True,
            ),
            Panel(
                "Failures of ours",
                "percentunit",
                "Share of the answers that are 5xx, or INTERNAL, UNAVAILABLE and UNKNOWN.",
                {
                    "HTTP": rate(
                        "philharmonics_http_seconds_count",
                        where='{route=~"/v1/.*", status=~"5.."}',
                    )
                    + " / "
                    + rate("philharmonics_http_seconds_count", where='{route=~"/v1/.*"}'),
                    "gRPC": rate(
                        "philharmonics_grpc_seconds_count",
                        where='{code=~"INTERNAL|UNAVAILABLE|UNKNOWN"}',
                    )
                    + " / "
                    + rate("philharmonics_grpc_seconds_count"),
                },
            ),
        ],
        "Waiting": [
            Panel(
                "Jobs",
                "none",
                "In all composers of the database.",
                {"{{state}}": 'max by (state) (philharmonics_jobs{state=~"queued|running"})'},
                is_stacked=True,
            ),
            Panel(
                "The oldest job that waits",
                "s",
                "How long it has waited.",
                {"age": "max(philharmonics_job_age_seconds)"},
            ),
            Panel(
                "Seconds of an answer, 99 %",
                "s",
                "By route, the streams of events and sound with it.",
                {"{{route}}": quantile(0.99, "philharmonics_http_seconds", "route")},
            ),
        ],
    },
)

OPERATORS = Dashboard(
    "philharmonics-operators",
    "Deep Philharmonics: operators",
    "Stage by stage: where time goes, how full queues and batches are, what is short.",
    {
        "Stages": [
            Panel(
                "Where a window's time goes",
                "s",
                "Mean seconds of a call to a runner: queue, compute and transfer add up.",
                {
                    "{{stage}} {{part}}": mean("philharmonics_stage_seconds", "stage", "part"),
                },
                is_stacked=True,
            ),
            Panel(
                "The slowest hundredth",
                "s",
                "99 % of the calls spend at most so long in a part.",
                {
                    "{{stage}} {{part}}": quantile(
                        0.99, "philharmonics_stage_seconds", "stage", "part"
                    )
                },
            ),
            Panel(
                "Windows done",
                "none",
                "Computed a second, by model.",
                {MODEL: rate("philharmonics_windows_total", "model", where=COMPUTED)},
                is_stacked=True,
            ),
            Panel(
                "Windows that came to nothing",
                "none",
                "A second: wasted ones were computed for callers who had left; cancelled and "
                "overdue ones cost nothing.",
                {
                    "{{model}} {{outcome}}": rate(
                        "philharmonics_windows_total", "model", "outcome",
                        where='{outcome!="computed"}',
                    )
                },
            ),
            Panel(
                "Tokens written",
                "none",
                "A second, by the generator.",
                {MODEL: rate("philharmonics_generator_tokens_total", "model")},
            ),
            Panel(
                "Runners that are away, calls made again",
                "none",
                "1: the composer has no runner of the stage. Calls that are made again, a second.",
                {
                    "{{stage}} is away": "max by (stage) (philharmonics_away_runners)",
                    "{{stage}} {{reason}}": rate("philharmonics_retries_total", "stage", "reason"),
                },
            ),
        ],
        "Batches and queues": [
            Panel(
                "Windows in a batch",
                "none",
                "Mean; the limit is `max_batch` in models.toml.",
                {MODEL: mean("philharmonics_batch_windows", "model")},
            ),
            Panel(
                "Padding",
                "percentunit",
                "Share of what is computed that is silence behind a song's end, or filled up.",
                {
                    MODEL: f"{rate('philharmonics_padding_windows_total', 'model')} / "
                    f"{rate('philharmonics_windows_total', 'model', where=COMPUTED)}"
                },
            ),
            Panel(
                "Windows that wait and that are computed",
                "none",
                "Now, in all replicas.",
                {
                    "{{model}} waits": "sum by (model) (philharmonics_queue_windows)",
                    "{{model}} at work": "sum by (model) (philharmonics_computing_windows)",
                },
            ),
            Panel(
                "The oldest window that waits",
                "s",
                "How long it has waited.",
                {MODEL: "max by (model) (philharmonics_queue_age_seconds)"},
            ),
            Panel(
                "Time in the queue",
                "s",
                "90 % of the requests waited at most so long. Replicas are added by this.",
                {MODEL: quantile(0.9, "philharmonics_queue_seconds", "model")},
            ),
            Panel(
                "Requests refused by a full queue",
                "reqps",
                "Their songs wait and ask again.",
                {
                    MODEL: rate(
                        "philharmonics_requests_total", "model", where='{outcome="refused"}'
                    )
                },
            ),
        ],
        "Saturation": [
            Panel(
                "Workers at work",
                "none",
                "Batches under way, mean, by model. A runner has two workers on two cores.",
                {MODEL: rate("philharmonics_compute_seconds_sum", "model")},
                is_stacked=True,
            ),
            Panel(
                "Processor",
                "none",
                "Cores that each process uses.",
                {"{{process}}": rate("philharmonics_process_cpu_seconds_total", "process")},
                is_stacked=True,
            ),
            Panel(
                "Memory",
                "bytes",
                "Resident, of each process; replicas together.",
                {"{{process}}": "sum by (process) (philharmonics_process_memory_bytes)"},
                is_stacked=True,
            ),
            Panel(
                "Memory of GPUs",
                "bytes",
                "As the driver has it; nothing where models run on the CPU.",
                {
                    "{{instance}} {{gpu}} {{kind}}": "max by (instance, gpu, kind) "
                    "(philharmonics_gpu_memory_bytes)"
                },
            ),
            Panel(
                "Cache",
                "percentunit",
                "Share of the windows that were there.",
                {
                    STAGE: rate(
                        "philharmonics_cache_windows_total", "stage", where='{outcome="hit"}'
                    )
                    + " / "
                    + rate(
                        "philharmonics_cache_windows_total", "stage", where='{outcome=~"hit|miss"}'
                    ),
                },
            ),
            Panel(
                "Size of the cache",
                "bytes",
                "And entries a second that were damaged or found no room.",
                {
                    "size": "max(philharmonics_cache_bytes)",
                    "{{outcome}}": rate(
                        "philharmonics_cache_windows_total", "outcome",
                        where='{outcome=~"damaged|unwritten"}',
                    ),
                },
            ),
            Panel(
                "Models in use",
                "none",
                "One row a model; two rows of one model are replicas with different files.",
                {
                    "{{stage}} {{model}} {{sha256}}": "count by (stage, model, sha256) "
                    "(philharmonics_model_info)"
                },
                kind="table",
            ),
        ],
    },
)  # fmt: skip


def dashboard_json(dashboard: Dashboard) -> str:
    """As Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, of_row in dashboard.rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for index, panel in enumerate(of_row):
            place = {"x": WIDTH * (index % 3), "y": y + HEIGHT * (index // 3)}
            panels.append(_panel(panel, len(panels) + 1, {**place, "w": WIDTH, "h": HEIGHT}))
        y += HEIGHT * -(-len(of_row) // 3)
    return (
        json.dumps(
            {
                "uid": dashboard.uid,
                "title": dashboard.title,
                "description": dashboard.description,
                "tags": ["philharmonics"],
                "schemaVersion": 38,
                "editable": True,
                "refresh": "10s",
                "time": {"from": "now-1h", "to": "now"},
                "templating": {
                    "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
                },
                "panels": panels,
            },
            indent=2,
        )
        + "\n"
    )


def _panel(panel: Panel, id: int, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    is_table = panel.kind == "table"
    custom = {"stacking": {"mode": "normal" if panel.is_stacked else "none"}, "fillOpacity": 10}
    return {
        "id": id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                **({} if is_table else {"min": 0, "custom": custom}),
            },
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": source,
                "expr": query,
                "legendFormat": legend,
                **({"instant": True, "format": "table"} if is_table else {}),
            }
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


FILES = {"callers.json": CALLERS, "operators.json": OPERATORS}

if __name__ == "__main__":
    for name, dashboard in FILES.items():
        (FOLDER / name).write_text(dashboard_json(dashboard))
