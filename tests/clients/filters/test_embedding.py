"""The encoder against sentence-transformers itself and its published example; memory, company, and bad names."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from untether.clients.filters.embedding import DEFAULT_ENCODER, Encoder, locate
from untether.sim.core.errors import UserError

TEXTS = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "",
    "GOP Rival Says Tammy Baldwin Is On ‘Team Terrorists’",
    "word " * 400,
    "ok",
    "@friend haha. no sorry i wasn't on twitter for abit. yaa i love soaps 🙂",
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(dtype="float32", device="cpu", remembered_texts=0)


def test_published_similarities(encoder):
    """The quick start of sbert.net prints these cosines for all-MiniLM-L6-v2 and these three sentences."""
    vectors = encoder.encode(TEXTS[:3])
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)


def test_equals_sentence_transformers(encoder):
    oracle = SentenceTransformer(locate(DEFAULT_ENCODER), device="cpu")
    expected = oracle.encode(TEXTS, batch_size=1, normalize_embeddings=True, show_progress_bar=False)
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), encoder.dim) == (len(TEXTS), 384)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_texts_vector_does_not_depend_on_its_company(encoder):
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1])[::-1], together, atol=1e-6)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)
    small_batches = Encoder(dtype="float32", device="cpu", batch_size=3)
    np.testing.assert_allclose(small_batches.encode(TEXTS), together, atol=1e-6)


def test_bfloat16_moves_a_cosine_by_less_than_a_hundredth(encoder):
    half = Encoder(dtype="bfloat16", device="cpu", batch_size=4)
    texts = [*TEXTS[:5], "word " * 60, *TEXTS[6:]]
    exact, rounded = encoder.encode(texts), half.encode(texts)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rounded @ rounded.T, exact @ exact.T, atol=0.01)
    assert half.fingerprint != encoder.fingerprint


def test_in_bfloat16_a_texts_vector_has_the_same_bits_in_any_company():
    half = Encoder(dtype="bfloat16", device="cpu", batch_size=4, remembered_texts=0)
    many = [*TEXTS[:5], *(f"a text about {word} and {word * 3}" for word in "abc"), "long " * 60]
    together = half.encode(many)
    np.testing.assert_array_equal(half.encode(many[::-1])[::-1], together)
    np.testing.assert_array_equal(np.concatenate([half.encode([text]) for text in many]), together)


def test_fingerprint_is_the_models_own(encoder):
    assert Encoder(dtype="float32", device="cpu").fingerprint == encoder.fingerprint
    again = Encoder(locate(DEFAULT_ENCODER), dtype="float32", device="cpu")
    assert again.fingerprint == encoder.fingerprint


def test_each_distinct_text_is_embedded_once(encoder):
    seen = []
    vectors = encoder.encode(["a", "b", "a", "a"], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 2)]
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[0], vectors[3])


def test_remembered_texts_are_not_embedded_again():
    encoder = Encoder(dtype="float32", device="cpu", remembered_texts=2)

    def embedded(*texts: str, **options) -> int:
        totals = [0]
        encoder.encode(texts, progress=lambda done, total: totals.append(total), **options)
        return totals[-1]

    first = encoder.encode(["real one", "real two", "candidate"], remember={"real one", "real two"})
    assert embedded("real one", "real two") == 0
    assert embedded("candidate", remember=()) == 1
    again = encoder.encode(["candidate", "real two", "real one"], remember=())
    np.testing.assert_allclose(again, first[[2, 1, 0]], atol=1e-6)
    assert embedded("real one") == 0
    assert embedded("new", "real one") == 1  # the bound is two: "real two" was asked for longest ago
    assert embedded("real two") == 1


def test_no_texts(encoder):
    assert encoder.encode([]).shape == (0, 384)


def test_bad_names_are_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such folder.*all-MiniLM-L6-v2"):
        Encoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="filters.encoder.*cannot be loaded"):
        Encoder(str(tmp_path))
    with pytest.raises(UserError, match="float64.*float32, bfloat16"):
        Encoder(dtype="float64")


def test_a_folder_is_a_model(encoder, tmp_path):
    encoder._model.save(str(tmp_path / "copy"))
    copy = Encoder(str(tmp_path / "copy"), dtype="float32", device="cpu")
    np.testing.assert_allclose(copy.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)


def test_vectors_that_another_run_kept_are_not_made_again(tmp_path, monkeypatch):
    first = Encoder(dtype="float32", device="cpu", folder=str(tmp_path))
    made = first.encode(TEXTS[:4], remember=TEXTS[:1])
    second = Encoder(dtype="float32", device="cpu", folder=str(tmp_path))
    embedded = []
    forward = second._forward
    monkeypatch.setattr(second, "_forward", lambda texts: embedded.extend(texts) or forward(texts))
    again = second.encode([TEXTS[5], *TEXTS[:4]])
    assert [text for text in embedded if text] == [TEXTS[5]], "candidates are kept for other runs, remembered or not"
    np.testing.assert_array_equal(again[1:], made)
    other = Encoder(dtype="bfloat16", device="cpu", folder=str(tmp_path))
    assert other._store.get(TEXTS) == {}, "another dtype makes other vectors"


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "embeddings.sqlite").write_text("something else, " * 100)
    with pytest.raises(UserError, match="engine.cache: .*embeddings.sqlite"):
        Encoder(dtype="float32", device="cpu", folder=str(tmp_path))


@pytest.mark.parametrize(
    "change", [{"truncate_dim": 128}, {"prompts": {"own": "query: "}, "default_prompt_name": "own"}]
)
def test_a_model_with_a_prompt_or_a_shorter_vector_means_the_same_in_bfloat16(change):
    texts = TEXTS[:4]
    oracle = SentenceTransformer(locate(DEFAULT_ENCODER), device="cpu")
    encoder = Encoder(dtype="bfloat16", device="cpu", remembered_texts=0)
    plain = encoder.fingerprint
    for name, value in change.items():
        setattr(oracle, name, value)
        setattr(encoder._model, name, value)
    for kept in ("fingerprint", "_is_plain"):
        encoder.__dict__.pop(kept, None)
    expected = oracle.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    vectors = encoder.encode(texts)
    assert vectors.shape == expected.shape and encoder.fingerprint != plain
    assert (vectors * expected).sum(1).min() > 0.99 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_an_encoder_that_lacks_weights_is_refused(tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(locate(DEFAULT_ENCODER), folder)
    file = folder / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "layer.3.attention.self.query" not in name}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"encoder.*2 of its weights are not in the folder \(encoder.layer.3"):
        Encoder(str(folder), dtype="float32", device="cpu")
