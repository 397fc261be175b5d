"""Addresses of the pages on which MLflow shows runs and sweeps, and how to open them."""

from __future__ import annotations

import os
from pathlib import Path

from src.runs.directory import ROOT
from src.runs.record import TAG_CHARTS, Record, records_below

MLFLOW_UI = "http://127.0.0.1:5000/"  # where `mlflow ui` serves its pages


def newest_charts(root: Path = ROOT) -> str:
    """The address of the newest sweep's charts in MLflow; empty if MLflow has no charts of a sweep below ``root``."""
    sweeps = [record for _, record in records_below(root) if TAG_CHARTS in record.tags]
    newest = max(sweeps, key=lambda record: record.end_time or record.start_time, default=None)
    return link_to(newest.tags[TAG_CHARTS]) if newest else ""


def page_of(record: Record) -> str:
    """The path of a run's page in MLflow, without the server's address; empty if MLflow does not have the run."""
    entry = record.entry
    # Without ``workflowType`` MLflow opens the page in its view for language models.
    path = f"#/experiments/{entry.experiment_id}/runs/{entry.run_id}?workflowType=machine_learning"
    return path if entry.experiment_id else ""


def link_to(path: str) -> str:
    """The address of one of MLflow's pages: on the tracking server if there is one, else on ``mlflow ui``."""
    return f"{_server() or MLFLOW_UI}{path}"


def how_to_open(path: str) -> str:
    """Say how to open one of MLflow's pages: by its link, which needs ``mlflow ui`` first if there is no server."""
    return link_to(path) if _server() else f"mlflow ui, then {link_to(path)}"


def _server() -> str:
    """The address of the tracking server, without credentials, ending in a slash; empty if there is no server."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith(("http://", "https://")):
        return ""
    scheme, _, rest = address.rstrip("/").partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}/"
