"""The catalogue's figures have sources; the cost model against numbers worked by hand and published ones."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untether.sim.core.errors import UserError
from untether.sim.experiment.sections import Lora
from untether.sim.time.cost import SHAPES, CostModel, ModelShape, model_shape
from untether.sim.time.devices.heat import Heat
from untether.sim.time.hardware import FIGURES, MAY_HAVE, Fleet, Profile, built_in, catalogue

PLAIN = Profile(
    name="plain", title="", kind="board", ram_gib=1, usable_ram=0.5, compute_gflops=10, training_share=0.5,
    memory_gb_per_s=2, decoding_share=0.5, hot_share=0.5, heating_s=100, load_w=5, idle_w=1, radio_w=1, battery_wh=10,
    charge_w=10, storage_gb=8, prefill_share=0.4, layer_us=10,
)  # fmt: skip
TINY = ModelShape(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
OWN = "[mine]\n" + "\n".join(f"{key} = {getattr(PLAIN, key)}" for key in FIGURES)


def test_the_catalogue_is_wide_and_sourced():
    profiles = built_in().values()
    assert len(profiles) >= 10
    assert {profile.kind for profile in profiles} == {"phone", "laptop", "board"}
    assert sum(profile.kind == "board" for profile in profiles) >= 2
    for profile in profiles:
        assert set(FIGURES) <= set(profile.sources) <= {*FIGURES, *MAY_HAVE}
        for figure, source in profile.sources.items():
            sure = source.startswith("estimate") or "an estimate" in source
            fitted = source.startswith("fitted") and ("measurements.csv" in source or "bench.devices" in source)
            dated = re.search(r"https://\S+ \((read )?20\d\d|https://\S+, (read )?20\d\d", source)
            assert sure or fitted or dated, (profile.name, figure, source)
        assert profile.on_mains == (profile.kind == "board")


def test_the_catalogue_is_of_this_world():
    """Orders of magnitude: a slip of a unit or of a digit is seen."""
    ranges = {
        "ram_gib": (2, 32), "compute_gflops": (30, 5000), "memory_gb_per_s": (8, 150), "load_w": (2, 60),
        "storage_gb": (16, 1024), "heating_s": (60, 1200),
    }  # fmt: skip
    batteries_wh = {"phone": (10, 25), "laptop": (40, 100), "board": (0, 0)}
    for profile in built_in().values():
        for figure, (least, most) in ranges.items():
            assert least <= getattr(profile, figure) <= most, (profile.name, figure)
        least, most = batteries_wh[profile.kind]
        assert least <= profile.battery_wh <= most and profile.charge_w <= 2 * profile.battery_wh, profile.name
        assert profile.idle_w < profile.load_w and profile.radio_w < profile.load_w, profile.name
    costs = {name: CostModel(profile, SHAPES["Qwen2.5-0.5B"]) for name, profile in built_in().items()}
    training_s = {name: cost.training_s(20_000) for name, cost in costs.items()}
    # 2,488 x 0.6 = 1,493 GFLOPS while cool; the laptop's 2,900 x 0.5 = 1,450 come next
    assert min(training_s, key=training_s.get) == "iphone-17-pro"
    assert max(training_s, key=training_s.get) == "raspberry-pi-4"
    assert 10 < training_s["iphone-17-pro"] and training_s["raspberry-pi-4"] < 6000


def test_own_profiles_stand_beside_the_built_in_ones(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN.replace("ram_gib = 1", 'ram_gib = [1, "the label"]'))
    mine = catalogue(str(path))["mine"]
    assert mine.ram_gib == 1 and mine.sources["ram_gib"] == "the label" and "pixel-8" in catalogue(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (OWN.replace("ram_gib = 1\n", ""), "`ram_gib` is missing"),
        (OWN.replace("usable_ram = 0.5", "usable_ram = 1.5"), "above 0 and at most 1"),
        (OWN.replace("load_w = 5", "load_w = 0"), "load_w = 0: it must be above 0"),
        (OWN.replace("load_w = 5", 'load_w = "5 W"'), "give a number"),
        (OWN.replace("load_w = 5", "load_w = 1.0"), "load_w = 1 with idle_w = 1: both are power of the whole device"),
        (OWN + "\nram = 3", "Did you mean `ram_gib`"),
        (OWN + "\nknee = 1.0", "knee = 1: it would never slow down"),
        (OWN + "\nlayer_us = -1", "layer_us = -1: it must be 0 or above"),
        (OWN + '\nbackend = "opengl"', "Did you mean `opencl`"),
        (OWN.replace("mine", "pixel-8"), "exists already"),
        ("[mine", "not a TOML file"),
    ],
)
def test_mistakes_in_a_catalogue_are_named(tmp_path, text, said):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        catalogue(str(path))
    assert said in str(error.value) and "own.toml" in str(error.value)


def test_profiles_are_drawn_by_weight_and_device_alone():
    names = ("pixel-8", "iphone-13:3")
    fleet = Fleet(names, "", 1)
    drawn = [fleet.of(f"d{i}").name for i in range(400)]
    assert drawn.count("iphone-13") == pytest.approx(300, abs=30)
    assert [Fleet(names, "", 1).of(f"d{i}").name for i in reversed(range(400))] == drawn[::-1]
    for name, said in (("pixel", "Did you mean `pixel-8`"), ("pixel-8:0", "above 0"), ("pixel-8:x", "above 0")):
        with pytest.raises(UserError, match=said):
            Fleet((name,), "", 1)


def test_shapes_have_the_published_numbers_of_parameters():
    """As counted on the models' own pages."""
    assert {name: shape.parameters for name, shape in SHAPES.items()} == {
        "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "Qwen2.5-0.5B": 494_032_768,
        "TinyLlama-1.1B": 1_100_048_384, "Llama-3.2-1B": 1_235_814_400, "Qwen2.5-1.5B": 1_543_714_304,
        "SmolLM2-1.7B": 1_711_376_384, "Qwen2.5-3B": 3_085_938_688, "Llama-3.2-3B": 3_212_749_824,
        "SmolLM3-3B": 3_075_098_624, "gemma-3-1b": 999_885_952, "Phi-4-mini": 3_836_021_760,
        "Qwen2.5-7B": 7_615_616_512,
    }  # fmt: skip
    assert model_shape("Qwen/Qwen2.5-0.5B-Instruct") is SHAPES["Qwen2.5-0.5B"]
    with pytest.raises(UserError, match="Did you mean `Qwen2.5-0.5B`"):
        model_shape("Qwen2-0.5B")


def test_costs_by_hand():
    # a layer: q 4x4, k and v 4x2, o 4x4, three maps of 4x8: 16 + 8 + 8 + 16 + 96 = 144 weights; two layers 288
    assert TINY.body == 288 and TINY.head == 40 and TINY.parameters == 288 + 5 * 4 + 40
    # rank 1 on q (4 + 4) and down (8 + 4), two layers
    assert TINY.lora(1, ("q_proj", "down_proj")) == 40
    cost = CostModel(PLAIN, TINY, 16, Lora(rank=1, target_modules=("q_proj", "down_proj")))
    # 4 x 288 + 6 x 40 a token, attention 3 x 4 x 2 x 2 x 2 x 10 / 2 = 480 a token, head 4 x 40 a target
    assert cost.training_flops(100, 10, context=10) == 100 * (1152 + 240 + 480) + 1600
    assert cost.training_s(100, 10, context=10) == pytest.approx(188_800 / 5e9)
    assert cost.weight_bytes == 696 and cost.adapter_bytes() == 160
    # a token reads 696 bytes at 1 GB/s and a cache of 16 bytes a token seen at half of that; 656 operations at 4 GFLOPS
    # are faster; two layers take 10 us each beside that, a token and a prompt
    token = 696 / 1e9 + 16 * (3 + 1) / 0.5e9 + 20e-6
    assert cost.decoding_s(3, 2) == pytest.approx(max(696 / 1e9, 2 * 288 * 3 / 4e9) + 20e-6 + 2 * token)
    # runtime, weights, adapter state, activations of 8 tokens, and logits of 2 targets. Kept a layer: 4 x 4 for the
    # norms, 2 x 3 x 2 in the attention, 3 x 8 in the MLP, and the inputs of q (4) and down (8)
    assert cost.kept == 16 + 12 + 24 + 4 + 8
    assert cost.training_bytes(8) == 300e6 + 696 + 640 + 2 * 8 * 2 * 64 + 12 * 2 * 10
    # with checkpointing: the inputs of both layers, and one layer; 1.23 times the time
    lean = dataclasses.replace(cost, checkpointing=True)
    assert lean.training_bytes(8) == 300e6 + 696 + 640 + 2 * 8 * (2 * 4 + 64) + 12 * 2 * 10
    assert lean.training_s(100, 10, context=10) == pytest.approx(1.23 * 188_800 / 5e9)
    # 4 W above idle; base, two adapters and 1,000 bytes of samples
    assert cost.energy_j(10) == 40 and cost.stored_bytes(2, 1000) == 696 + 320 + 1000
    assert cost.decoding_bytes(5) == 300e6 + 696 + 160 + 16 * 5


def test_time_depends_on_model_tokens_and_weights():
    cost = {name: CostModel(built_in()["pixel-8"], shape) for name, shape in SHAPES.items()}
    small, large = cost["Qwen2.5-0.5B"], cost["Qwen2.5-3B"]
    assert large.training_s(1000) > 4 * small.training_s(1000)
    assert small.training_s(2000) == pytest.approx(2 * small.training_s(1000))
    four_bit = dataclasses.replace(large, weight_bits=4)
    # 4.5 of 16 bits at 0.66 of the rate are 0.43 of the time; 36 layers of 60 us a token are the rest
    four, sixteen = (cost.decoding_s(0, 100) - cost.prefill_s(0) for cost in (four_bit, large))
    assert 0.42 < four / sixteen < 0.45, "decoding waits for the weights"
    assert four_bit.training_s(1000) == large.training_s(1000)
    assert not large.fits(128) and four_bit.fits(128), "quantized weights fit where 16-bit ones do not"


def test_decoding_and_heat_agree_with_a_phone_that_was_measured():
    """An iPhone 17 Pro decoded a 4-bit 3B model at 37 tokens/s when cool and 17.9 after five minutes."""
    phone = built_in()["iphone-17-pro"]
    cost = CostModel(phone, SHAPES["Llama-3.2-3B"], 4)
    cool = 100 / (cost.decoding_s(50, 100) - cost.decoding_s(50, 0))
    assert cool == pytest.approx(37, rel=0.15)
    assert cool * phone.heat().after(load_s=300).speed == pytest.approx(17.9, rel=0.25)
    assert phone.heat().after(load_s=85).speed == 1, "full speed for a minute and a half"


def test_heat_by_hand():
    heat = Heat(hot_share=0.5, heating_s=100)
    assert heat.work_in(100) == pytest.approx(50 + 50 * (1 - math.exp(-1)))
    assert heat.after(load_s=100).level == pytest.approx(1 - math.exp(-1))
    assert heat.after(load_s=100, rest_s=100).level == pytest.approx((1 - math.exp(-1)) / math.e)
    assert Heat(1.0, 100).time_for(42) == 42


def test_heat_with_a_knee_by_hand():
    """Warm to one half after 100 ln 2 = 69.3 s; from there on as without a knee; it cools four times as slowly."""
    heat, flat_s = Heat(0.5, 100, knee=0.5, cooling_s=400), 100 * math.log(2)
    assert heat.work_in(60) == 60 and heat.time_for(60) == 60 and heat.after(flat_s).speed == pytest.approx(1)
    assert heat.work_in(flat_s + 100) == pytest.approx(flat_s + Heat(0.5, 100).work_in(100))
    assert heat.time_for(heat.work_in(500)) == pytest.approx(500)
    # warmth 1 - 0.5 / e after 100 s more, so 1 - 1 / e of the way above the knee
    assert heat.after(flat_s + 100).speed == pytest.approx(1 - 0.5 * (1 - 1 / math.e))
    hot = heat.after(1e6)
    assert hot.speed == pytest.approx(0.5) and hot.recovery_s() == pytest.approx(400 * math.log(1 / 0.75))
    assert hot.after(rest_s=hot.recovery_s()).speed == pytest.approx(0.75) and heat.recovery_s() == 0


@given(
    st.floats(0.05, 1), st.floats(1, 1000), st.floats(0, 1), st.floats(0, 0.9), st.floats(0, 1e5), st.floats(0, 1e4)
)
def test_heat_is_consistent(hot, tau, level, knee, work, first):
    heat = Heat(hot, tau, level, knee)
    time = heat.time_for(work)
    assert heat.work_in(time) == pytest.approx(work, rel=1e-6, abs=1e-6)
    assert work - 1e-6 <= time <= work / hot + 1e-6, "never faster than cool, never slower than hot"
    # in two goes without a rest: the same
    assert heat.work_in(first) + heat.after(load_s=first).work_in(time) == pytest.approx(heat.work_in(first + time))
