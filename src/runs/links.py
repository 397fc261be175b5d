"""Where MLflow's pages show runs and sweeps, and how they are opened."""

from __future__ import annotations

import os
from pathlib import Path

from src.runs.directory import ROOT
from src.runs.record import TAG_CHARTS, Record, records_below

MLFLOW_UI = "http://127.0.0.1:5000/"  # where `mlflow ui` serves its pages


def newest_charts(root: Path = ROOT) -> str:
    """Where MLflow's pages show the newest sweep; empty where no sweep below ``root`` has reached MLflow."""
    sweeps = [record for _, record in records_below(root) if TAG_CHARTS in record.tags]
    newest = max(sweeps, key=lambda record: record.end_time or record.start_time, default=None)
    return link_to(newest.tags[TAG_CHARTS]) if newest else ""


def page_of(record: Record) -> str:
    """Where MLflow's pages show a run, after their address; empty where MLflow does not have it."""
    entry = record.entry
    # Without its last part the link opens among pages for language models.
    path = f"#/experiments/{entry.experiment_id}/runs/{entry.run_id}?workflowType=machine_learning"
    return path if entry.experiment_id else ""


def link_to(path: str) -> str:
    """The address of one of MLflow's pages, on the server if there is one, else where ``mlflow ui`` serves it."""
    return f"{_server() or MLFLOW_UI}{path}"


def how_to_open(path: str) -> str:
    """What opens one of MLflow's pages: its link on a server, else the command that serves it here and its link."""
    return link_to(path) if _server() else f"mlflow ui, then {link_to(path)}"


def _server() -> str:
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith(("http://", "https://")):
        return ""
    scheme, _, rest = address.rstrip("/").partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}/"  # without the password that may stand before the host
