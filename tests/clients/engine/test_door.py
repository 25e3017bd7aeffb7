"""What comes in as a model: real tiny checkpoints, whole and damaged in the ways that people's are."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.clients.tiny_engine import END, PAD, tiny_model
from untether.clients.base_model import FOLDER
from untether.clients.engine.adapters import AdapterStack
from untether.clients.engine.base import FrozenBase
from untether.clients.engine.door.peft_format import load_peft
from untether.clients.engine.encoding import decode_answer, encode_answer, encode_prompt
from untether.clients.engine.generation import GenerationRow, generate
from untether.clients.engine.jobs import Example, TrainJob
from untether.clients.engine.memory import activation_bytes_per_token
from untether.clients.engine.training import train
from untether.clients.stores.export import merging_loses
from untether.sim.core.errors import UserError
from untether.sim.core.learning import LoraSpec, TrainSettings

torch.set_num_threads(1)
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
)  # fmt: skip


def config(kind: str, vocabulary: int):
    sizes = {**SIZES, "vocab_size": vocabulary}
    if kind == "opt":
        return tf.OPTConfig(
            vocab_size=vocabulary, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, word_embed_proj_dim=16, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
    if kind == "lfm2":
        return tf.Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_ff_dim=48, block_multiple_of=16)
    if kind == "mixtral":
        return tf.MixtralConfig(**sizes, num_local_experts=4)
    if kind == "mamba":
        return tf.MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8)
    if kind == "falcon":
        return tf.FalconConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=END,
            eos_token_id=END,
        )  # fmt: skip
    return tf.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(kind) is a fresh copy of a tiny model's folder."""
    made = tmp_path_factory.mktemp("models")
    tokenizer = tf.AutoTokenizer.from_pretrained(FOLDER)

    def copy(kind: str = "llama"):
        whole = made / kind
        if not whole.exists():
            torch.manual_seed(3)
            model = tf.AutoModelForCausalLM.from_config(config(kind, len(tokenizer)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
        number = len(list(made.iterdir()))
        return shutil.copytree(whole, made / f"{kind}-{number}")

    return copy


def load(folder) -> FrozenBase:
    return FrozenBase.load(str(folder), "float32", "cpu")


def edit(folder, file="config.json", **fields) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def reweigh(folder, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


# --- architectures --------------------------------------------------------------------------------------------

TEXTS = ("Short one", "A longer text about ferries and the council that pays for them in the year of the flood", "Mid")


@pytest.mark.parametrize("kind", ["opt", "lfm2", "mixtral", "falcon"])
def test_rows_of_unequal_length_answer_as_each_alone_in_peft(checkpoint, kind):
    """The oracle is the model's own `generate`, with PEFT's adapter and without."""
    folder = checkpoint(kind)
    base = load(folder)
    targets = ("q_proj", "v_proj") if kind != "falcon" else "all-linear"
    if kind == "opt":
        targets = ("q_proj", "fc1", "fc2")  # fc1 and fc2 see all rows of a batch end to end
    spec = LoraSpec(rank=2, alpha=8, target_modules=targets)
    prompts = [encode_prompt(base.tokenizer, text) for text in TEXTS]
    examples = [Example(prompt, encode_answer(base.tokenizer, "a headline")) for prompt in prompts]
    settings = TrainSettings(1e-2, steps=2, batch_size=3)
    state = train(base, [TrainJob(0, examples, settings, spec, seed=1, init_seed=1)])[0].state
    stack = AdapterStack.of_states(base, [spec], [state])
    rows = [GenerationRow(prompt, adapter) for prompt in prompts for adapter in (0, None)]
    found = generate(base, stack, rows, max_new_tokens=5)

    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stack.save_peft(0, folder / "adapter")
    worn = peft.PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder / "adapter"
    ).eval()
    for row, tokens in zip(rows, found, strict=True):
        ids = torch.tensor([row.prompt_ids])
        model = worn if row.adapter == 0 else plain
        told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        expected = told[0, ids.shape[1] :].tolist()
        assert tokens == expected[: len(tokens)] and (len(tokens) == 5 or expected[len(tokens)] in base.end_ids)


def test_a_model_that_keeps_only_a_state_is_refused_when_it_loads(checkpoint):
    with pytest.raises(UserError, match="a MambaForCausalLM .*Give (a|another) model"):
        load(checkpoint("mamba"))


def test_a_mixture_of_experts_is_told_which_layers_can_be_adapted(checkpoint):
    base = load(checkpoint("mixtral"))
    with pytest.raises(UserError, match=r'lora.target_modules = \["q_proj", "k_proj", "v_proj", "o_proj"\]'):
        AdapterStack(base, [LoraSpec(rank=2, target_modules="all-linear")])


REGROUPED = {
    "rows in another order": (lambda plain, x: plain(x.flip(0)).flip(0), "answers otherwise in a batch than alone"),
    "rows as one": (lambda plain, x: plain(x.flatten(0, 1)[None]).view_as(x), "regroups tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("way", "said"), REGROUPED.values(), ids=REGROUPED)
def test_layers_that_see_a_batch_otherwise_get_no_adapters(way, said):
    """Without adapters such a model answers as it should, and so do adapters on its other layers."""
    base = FrozenBase(tiny_model("llama", torch.float32), lean=False)
    mlp = base.model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: way(plain, x)
    with pytest.raises(UserError, match=f"'all-linear' cannot be adapted here.*{said}.*q_proj"):
        AdapterStack(base, [LoraSpec(rank=2, target_modules="all-linear")])
    assert len(AdapterStack(base, [LoraSpec(rank=2, target_modules=("q_proj", "o_proj"))]).targets_of[0]) == 4


def test_a_model_for_texts_and_images_is_one_for_texts(tmp_path):
    """Its context is its text's; what an image passes gets no adapter, here and in PEFT."""
    tokenizer = tf.AutoTokenizer.from_pretrained(FOLDER)
    text = {**SIZES, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 16}
    image = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                 patch_size=14)  # fmt: skip
    torch.manual_seed(3)
    tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4, image_token_index=5)
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    assert base.context_length == SIZES["max_position_embeddings"]
    stack = AdapterStack.create(base, [LoraSpec(rank=1, target_modules="all-linear")], [1])
    assert len(stack.targets_of[0]) == 14 and not any("vision" in name for name in stack.targets_of[0])
    stack.save_peft(0, tmp_path / "adapter")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    worn = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert set(peft.get_peft_model_state_dict(worn, save_embedding_layers=False)) == set(stack.state(0))


def test_a_model_that_continues_no_text_is_refused_by_its_kind(checkpoint):
    folder = checkpoint()
    edit(folder, model_type="clip")
    with pytest.raises(UserError, match="a CLIPConfig does not continue a text by itself. Give a causal LM"):
        load(folder)


def test_a_model_whose_layers_differ_in_width_has_its_memory_estimated():
    config = tf.Gemma3nTextConfig(hidden_size=8, intermediate_size=[16, 32], num_hidden_layers=2, vocab_size=64)
    assert activation_bytes_per_token(config, 4) == 4 * (2 * (20 * 8 + 8 * 32) + 3 * 64 // 2)


def test_the_context_of_a_model_whose_positions_depend_on_the_batch_is_its_original_one(checkpoint):
    folder = checkpoint()
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    edit(folder, rope_parameters=rope)
    assert load(folder).context_length == 64


# --- files ----------------------------------------------------------------------------------------------------


def halve(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def prefixed(folder):
    reweigh(folder, lambda weights: {f"wrapper.{name}": weight for name, weight in weights.items()})


def without_layer(folder):
    reweigh(folder, lambda weights: {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name})


def with_more(folder):
    reweigh(folder, lambda weights: {**weights, "visual.patch.weight": torch.zeros(2, 2)})


def beside(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))


def alone(folder):
    beside(folder)
    (folder / "config.json").unlink()


DAMAGES = {
    "a git-lfs pointer": (pointer, "git lfs pull"), "half a download": (halve, "cut or broken. Download"),
    "another size": (lambda folder: edit(folder, intermediate_size=64), "other shapes than its config.json"),
    "another prefix": (prefixed, "not in its files.*would be random"),
    "a layer missing": (without_layer, "3 of the model's weights are not in its files"),
    "foreign weights": (with_more, "1 weights in its files are not the model's, such as 'visual"),
    "an adapter beside": (beside, "adapter's files"), "an adapter alone": (alone, "is an adapter, not a model"),
    "no folder": (shutil.rmtree, "cannot be loaded"), "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer cannot be loaded"
    ),
    "a package": (lambda folder: edit(folder, quantization_config={"quant_method": "awq", "bits": 4}), "needs a pack"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_refused_with_the_remedy(checkpoint, damage, said):
    folder = checkpoint()
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load(folder)
    assert f"model.base = {str(folder)!r}" in str(caught.value)


def test_a_tied_model_that_claims_to_be_untied_has_no_output_weights(checkpoint):
    folder = checkpoint("tied")
    assert load(folder)
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lm_head.weight"):
        load(folder)


def test_weights_that_are_no_numbers_are_refused_where_the_model_is_tried(checkpoint):
    folder = checkpoint("opt")
    reweigh(folder, lambda weights: {n: w * float("nan") if "fc1" in n else w for n, w in weights.items()})
    with pytest.raises(UserError, match="no numbers"):
        load(folder)


def test_a_token_without_an_embedding_is_said_when_the_model_loads(checkpoint):
    folder = checkpoint()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["ferry-pier"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="1 tokens that the model has no embedding for, such as 'ferry-pier'"):
        load(folder)


# --- templates ------------------------------------------------------------------------------------------------

TURN = "<|turn|>"
TEMPLATES = {
    "a system turn demanded": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for m in messages %}[{{ m['content'] }}]{% endfor %}",
    "a content in parts": "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "[{{ c['text'] }}]{% endif %}{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_with_wishes_of_its_own_still_writes_the_text(checkpoint, template):
    folder = checkpoint()
    (folder / "chat_template.jinja").write_text(template)
    base = load(folder)
    assert "[On ferries]" in base.tokenizer.decode(encode_prompt(base.tokenizer, "On ferries"))


@pytest.mark.parametrize(("template", "said"), [
    ("{% for m in messages %}{{ m['content' }}{% endfor %}", "cannot be rendered"),
    ("always this", "leaves the user's text out"),
])  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(checkpoint, template, said):
    folder = checkpoint()
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said):
        load(folder)


def test_an_answer_ends_with_the_token_that_ends_a_turn_in_the_template(checkpoint):
    folder = checkpoint()
    base = load(folder)
    special = base.tokenizer.all_special_tokens
    end = next(token for token in special if token != base.tokenizer.eos_token)
    template = "{% for m in messages %}" + "{{ m['content'] }}" + end + "\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    base = load(folder)
    number = base.tokenizer.convert_tokens_to_ids(end)
    assert encode_answer(base.tokenizer, "yes")[-1] == number and number in base.end_ids


def test_a_control_token_that_a_text_spells_stays_text(checkpoint):
    tokenizer = load(checkpoint()).tokenizer
    control = set(tokenizer.all_special_ids)
    plain = [token in control for token in encode_prompt(tokenizer, "my post")]
    for token in tokenizer.all_special_tokens:
        for text in (f"my {token} post", token, f"{token}{token}", f"ends with {token} "):
            answer = encode_answer(tokenizer, text)
            assert not control & set(answer[:-1]) and decode_answer(tokenizer, answer) == text.strip()
            ids = encode_prompt(tokenizer, text)
            assert sum(one in control for one in ids) == sum(plain)
    assert encode_answer(tokenizer, "half \ud83d of it") == encode_answer(tokenizer, "half \ufffd of it")


def test_what_a_merge_would_lose_is_what_it_loses(checkpoint, tmp_path):
    """The oracle is PEFT's own merge, in the dtype that the sentence speaks of."""
    folder = checkpoint()
    base = load(folder)
    spec = LoraSpec(rank=2, alpha=2, target_modules=("q_proj", "v_proj"))
    stack = AdapterStack.create(base, [spec], [1])
    draw = torch.Generator().manual_seed(2)
    state = {key: value + 2e-3 * torch.randn(value.shape, generator=draw) for key, value in stack.state(0).items()}
    stack.load(0, state)
    stack.save_peft(0, tmp_path)
    [said] = merging_loses(base, spec, {key: value.numpy() for key, value in state.items()})
    plain = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().state_dict()
    names = [name for name in before if "q_proj" in name or "v_proj" in name]
    share = sum((merged[n] != before[n]).sum().item() for n in names) / sum(before[n].numel() for n in names)
    told = int(said.partition("%")[0].rpartition(" ")[2]) / 100
    assert told < 0.9 and abs(told - share) < 0.1
    assert merging_loses(base, spec, {key: 50 * value.numpy() for key, value in state.items()}) == []


# --- adapters from elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "said"), [
    ({"init_lora_weights": "pissa"}, "pissa"), ({"init_lora_weights": "olora"}, "olora"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"), ({"use_dora": True}, "use_dora"),
    ({"something_new": True}, "something_new"), ({"bias": "all"}, "bias"), ({"target_parameters": ["x"]}, "target_par"),
    ({"target_modules": None}, "target_modules"), ({"r": "many"}, "not LoRA's"), ({"peft_type": "IA3"}, "IA3"),
])  # fmt: skip
def test_a_peft_folder_that_is_not_plain_lora_is_refused(checkpoint, tmp_path, fields, said):
    base = load(checkpoint())
    stack = AdapterStack.create(base, [LoraSpec(rank=2, target_modules=("q_proj",))], [1])
    stack.save_peft(0, tmp_path)
    assert load_peft(tmp_path)[0].rank == 2
    edit(tmp_path, "adapter_config.json", **fields)
    with pytest.raises(UserError, match=said):
        load_peft(tmp_path)
