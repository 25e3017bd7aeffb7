"""(a) A Flower app as Flower's own LLM examples write it: one SuperNode a device, everything made anew in every call.

The train call loads model, tokenizer and encoder, wraps the model with peft, trains with transformers' Trainer, and
answers query by query with `generate`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.measure import Outcome
from bench.workload import DeviceData, Workload, encoder_path, filters
from untether.clients.engine.door.peft_format import peft_config


def run(workload: Workload, workers: int) -> Outcome:
    """All devices, on Flower's simulation runtime with one actor a core. The wall is that of the whole round."""
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    outcome = Outcome()
    server = ServerApp()

    @server.main()
    def main(grid, context) -> None:
        while len(list(grid.get_node_ids())) < workload.devices:
            time.sleep(0.1)
        messages = [
            Message(RecordDict({"order": ConfigRecord({})}), dst_node_id=node, message_type="train")
            for node in grid.get_node_ids()
        ]
        start = time.perf_counter()
        replies = list(grid.send_and_receive(messages))
        outcome.wall_s["round"] = time.perf_counter() - start
        for reply in replies:
            found = json.loads(reply.content["result"]["json"])
            outcome.join(Outcome(
                cpu_s=found["cpu_s"],
                losses={found["index"]: found["losses"]},
                answers={found["index"]: found["answers"]},
                verdicts={found["index"]: found["verdicts"]},
            ))  # fmt: skip

    with TemporaryDirectory() as folder:
        run_simulation(
            server, _client_app(workload, Path(folder)), num_supernodes=workload.devices,
            backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": workers}},
        )  # fmt: skip
    return outcome


def _client_app(workload: Workload, folder: Path):
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        device = workload.load([int(context.node_config["partition-id"])])[0]
        found = one_device(workload, device, folder)
        return Message(RecordDict({"result": ConfigRecord({"json": json.dumps(found)})}), reply_to=message)

    return app


def one_device(workload: Workload, device: DeviceData, folder: Path) -> dict:
    """Everything for one device, from nothing. CPU seconds a stage; the answers; the losses that Trainer logs."""
    import peft
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    from untether.clients.filters import judge

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    cpu_s, last = {}, time.process_time()

    def lap(stage: str) -> None:
        nonlocal last
        cpu_s[stage] = time.process_time() - last
        last = time.process_time()

    class Plain:
        def encode(self, texts: Sequence[str], *, remember=None):
            return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)

    model = SentenceTransformer(encoder_path(), device="cpu")
    judged = judge({0: device.written}, {0: device.real}, filters(), Plain())[0]
    lap("embed")

    tokenizer = transformers.AutoTokenizer.from_pretrained(workload.model)
    causal = peft.get_peft_model(workload.plain_model(), peft_config(workload.spec))
    peft.set_peft_model_state_dict(causal, device.job.state)
    settings = device.job.settings
    warmup = math.ceil(settings.warmup_ratio * device.job.total_steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / str(device.index)), max_steps=device.job.total_steps, report_to=[], save_strategy="no",
        per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule, warmup_steps=warmup, weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm, logging_steps=1, use_cpu=True, disable_tqdm=True, seed=device.index,
    )  # fmt: skip
    rows = []
    for example in device.job.examples:
        ids = [*example.prompt_ids, *example.target_ids]
        labels = [-100] * len(example.prompt_ids) + list(example.target_ids)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    trainer = transformers.Trainer(
        causal, arguments, train_dataset=rows, data_collator=transformers.DataCollatorForSeq2Seq(tokenizer)
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    lap("train")

    causal.eval()
    answers = []
    for prompt in device.prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = causal.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=workload.max_new_tokens,
                do_sample=False,
            )[0, len(prompt) :].tolist()
        end = causal.config.eos_token_id
        answers.append(out[: out.index(end)] if end in out else out)
    lap("decode")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "index": device.index, "cpu_s": cpu_s, "answers": answers, "losses": losses,
        "verdicts": [item.verdict for item in judged],
    }  # fmt: skip
