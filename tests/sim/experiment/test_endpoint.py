"""What a file from elsewhere may say of a cloud's address and key."""

from __future__ import annotations

import pytest

from untether.sim.core.errors import UserError
from untether.sim.experiment import Experiment
from untether.sim.experiment.endpoint import check_address, check_url, without_credentials
from untether.sim.launch.runtime import key_goes_to

CLOUD = 'provider = "openai"\nmodel = "m"\nbase_url = "https://api.example.com/v1"\n'


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "API_KEY", "GROQ_API_KEY", "HF_TOKEN", "UNTETHER_TEST_KEY", ""]
)
def test_variables_for_keys_can_be_named(tmp_path, name):
    file = tmp_path / "mine.toml"
    file.write_text(f'[cloud]\n{CLOUD}api_key_env = "{name}"\n')
    assert Experiment.read(file).cloud.api_key_env == name


@pytest.mark.parametrize("name", ["PATH", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_URL", "api_key"])
def test_other_variables_of_this_machine_cannot(tmp_path, name):
    file = tmp_path / "theirs.toml"
    file.write_text(f'[cloud]\n{CLOUD}api_key_env = "{name}"\n')
    with pytest.raises(UserError, match=f"{name} is no name for an endpoint's key"):
        Experiment.read(file)


@pytest.mark.parametrize(
    "url",
    ["https://me:hunter7@api.example.com/v1", "https://hunter7@api.example.com", "https://api.example.com/v1?api_key=hunter7"],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="cloud.api_key_env") as caught:
        Experiment.read(None, {"cloud.provider": "openai", "cloud.model": "m", "cloud.base_url": url})
    assert "hunter7" not in str(caught.value) and "api.example.com" in str(caught.value)
    assert "hunter7" not in without_credentials(url)


def test_an_address_may_have_a_version_in_its_query():
    url = "https://mine.example.com/openai/v1?api-version=2026-01-01"
    assert check_url(url) == url


@pytest.mark.parametrize("url", ["", "api.example.com/v1", "ftp://api.example.com", "https://", "https://h:99999/v1"])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="is no address"):
        check_address(url, "API_KEY", "")


def test_a_run_says_where_a_key_goes(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter7")
    values = {"cloud.provider": "openai", "cloud.model": "m", "cloud.base_url": "https://api.example.com/v1",
              "cloud.api_key_env": "MY_API_KEY"}  # fmt: skip
    said = key_goes_to(Experiment.read(None, values))
    assert "MY_API_KEY" in said and "https://api.example.com/v1" in said and "hunter7" not in said
    monkeypatch.delenv("MY_API_KEY")
    assert key_goes_to(Experiment.read(None, values)) == "" == key_goes_to(Experiment())


def test_a_setting_that_is_no_text_is_a_mistake_of_its_own():
    with pytest.raises(UserError, match="no UTF-8"):
        Experiment.read(None, {"cloud.model": "m\udcff"})


def test_a_setting_nested_without_end_is_a_mistake_of_its_own():
    with pytest.raises(UserError, match="population.users"):
        Experiment.read(None, {"population.users": "[" * 5000})
