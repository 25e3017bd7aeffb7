"""The engine without the rest: adapters trained together, worn in one mixed batch, written as PEFT folders."""

from untether.clients.base_model import resolve
from untether.clients.engine import TrainSettings, generate, load, save_peft, train_adapters

base = load(resolve("embedded"), device="cpu")
words = {"ann": {"good": "great", "bad": "poor"}, "bea": {"good": "nice", "bad": "slow"}}
pairs = {name: [(f"How was the {thing}? It was {how}.", word) for thing in ("phone", "camera")
               for how, word in own.items()] for name, own in words.items()}  # fmt: skip
adapters = train_adapters(base, pairs, TrainSettings(learning_rate=1e-2, steps=30))
for name, adapter in adapters.items():
    save_peft(f"adapters/{name}", adapter, base)
rows = [(name, f"How was the camera? It was {how}.") for name in (*adapters, None) for how in ("good", "bad")]
for (name, prompt), answer in zip(rows, generate(base, adapters, rows, max_new_tokens=8), strict=True):
    print(name or "the base alone", prompt, answer, sep=" | ")
