import json
import string
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.runs.record import Record
from src.system.redact import hide_in_settings, names_a_secret, redact

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
        ("postgresql://me:it's-X@h/db", "postgresql://***@h/db"),
        ('postgresql://me:it"s-X@h/db', "postgresql://***@h/db"),
        ("postgresql://me:two words@h/db", "postgresql://***@h/db"),
        ("postgresql://me:a@b/c@h/db, and so on", "postgresql://***@h/db, and so on"),
        ("http://127.0.0.1:5000 is away, write to a@example.org", None),
        ("mssql://h/db?UID=me&PWD=it's&x=1", "mssql://h/db?UID=me&PWD=***&x=1"),
        ("Server=h;Pwd=a'b;Database=c", "Server=h;Pwd=***;Database=c"),
        ("?sv=1&sig=ab%2Fc%3D&se=2", "?sv=1&sig=***&se=2"),
        ("AccountName=n;AccountKey=ab/c+==;X=1", "AccountName=n;AccountKey=***;X=1"),
        ("?X-Amz-Credential=AK/1&X-Amz-Signature=ef", "?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("pass=abc password='it is' password: x", "pass=*** password='***' password: ***"),
        ('{"password": "two words", "k": 4}', '{"password": "***", "k": 4}'),
        ("Authorization: Bearer ab.c", "Authorization: Bearer ***"),
        ("Authorization: Basic dXNlcg==", "Authorization: Basic ***"),
        ("compass=north design=3 max_tokens=5 token=3", None),
    ],
)
def test_nothing_but_secrets_goes(text, redacted):
    assert redact(text) == (redacted or text)


def test_a_secret_of_the_environment_is_found_anywhere(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")  # too short to be looked for in any text
    monkeypatch.setenv("EDITOR", "resnet18")
    assert redact("resnet18 short signed with wJalrXUtnFEMI") == "resnet18 short signed with ***"


SECRET = ("DB_PASS", "MYSQL_PWD", "AZURE_CONNECTION_STRING", "GITHUB_PAT", "PRIVATE_KEY", "DATABASE_URL", "OPENAI_KEY")


@pytest.mark.parametrize("name", SECRET)
def test_a_variable_is_known_by_its_name(monkeypatch, name):
    monkeypatch.setenv(name, "line one-1\nline two-2")
    assert redact("line one-1 line two-2, line two-2") == "***, ***"


@pytest.mark.parametrize("name", ["MAX_TOKENS", "TOKENIZERS_PARALLELISM", "PATH", "PWD", "OLDPWD", "HF_TOKEN_PATH"])
def test_a_variable_that_only_sounds_so_is_none(monkeypatch, name):
    """The value of a variable whose name only resembles that of a secret is not hidden."""
    monkeypatch.setenv(name, "cifar-131072")
    assert redact("queue_size was cifar-131072") == "queue_size was cifar-131072"


@pytest.mark.parametrize(
    "password", ["it's-Xhunter2", 'q"uo-Xhunter2', "two words-Xhunter2", "raw@x-Xhunter2", "a/b:c-Xhunter2"]
)
def test_the_password_of_the_tracking_uri_is_found_anywhere(monkeypatch, password):
    for uri in (f"postgresql://me:{password}@h/db", f"mssql://h/db?UID=me&PWD={password}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        said = [password, uri, repr(uri), json.dumps(uri), quote(password)]
        said += [password.rpartition("@")[2] + "@h"] if uri.count("@") > 1 else []
        for each in said:
            text = redact(f"no route to {each}, sorry")
            assert "hunter2" not in text, text
            assert text.startswith("no route to ")
            assert text.endswith(", sorry")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:131072@h/db")
    assert redact("queue_size was 131072") == "queue_size was 131072"


def test_a_long_text_takes_no_long_time():
    for part in ("a://", "://a:", "://a:b@ ", "password=", "password='", "a-", "@ ", "pass=a'", "authorization:", "\\"):
        started = time.process_time()
        redact(part * (200_000 // len(part)))
        assert time.process_time() < started + 5


def test_numbers_and_names_in_settings_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("MAX_TOKENS", "131072")
    monkeypatch.setenv("DB_PASS", "cifar100")
    settings = {"queue_size": 131072, "data": {"name": "cifar100", "options": {"max_token": 5, "password": "12345678"}}}
    assert hide_in_settings(settings) == settings
    secret = {"data": {"root": "s3://id:key@b", "options": {"hub_token": "abc", "of": ["http://a:b@c"]}}}
    hidden = {"data": {"root": "s3://***@b", "options": {"hub_token": "***", "of": ["http://***@c"]}}}
    assert hide_in_settings(secret) == hidden
    assert not names_a_secret("max_tokens")


def test_a_record_has_none(tmp_path):
    """A record holds no secret of its settings and tags."""
    record = Record.new("run", "exp")
    record.params = {"data.root": "s3://id:key-of-it@bucket/images"}
    record.tags = {"command": "src/train.py a.password=hush", "error": "ConnectionError: http://me:hush@host/ is away"}
    record.save(tmp_path)
    text = (tmp_path / "run.json").read_text()
    assert "hush" not in text
    assert "key-of-it" not in text
    assert json.loads(text)["params"] == record.params == {"data.root": "s3://***@bucket/images"}


def test_a_record_keeps_its_settings_whatever_the_secrets_are(tmp_path, monkeypatch):
    monkeypatch.setenv("DB_PASS", "cifar100")
    record = Record.new("run", "exp")
    record.params = {"data.name": "cifar100", "queue_size": "131072"}
    record.tags = {"config_hash": "cifar100", "command": "cifar100"}
    record.save(tmp_path)
    assert record.params == {"data.name": "cifar100", "queue_size": "131072"}
    assert record.tags == {"config_hash": "cifar100", "command": "***"}
