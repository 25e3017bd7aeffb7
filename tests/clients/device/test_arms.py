"""What each arm trains on, and that arms are independent of each other."""

from untether.clients.device.arms import TrainingData, training_pairs
from untether.sim.core.records import Interaction, Sample
from untether.sim.experiment.arms import ARMS, trained


def _sample(name, task="LaMP_4"):
    return Sample(name, "r", task, f"article {name}", f"headline {name}")


REAL = tuple(Interaction(f"i{n}", "LaMP_4", f"real {n}", f"title {n}") for n in range(3))
ACCEPTED = tuple(_sample(f"a{n}") for n in range(4)) + (_sample("b0", "LaMP_5"),)
UNFILTERED = ACCEPTED + tuple(_sample(f"x{n}") for n in range(6))
FOREIGN = tuple(_sample(f"f{n}") for n in range(9)) + tuple(_sample(f"g{n}", "LaMP_5") for n in range(2))
WITHHELD = tuple(Interaction(f"w{n}", "LaMP_4", f"older {n}", f"old title {n}") for n in range(6)) + tuple(
    Interaction(f"v{n}", "LaMP_5", f"older {n}", f"old abstract {n}") for n in range(2)
)
MATERIAL = TrainingData(REAL, ACCEPTED, UNFILTERED, FOREIGN, WITHHELD)


def _outputs(arm, material=MATERIAL, seed=1, device="d00000"):
    return [answer for _, answer in training_pairs(arm, material, seed, device, 0)]


def test_what_each_arm_sees():
    real = [item.output for item in REAL]
    accepted = [sample.output for sample in ACCEPTED]
    assert _outputs("local") == _outputs("local_matched") == real
    assert _outputs("synthetic_only") == accepted
    assert _outputs("collaborative") == real + accepted
    assert _outputs("unfiltered") == real + [sample.output for sample in UNFILTERED]


def test_matched_arms_draw_as_many_of_each_task_as_were_accepted():
    for arm, pool in (("unfiltered_matched", UNFILTERED), ("placebo", FOREIGN), ("oracle", WITHHELD)):
        drawn = _outputs(arm)[len(REAL) :]
        tasks = {sample.output: sample.task for sample in pool}
        assert sorted(tasks[output] for output in drawn) == ["LaMP_4"] * 4 + ["LaMP_5"]
        assert len(set(drawn)) == 5
    assert _outputs("placebo") == _outputs("placebo")
    draws = {tuple(_outputs("placebo", device=f"d{n:05d}")) for n in range(8)}
    assert len(draws) > 1, "devices draw on their own"


def test_without_samples_every_arm_with_real_data_is_local():
    bare = TrainingData(REAL)
    for arm in trained(ARMS):
        assert _outputs(arm, bare) == ([] if arm == "synthetic_only" else _outputs("local", bare))


def test_prompts_carry_the_task_instruction():
    prompt, _ = training_pairs("local", MATERIAL, 1, "d00000", 0)[0]
    assert prompt == "Generate a headline for the following article: real 0"
