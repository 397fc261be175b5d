import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.runs.record import Record
from src.system.redact import redact

WORD = st.text(string.ascii_letters + string.digits + "%!$*+-_.~", min_size=8, max_size=20)


@given(user=WORD, password=WORD, slash=st.booleans())
def test_no_password_of_a_uri_is_left(user, password, slash):
    password += "/" + password if slash else ""
    for scheme in ("https", "postgresql+psycopg2", "sqlite"):
        text = redact(f"the store {scheme}://{user}:{password}@db.example.org:5432/runs?a=b does not answer")
        assert password not in text
        assert text == f"the store {scheme}://***@db.example.org:5432/runs?a=b does not answer"
    assert redact(f"http://{user}@example.org") == "http://***@example.org", "it may be a token"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://127.0.0.1:5000/#/experiments/1", None),
        ("sqlite:///runs/mlflow.db", None),
        ("method=kmclr k=400 evaluation.lr=[0.1]", None),
        ("mail to a@example.org", None),
        ("hydra.job.env_set.MLFLOW_TRACKING_TOKEN=abc123 k=4", "hydra.job.env_set.MLFLOW_TRACKING_TOKEN=*** k=4"),
        ("https://example.org/?user=a&api_key=s3cret&x=1", "https://example.org/?user=a&api_key=***&x=1"),
    ],
)
def test_nothing_but_secrets_goes(text, redacted):
    assert redact(text) == (redacted or text)


def test_a_secret_of_the_environment_is_found_anywhere(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")  # too short to be looked for in any text
    monkeypatch.setenv("EDITOR", "resnet18")
    assert redact("resnet18 short signed with wJalrXUtnFEMI") == "resnet18 short signed with ***"


def test_a_record_has_none(tmp_path):
    record = Record.new("run", "exp")
    record.params = {"data.root": "s3://id:key-of-it@bucket/images"}
    record.tags = {"command": "src/train.py a.password=hush", "error": "ConnectionError: http://me:hush@host/ is away"}
    record.save(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert "hush" not in text
    assert "key-of-it" not in text
    assert json.loads(text)["params"] == record.params == {"data.root": "s3://***@bucket/images"}
