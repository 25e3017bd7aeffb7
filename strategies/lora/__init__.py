"""One strategy a file: what is shared of LoRA adapters, and how it is aggregated."""
