"""Pretraining of the embedded on-device model: what `untether model pretrain` runs.

The model learns the six tasks and the average preferences of the world's pretraining users, and no single user. The
loss is on the answers, and on a thin sample of the prompts' tokens, which teaches it how words go together.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untether.clients.base_model.card import model_card
from untether.clients.base_model.corpus import Batch, Encoded, batches, build_tokenizer, documents, encode
from untether.sim.core.errors import UserError
from untether.sim.core.seeding import derive, generator


@dataclass(frozen=True)
class Recipe:
    """All settings that the weights follow from (apart from floating-point rounding)."""

    seed: int = 0
    steps: int = 5440
    batch_tokens: int = 2048
    accumulate: int = 2
    learning_rate: float = 3e-3
    matrix_rate: float = 6e-3
    warmup: int = 100
    weight_decay: float = 0.05
    prompt_share: float = 0.05
    prompt_weight: float = 0.1
    vocabulary: int = 5120
    hidden: int = 160
    layers: int = 5
    heads: int = 5
    feed_forward: int = 416
    context: int = 2048


def pretrain(
    out: Path,
    seed: int = 1,
    minutes: float = 0.0,
    *,
    recipe: Recipe | None = None,
    processes: int = 2,
    save_every: int = 250,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains the embedded model on the CPU and writes it as a Hugging Face folder.

    Resumes from `out/resume` if that holds a state of the same recipe.

    Args:
        out: The folder to write.
        seed: Of everything random; the recipe's seed where one is given.
        minutes: Bound on the wall time of the training, earlier runs into the same folder included; 0 is none. With a
            bound, the learning rate follows the clock where that is ahead of the steps, so the weights depend on the
            machine's speed.
        recipe: The settings of the training; by default those of the committed model.
        processes: Processes that each compute a share of every step's batches on one thread, which is far faster than
            one process with as many threads on a model this small. Changes nothing but rounding. Must divide
            `recipe.accumulate`.
        save_every: Steps between two saved states.
        say: Called with each line of progress.

    Returns:
        `out`.
    """
    out, recipe = Path(out), recipe or Recipe(seed=seed)
    if recipe.accumulate % processes:
        raise UserError(f"processes = {processes} must divide the {recipe.accumulate} batches of a step")
    out.mkdir(parents=True, exist_ok=True)
    _tokenizer(out, recipe)
    if processes == 1:
        _train(0, 1, out, recipe, minutes, save_every, say)
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, out, recipe, minutes, save_every, say, f"{folder}/meeting")
            torch.multiprocessing.start_processes(_train_together, arguments, processes, start_method="spawn")
    return out


def _train_together(rank: int, processes: int, out, recipe, minutes, save_every, say, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=processes)
    _train(rank, processes, out, recipe, minutes, save_every, say)
    torch.distributed.destroy_process_group()


def _train(rank: int, processes: int, out: Path, recipe: Recipe, minutes: float, save_every: int, say) -> None:
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    torch.manual_seed(derive(recipe.seed, "weights"))
    model = LlamaForCausalLM(_config(recipe, tokenizer))
    optimizers = _optimizers(model, recipe)
    step, before_s = _resume(out / "resume", recipe, model, optimizers)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    stream = _stream(recipe, tokenizer, step * recipe.accumulate)
    limit_s = 60 * minutes or math.inf
    begun, first, seen, window = time.perf_counter(), step, 0, []
    while step < recipe.steps:
        spent_s = _agree(before_s + time.perf_counter() - begun, processes)
        way = max(step / recipe.steps, spent_s / limit_s)
        if way >= 1:
            break
        for group, peak in groups:
            group["lr"] = peak * _schedule(recipe, step, way)
        for micro, batch in enumerate(itertools.islice(stream, recipe.accumulate)):
            seen += int(batch.lengths.sum())
            if micro % processes == rank:
                loss, answer_loss = _loss(model, batch, recipe, step)
                (loss / recipe.accumulate).backward()
                window.append(answer_loss)
        _sum_gradients(model, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        now_s = time.perf_counter() - begun
        if rank == 0 and step % 50 == 0:
            left_s = min(now_s / (step - first) * (recipe.steps - step), limit_s - before_s - now_s)
            say(
                f"step {step}/{recipe.steps}  loss {sum(window) / len(window):.4f}  "
                f"{seen / now_s:,.0f} tokens/s  {left_s / 60:.1f} min left"
            )
            window.clear()
        if rank == 0 and step % save_every == 0:
            _save(out / "resume", recipe, model, optimizers, step, before_s + now_s)
    if rank == 0:
        facts = {
            "steps": step,
            "minutes": round((before_s + time.perf_counter() - begun) / 60, 1),
            "hardware": f"CPU, {processes} process(es) of one thread, torch {torch.__version__}",
            "held_out_loss": {t: round(x, 4) for t, x in held_out_loss(model, tokenizer, recipe.seed).items()},
        }
        _finish(out, recipe, model, facts)


def _agree(value: float, processes: int) -> float:
    """The first process's value, so that all end at the same step."""
    shared = torch.tensor([value], dtype=torch.float64)
    if processes > 1:
        torch.distributed.broadcast(shared, 0)
    return shared.item()


def _sum_gradients(model: torch.nn.Module, processes: int) -> None:
    if processes == 1:
        return
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.reshape(-1) for g in grads])
    torch.distributed.all_reduce(flat)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


@torch.no_grad()
def held_out_loss(model, tokenizer, seed: int, users: int = 64) -> dict[str, float]:
    """Returns the mean loss a token of the answers to validation users' plain queries, by task."""
    found = [d for d in encode(tokenizer, documents(seed, 0, "validation", users)) if len(d.ids) < 400]
    by_task: dict[str, list[Encoded]] = defaultdict(list)
    for document in found:
        by_task[document.task].append(document)
    losses = {}
    for task, rows in sorted(by_task.items()):
        total = count = 0.0
        for batch in batches(rows, 8192, generator(seed, "held out")):
            ids, target = torch.from_numpy(batch.ids), torch.from_numpy(batch.is_answer)
            logits = model(input_ids=ids).logits[:, :-1][target[:, 1:]]
            total += cross_entropy(logits.float(), ids[:, 1:][target[:, 1:]], reduction="sum").item()
            count += target.sum().item()
        losses[task] = total / count
    return losses


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    # On a CPU the fused attention's bfloat16 backward pass is several times slower than plain matrix products.
    return LlamaConfig(
        attn_implementation="eager",
        use_cache=False,
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(out: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer that lies in `out`, if it has the recipe's size; else a new one."""
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
        if len(tokenizer) == recipe.vocabulary:
            return tokenizer
    tokenizer = build_tokenizer(recipe.seed, recipe.vocabulary)
    tokenizer.save_pretrained(out)
    return tokenizer


def _optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (it needs far fewer tokens than AdamW here), AdamW for embedding and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    decay = {"weight_decay": recipe.weight_decay}
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, adjust_lr_fn="match_rms_adamw", **decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True, weight_decay=0.0),
    ]


def _schedule(recipe: Recipe, step: int, way: float) -> float:
    """Share of the peak rate: warm-up, then half a cosine over the whole `way` from 0 to 1."""
    return min(1.0, (step + 1) / recipe.warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * way)) / 2)


def _stream(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, skip: int) -> Iterator[Batch]:
    """Batches without end; the first `skip` are passed over (they follow from the seed, so a resumed run agrees)."""
    chunk = 0
    while True:
        found = encode(tokenizer, documents(recipe.seed, chunk))
        for batch in batches(found, recipe.batch_tokens, generator(recipe.seed, "batches", chunk)):
            if skip:
                skip -= 1
                continue
            yield batch
        chunk += 1


def _loss(model, batch: Batch, recipe: Recipe, step: int) -> tuple[torch.Tensor, float]:
    """Loss of the answers plus a little of the prompts; the head sees only the positions that are scored."""
    ids, answer = torch.from_numpy(batch.ids), torch.from_numpy(batch.is_answer)[:, 1:]
    chance = torch.Generator().manual_seed(derive(recipe.seed, "prompt tokens", step))
    inside = torch.arange(ids.shape[1] - 1)[None] < torch.from_numpy(batch.lengths - 1)[:, None]
    drawn = (torch.rand(inside.shape, generator=chance) < recipe.prompt_share) & inside
    scored = answer | drawn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[scored]
        losses = cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][scored], reduction="none")
    is_answer = answer[scored]
    answers = losses[is_answer].mean()
    prompts = losses[~is_answer].mean() if (~is_answer).any() else answers * 0
    return answers + recipe.prompt_weight * prompts, answers.item()


def _save(folder: Path, recipe: Recipe, model, optimizers, step: int, seconds: float) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in moments.items()}
    save_file(tensors, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps({"recipe": asdict(recipe), "step": step, "seconds": seconds}))


def _resume(folder: Path, recipe: Recipe, model, optimizers) -> tuple[int, float]:
    """Steps done and seconds spent so far; the model and the optimizer are restored in place."""
    if not (folder / "state.json").exists():
        return 0, 0.0
    state = json.loads((folder / "state.json").read_text())
    if state.pop("recipe") != asdict(recipe):
        return 0, 0.0
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, strict=False)
    for number, optimizer in enumerate(optimizers):
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                _, _, index, name = key.split(".")
                moments[int(index)][name] = value
        optimizer.load_state_dict({"state": dict(moments), "param_groups": optimizer.state_dict()["param_groups"]})
    return state["step"], state["seconds"]


def _finish(out: Path, recipe: Recipe, model, facts: dict) -> None:
    """The final weights and their card; the state to resume from is no longer needed."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    parameters = sum(p.numel() for p in model.parameters())
    (out / "MODEL_CARD.md").write_text(model_card(recipe, facts, parameters, digest), encoding="utf-8")
    shutil.rmtree(out / "resume", ignore_errors=True)
