from pathlib import Path

import pytest

from untether.sim.core.errors import UserError
from untether.sim.experiment.models.catalogue import catalogue, gguf_in, known, models_folder
from untether.sim.experiment.sections import Training

MINE = """
[mine]
title = "Mine"
licence = "MIT"
parameters = 10
bytes = 4
sha256 = "{hash}"
wheels = [["mine==1", "{hash}"]]
""".replace("{hash}", "0" * 64)


def test_every_built_in_model_says_what_its_user_must_know():
    found = catalogue()
    assert "smollm2-135m" in found
    for model in found.values():
        assert model.licence and model.title and model.roles
        Training.model_validate(model.training)
        assert len({wheel for wheel, _ in model.wheels}) == len(model.wheels)
        assert all("==" in requirement and len(digest) == 64 for requirement, digest in model.wheels)


def test_a_file_of_ones_own_adds_models(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(MINE)
    monkeypatch.setenv("UNTETHER_MODELS", str(tmp_path / "mine.toml"))
    monkeypatch.setenv("UNTETHER_CACHE", str(tmp_path))
    assert known("mine").gguf == tmp_path / "models" / "mine.gguf" == models_folder() / "mine.gguf"
    assert "smollm2-135m" in catalogue()


@pytest.mark.parametrize(("text", "says"), [
    (MINE.replace("[mine]", "[smollm2-135m]"), "there is a model `smollm2-135m` already"),
    (MINE.replace('licence = "MIT"\n', ""), "[mine]: licence: Field required"),
    (MINE.replace("parameters", "parametres"), "[mine]: parame"),
    ("mine = 3", "[mine]"),
    ("[mine", "is no catalogue of models"),
])  # fmt: skip
def test_a_file_that_is_none_is_refused_with_its_place(tmp_path, monkeypatch, text, says):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    monkeypatch.setenv("UNTETHER_MODELS", str(file))
    with pytest.raises(UserError) as refused:
        catalogue()
    assert str(file) in str(refused.value) and says in str(refused.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="Did you mean `smollm2-135m`"):
        known("smollm2-135")


def test_what_a_path_means(tmp_path):
    file = tmp_path / "a.gguf"
    file.touch()
    assert gguf_in(file) == file and gguf_in(tmp_path) == file
    assert gguf_in(Path("Qwen/Qwen2.5-0.5B")) is None
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match="a.gguf, b.gguf"):
        gguf_in(tmp_path)
    (tmp_path / "config.json").touch()
    assert gguf_in(tmp_path) is None
