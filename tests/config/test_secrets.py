import pytest

from src.config import identity
from src.errors import UsageError
from tests.composing import parsed

HF_TOKEN = "hf_abcdefgh12"


@pytest.mark.parametrize(
    "override",
    [
        "tracking.experiment='team-${oc.env:HF_TOKEN}'",
        "output_dir='out-${oc.env:HF_TOKEN,none}'",
        "data.root='${oc.env:HF_TOKEN}/x'",
        "init='${ oc.env : HF_TOKEN }'",
        "seed='${oc.decode:${oc.env:HF_TOKEN}}'",
        "output_dir='${oc.env:${data.name}}' data.name=HF_TOKEN",
        f"tracking.experiment=team-{HF_TOKEN}",
        f"output_dir=out/{HF_TOKEN}/run",
        f"+backbone.options={{key:[{HF_TOKEN}]}}",
    ],
)
def test_a_secret_of_the_environment_is_no_setting(monkeypatch, override):
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    with pytest.raises(UsageError, match="HF_TOKEN") as error:
        parsed(*override.split(" ") if " data" in override else [override])
    assert "looks secret" in str(error.value)
    assert HF_TOKEN not in str(error.value)


def test_other_variables_are_settings_as_before(monkeypatch):
    monkeypatch.setenv("USER_NAME", "somebody")
    monkeypatch.setenv("MAX_TOKENS", "131072")
    monkeypatch.setenv("DB_PASS", "cifar100")
    cfg = parsed("tracking.experiment='${oc.env:USER_NAME}'", "method=nnclr", "queue_size='${oc.env:MAX_TOKENS}'")
    assert (cfg.tracking.experiment, cfg.queue_size, cfg.data.name) == ("somebody", 131072, "cifar100")
    assert parsed("tracking.experiment='${oc.env:NOT_THERE,none}'").tracking.experiment == "none"
    with pytest.raises(UsageError, match="NOT_THERE"):
        parsed("tracking.experiment='${oc.env:NOT_THERE}'")


def test_what_was_hidden_keeps_no_run_from_going_on(tmp_path):
    """A setting that a record hides as ``***`` does not make a run's configuration another one."""
    cfg = parsed("+data.options={hub_token:abc}")
    saved = {key: str(value) for key, value in identity.flat(cfg).items()}
    identity.check_same(saved | {"data.options.hub_token": "***"}, cfg, tmp_path)
    identity.check_same(saved | {"k": "***"}, cfg, tmp_path, identity.config_hash(cfg))
    with pytest.raises(UsageError, match=r"hub_token was \*\*\* and is \*\*\*"):
        identity.check_same(saved | {"data.options.hub_token": "other"}, cfg, tmp_path)
