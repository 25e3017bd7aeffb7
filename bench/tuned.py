"""(b) The best that a careful user writes by hand with peft and transformers: one device after the other.

Model and encoder stay resident and one adapter's weights are swapped in place; the output head sees target tokens only;
AdamW is fused; batches are bucketed by length (the very batches that untether uses) and right-padded, so that no
attention mask is needed; a device's queries are decoded in one batch; its texts are embedded in one, in the dtype that
untether uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from bench.measure import Outcome
from bench.workload import Workload, encoder_path, filters
from untether.clients.engine.door.peft_format import peft_config
from untether.clients.engine.jobs import Example, TrainJob, batch_plan
from untether.clients.engine.kernels.gemm import fast_products
from untether.clients.filters import judge
from untether.clients.filters.embedding import Encoder
from untether.sim.core.learning import TrainSettings

_SCHEDULES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


class TunedLoop:
    """A resident peft model, on whatever device it is, that trains and answers for one user at a time."""

    def __init__(self, model: torch.nn.Module, job: TrainJob, end_id: int):
        self.model = peft.get_peft_model(model, peft_config(job.spec)).eval()
        self.causal = self.model.base_model.model
        self.weights = {
            name.replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.end_id = end_id

    def wear(self, state: dict[str, Tensor]) -> None:
        """Swap an adapter in."""
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(state[name])

    def train(self, job: TrainJob) -> tuple[dict[str, Tensor], list[float]]:
        """Train one device from job.state; returns (state, losses)."""
        self.wear(job.state)
        settings, plan = job.settings, batch_plan(job)
        weights = list(self.weights.values())
        optimizer = torch.optim.AdamW(
            weights, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        warmup, total = math.ceil(settings.warmup_ratio * len(plan)) + 1, len(plan) + 1  # as `TrainSettings.rate_at`
        schedule = _SCHEDULES[settings.schedule](optimizer, warmup, total)
        schedule.step()
        losses = []
        for indices in plan:
            batch = collate([job.examples[index] for index in indices])
            ids, positions, targets = (part.to(self.model.device) for part in batch)
            hidden = self.causal.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.causal.lm_head(hidden.flatten(0, 1)[positions])
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        state = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        return state, torch.stack(losses).tolist()

    def answer(
        self, state: dict[str, Tensor], prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to one device's queries, in one left-padded batch."""
        self.wear(state)
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.end_id, pad_token_id=0,
            )  # fmt: skip
        answers = out[:, width:].tolist()
        return [row[: row.index(self.end_id)] if self.end_id in row else row for row in answers]


class TunedEncoder:
    """sentence-transformers as its documentation shows it, resident, in a given dtype."""

    def __init__(self, dtype: str, device: str):
        from sentence_transformers import SentenceTransformer

        faster = {"attn_implementation": "eager"} if device == "cpu" else {}  # for texts as short as these
        options = {"dtype": getattr(torch, dtype), **faster}
        self.model = SentenceTransformer(encoder_path(), device=device, model_kwargs=options).eval()

    def encode(self, texts: Sequence[str], *, remember=None):
        """Unit vectors [texts, dim]."""
        with torch.inference_mode():
            vectors = self.model.encode(
                list(texts), batch_size=64, convert_to_tensor=True, show_progress_bar=False
            )  # fmt: skip
        return F.normalize(vectors.float(), dim=1).cpu().numpy()


def run(workload: Workload, indices: Sequence[int]) -> Outcome:
    """Filter, train and answer for the devices of one process, one after the other."""
    devices = workload.load(list(indices))
    model = workload.plain_model()
    loop, encoder = (
        TunedLoop(model, devices[0].job, model.config.eos_token_id),
        TunedEncoder(Encoder(dtype=workload.encoder, device=workload.device).dtype, workload.device),
    )
    first = devices[0].job
    loop.train(TrainJob(0, first.examples, TrainSettings(steps=1), first.spec, state=first.state))
    encoder.encode(["one text", "another text"])
    outcome = Outcome()
    for device in devices:
        with outcome.stage("embed"):
            judged = judge({0: device.written}, {0: device.real}, filters(), encoder)[0]
        with outcome.stage("train"):
            state, losses = loop.train(device.job)
        with outcome.stage("decode"):
            answers = loop.answer(state, device.prompts, workload.max_new_tokens)
        outcome.verdicts[device.index] = [item.verdict for item in judged]
        outcome.losses[device.index], outcome.answers[device.index] = losses, answers
    return outcome


def run_fast(workload: Workload, indices: Sequence[int]) -> Outcome:
    """The same with untether's choice of the library for products: what of the lead is that choice alone."""
    with fast_products():
        return run(workload, indices)


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """(right-padded ids, flattened places that predict a target, targets)."""
    rows = [[*example.prompt_ids, *example.target_ids[:-1]] for example in examples]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    places, targets = [], []
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        places += range(index * width + len(row) - len(example.target_ids), index * width + len(row))
        targets += example.target_ids
    return ids, torch.tensor(places), torch.tensor(targets)
