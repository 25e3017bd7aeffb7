"""The model card: what the embedded model is, where it comes from and what it must not be used for."""

from __future__ import annotations

from typing import Any

_CARD = """# The embedded on-device model

A small Llama ({parameters:,} parameters, bfloat16, context {context}) with a byte-level BPE tokenizer of
{vocabulary} tokens, trained from scratch on the embedded world of `sim.population.world`. It knows the six tasks
(LaMP-1, 2, 3, 4, 5 and 7 as the world tells them) and the average taste of the world's pretraining users; it knows no
user, and it was never shown the archetypes that validation and evaluation users come from. It is a measuring
instrument for the simulator, not a language model for any other text.

| | |
|---|---|
| data | world users of the split `pretraining`, data seed {seed}; no real data, no other model's output |
| steps | {steps} of {tokens:,} tokens (rows of like length, about 2% padding) |
| optimizer | Muon (matrices, peak {matrix_rate:g}) and AdamW (the rest, peak {learning_rate:g}); half a cosine |
| loss | mean over the answers' tokens, plus {prompt_weight:g} of that over {prompt_share:.0%} of the prompts' |
| hardware | {hardware} |
| minutes | {minutes} |
| sha256 of `model.safetensors` | `{sha256}` |

Held-out loss (nats a token of the answer, users and archetypes of the split `validation`, nothing of the user in the
prompt; it cannot reach zero, for taste is not in the prompt):

| task | loss |
|---|---|
{losses}

Retrain it with

    untether model pretrain OUT --seed {seed}

The run is resumable. {schedule}
"""


_BY_STEP = "Its weights agree with these up to floating-point rounding."
_BY_CLOCK = (
    "These weights come from a run bounded by `--minutes`, whose learning rate fell with the clock; a run of as many\n"
    "steps follows the same schedule up to the evenness of that machine's speed."
)


def model_card(recipe: Any, facts: dict[str, Any], parameters: int, sha256: str) -> str:
    """Returns the model card as Markdown.

    Args:
        recipe: The `Recipe` that the model was trained by.
        facts: What the training reported.
        parameters: The number of the model's weights.
        sha256: Of the file of weights.
    """
    return _CARD.format(
        parameters=parameters,
        context=recipe.context,
        vocabulary=recipe.vocabulary,
        seed=recipe.seed,
        steps=facts["steps"],
        tokens=recipe.batch_tokens * recipe.accumulate,
        matrix_rate=recipe.matrix_rate,
        learning_rate=recipe.learning_rate,
        prompt_weight=recipe.prompt_weight,
        prompt_share=recipe.prompt_share,
        schedule=_BY_CLOCK if facts["steps"] < recipe.steps else _BY_STEP,
        hardware=facts["hardware"],
        minutes=facts["minutes"],
        sha256=sha256,
        losses="\n".join(f"| {task} | {loss} |" for task, loss in facts["held_out_loss"].items()),
    )
