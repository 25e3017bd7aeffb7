"""Any local causal language model as the cloud: Transformers, in batches, each row with a sampling stream of its own.

`transformers` samples from one global stream, so a row's text would depend on what else is in its batch. Here each row
adds Gumbel noise drawn from its own seed to its logits and takes the largest, which is sampling from the softmax
(Gumbel, 1954; Maddison et al., 2014, arXiv 1411.0030), so a request's answer depends on the batch by rounding only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from untether.server.generator import Completion, GenerationRequest, PromptTooLong, system_fingerprint
from untether.sim.core import limits
from untether.sim.prompts import chat_template
from untether.sim.prompts.checkpoint import context_length, read_checkpoint


class LocalModelGenerator:
    """A causal LM with its chat template, or without one: the messages, a paragraph each.

    Answers cannot be constrained to a schema (`structured` is False).

    Args:
        model: Name or path.
        device: Empty: a GPU if there is one.
        dtype: A torch name, or `auto`: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is several times slower
            unless the processor multiplies it.
        max_batch: Most requests of a batch.
        threads: Torch threads; 0 is torch's choice, within the cores of this process.
        template_args: Arguments of the template (`sim.prompts.chat_template`: no thinking and a fixed date by default).

    Raises:
        UserError: The model does not load.
    """

    name = "transformers"
    batched = True
    structured = False

    def __init__(
        self, model: str, *, device: str = "", dtype: str = "auto", max_batch: int = 8, threads: int = 0,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads or min(torch.get_num_threads(), limits.cores()))
        self.max_batch = max_batch
        self.model_id = Path(model).name if Path(model).exists() else model
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype if dtype != "auto" else "bfloat16" if self._device.startswith("cuda") else "float32"
        self._model, self._tokenizer, _ = read_checkpoint(model, "cloud.model", dtype, padding_side="left")
        self._model.to(self._device)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        self._ends = _end_tokens(self._model, self._tokenizer)
        # What a call leaves unsaid, generate() takes from here: nothing but what ends an answer is the model's to say.
        self._model.generation_config = GenerationConfig()
        self._context = context_length(self._model.config)
        weights = hashlib.blake2b(digest_size=16)
        for parameter in self._model.parameters():
            weights.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
        chat_template.tell(self._tokenizer, template_args or {})
        config = {name: value for name, value in self._model.config.to_dict().items() if name != "_name_or_path"}
        written = chat_template.fingerprint(self._tokenizer, self._ends)
        self.fingerprint = system_fingerprint(
            "transformers", 3, config, weights.hexdigest(), str(self._model.dtype), written
        )

    @torch.inference_mode()
    def generate(self, batch: Sequence[GenerationRequest]) -> list[Completion]:
        """Returns completions as `Generator.generate` does; token counts are the tokenizer's.

        Raises:
            PromptTooLong: A prompt leaves no space for an answer.
        """
        prompts = [chat_template.encode(self._tokenizer, _turns(request.messages), "\n\n") for request in batch]
        encoded = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding=True)
        encoded = {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}
        sizes = encoded["attention_mask"].sum(1).tolist()
        rooms = [min(request.max_tokens, self._context - size) for request, size in zip(batch, sizes, strict=True)]
        if min(rooms) < 1:
            raise PromptTooLong(f"this model's maximum context length is {self._context} tokens, not {max(sizes)}")
        settings = GenerationConfig(
            max_new_tokens=max(rooms),
            do_sample=False,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        sampler = LogitsProcessorList([_RowSampler(batch)])
        out = self._model.generate(**encoded, generation_config=settings, logits_processor=sampler)
        written = out[:, encoded["input_ids"].shape[1] :].tolist()
        return [self._completion(*row) for row in zip(written, rooms, sizes, strict=True)]

    def prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """Returns the text that the model continues."""
        written = chat_template.render(self._tokenizer, _turns(messages))
        return written if chat_template.template_of(self._tokenizer) else f"{written}\n\n"

    def _completion(self, row: list[int], room: int, tokens_in: int) -> Completion:
        end = next((i for i, token in enumerate(row) if token in self._ends), None)
        if end is not None and end < room:
            text = self._tokenizer.decode(row[:end], skip_special_tokens=True)
            return Completion(text, tokens_in, end + 1, "stop")
        row = row[:room]
        return Completion(self._tokenizer.decode(row, skip_special_tokens=True), tokens_in, len(row), "length")


class _RowSampler(LogitsProcessor):
    """Turns greedy decoding into sampling, row by row: temperature, nucleus, then Gumbel noise from the row's seed."""

    def __init__(self, batch: Sequence[GenerationRequest]) -> None:
        self._batch = batch
        self._streams = [torch.Generator().manual_seed(request.seed) for request in batch]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [rows, vocabulary] -> the same, perturbed; rows of temperature 0 stay greedy."""
        scores = scores.float().clone()
        for row, (request, stream) in enumerate(zip(self._batch, self._streams, strict=True)):
            if request.temperature <= 0:
                continue
            logits = scores[row] / request.temperature
            if request.top_p < 1:
                logits = _nucleus(logits, request.top_p)
            uniform = torch.rand(logits.shape, generator=stream, dtype=torch.float64).clamp_min(1e-300)
            scores[row] = logits - torch.log(-torch.log(uniform)).to(logits)
        return scores


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al., 2019)."""
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
    return logits.index_fill(0, order[before >= top_p], float("-inf"))


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a turn, by the model's generation config and its tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, chat_template.turn_end(tokenizer)}
    return {end for end in found if end is not None}


def _turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": str(m.get("role") or "user"), "content": _text(m.get("content"))} for m in messages]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
