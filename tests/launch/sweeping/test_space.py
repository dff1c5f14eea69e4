"""Hydra's grammar as a search space."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tunesmith.launch.sweeping.space import read_space
from tunesmith.train.errors import ConfigError
from tunesmith.train.paths import CONF_DIR


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("adapter.r=8,16", CategoricalDistribution(("8", "16"))),
        ("adapter.r=choice(8,16)", CategoricalDistribution(("8", "16"))),
        ("name='a b','c,d'", CategoricalDistribution(("'a b'", "'c,d'"))),
        ("data.train=[a.jsonl],[b.jsonl,c.jsonl]", CategoricalDistribution(("[a.jsonl]", "[b.jsonl,c.jsonl]"))),
        ("adapter=glob(*lora)", CategoricalDistribution(("lora", "rslora"))),
        ("batch.global_batch_size=range(8,33,8)", IntDistribution(8, 32, step=8)),
        ("optimizer.beta1=range(0,1,0.3)", FloatDistribution(0, 0.9, step=0.3)),
        ("optimizer.beta1=interval(0.8,0.95)", FloatDistribution(0.8, 0.95)),
        ("optimizer.learning_rate=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("adapter.r=int(interval(4,64))", IntDistribution(4, 64)),
        ("adapter.r=tag(log,int(interval(4,64)))", IntDistribution(4, 64, log=True)),
    ],
)
def test_what_is_written_is_what_is_searched(text: str, dimension: object) -> None:
    space = read_space({}, ["+exp=debug", text], [CONF_DIR])
    assert space.dimensions == {text.split("=", 1)[0]: dimension}
    assert space.fixed == ("+exp=debug",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter.r=8", "there is nothing to search"),
        ("adapter.r=8,8", "8 stands there twice"),
        ("adapter.r=interval(2,1)", "the interval from 2 to 1 is empty"),
        ("adapter.r=range(5,5)", "the range is empty"),
        ("adapter.r=shuffle(1,2)", "shuffle has no effect"),
        ("adapter.r=tag(log,choice(1,2))", "the tags ['log'] mean nothing"),
        ("adapter.r=tag(quantised,interval(1,2))", "the tags ['quantised'] mean nothing"),
        ("optimizer.learning_rate=tag(log,interval(0,1))", "has no logarithm"),
        ("adapter=glob(nothing*)", "adapter has no values to choose from"),
        ("adapter.r=choice(", "is not an override"),
    ],
)
def test_what_cannot_be_searched_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_space({}, [text], [CONF_DIR])
    assert said in str(error.value)
    assert error.value.at


def test_the_command_line_has_the_last_word() -> None:
    space = read_space({"adapter.r": "choice(1,2)", "adapter": "lora"}, ["adapter.r=3,4", "seed=1,2"], [CONF_DIR])
    assert space.described() == {"adapter.r": ["3", "4"], "seed": ["1", "2"]}
    assert space.fixed == ("adapter=lora",)
    assert read_space({"seed": "1,2", "adapter.r": "1,2"}, ["adapter.r=5"], [CONF_DIR]).fixed == ("adapter.r=5",)


def test_a_grid_lists_each_combination_once_with_the_last_key_fastest() -> None:
    space = read_space({}, ["adapter.r=8,16", "seed=range(3)"], [CONF_DIR])
    texts = [space.overrides(point) for point in space.points()]
    assert texts[:4] == [[f"adapter.r={r}", f"seed={seed}"] for r, seed in ((8, 0), (8, 1), (8, 2), (16, 0))]
    assert space.size == len(texts) == 6
    assert [space.overrides(point) for point in space.corners()] == [texts[0], texts[-1]]
