"""Evaluation does not depend on batch size or ranks, and is what a plain computation gives."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from matrices import covered

from tunesmith.train.answer.scores import answer_metrics, rouge_l, same_answer
from tunesmith.train.data.order import rank_batches
from tunesmith.train.ranks.distributed import World

OVERRIDES = (
    "+exp=debug",
    "model=hub",
    "engine.precision=fp32",
    "batch.sequence_length=128",
    "batch.micro_batch_size=1",
)


def evaluate_split(rank, overrides: list[str], batch_size: int) -> list[float]:
    with rank.ready(overrides) as (loop, _):
        found = rank.evaluate(loop, batch_size)
        return [found[name] for name in ("eval/loss", "eval/perplexity", "eval/token_accuracy")]


def evaluate_plainly(rank, overrides: list[str]) -> list[float]:
    """Record by record through the bare model: the weighted mean, and the share of targets that are the arg max."""
    with rank.ready(overrides) as (loop, _):
        loss = weight = correct = count = 0.0
        store = loop.run.data.train
        for index in range(store.num_records):
            ids, weights = store.record(index)
            logits = loop.session.engine.module(input_ids=torch.from_numpy(ids.astype("int64"))[None]).logits[0, :-1]
            labels, w = torch.from_numpy(ids[1:].astype("int64")), torch.from_numpy(weights[1:].copy())
            loss += float((F.cross_entropy(logits, labels, reduction="none") * w).sum())
            weight += float(w.sum())
            correct += float(((logits.argmax(-1) == labels) & (w > 0)).sum())
            count += float((w > 0).sum())
        return [loss / weight, math.exp(loss / weight), correct / count]


@pytest.mark.parametrize("engine", covered(["ddp", "zero3"], ["ddp"]))
def test_figures_are_those_of_a_plain_computation_for_any_batch_size_and_ranks(
    engine, ranks, make_model, make_records, data_cache
):
    overrides = [
        *OVERRIDES,
        f"engine={engine}",
        "engine.precision=fp32",
        f"model.name_or_path={make_model()}",
        f"data.train={make_records(37)}",
        "data.validation=[]",
        "evaluate.every_steps=null",
        f"data.cache_dir={data_cache}",
        "batch.global_batch_size=4",
    ]
    expected = ranks(1).run(evaluate_plainly, overrides=overrides)[0]
    for world_size, batch_size in [(1, 1), (1, 5), (2, 1), (2, 3), (2, 64)]:
        for found in ranks(world_size).run(evaluate_split, overrides=overrides, batch_size=batch_size):
            assert found == pytest.approx(expected, rel=2e-6)


def evaluated_twice(rank, overrides):
    """On a rank: two evaluations one after the other, adapter.dropout there, and whether the model trains on."""
    with rank.ready(overrides) as (loop, _):
        module = loop.session.engine.module
        figures = [rank.evaluate(loop, 2) for _ in range(2)]
        dropout = {part.p for name, part in module.named_modules() if "lora_dropout" in name and hasattr(part, "p")}
        return {"same": figures[0] == figures[1], "trains": module.training, "dropout": sorted(dropout)}


def test_an_evaluation_drops_nothing_and_training_goes_on_with_dropout(ranks, short_run, make_model):
    model = make_model(attention_dropout=0.5)
    overrides = short_run(0, 1, "adapter=lora", "adapter.dropout=0.25", model=model)
    assert ranks(1).run(evaluated_twice, overrides=overrides) == [{"same": True, "trains": True, "dropout": [0.25]}]


@pytest.mark.parametrize(("items", "batch", "world"), [(0, 4, 2), (1, 4, 2), (7, 2, 3), (8, 4, 2), (9, 4, 2)])
def test_every_item_goes_to_one_rank_and_all_ranks_do_as_many_batches(items, batch, world):
    split = [rank_batches(items, batch, World(rank, world, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in split}) == 1
    given = [item for batches in split for part in batches for item in part if item >= 0]
    assert sorted(given) == list(range(items))
    assert all(len(part) == batch for batches in split for part in batches)


def test_exact_match_and_rouge_l_are_means_over_answers():
    expected = ["open the app and press reset", "call us", "no refund"]
    generated = ["open the app and press reset", " call   us\n", "yes refund now"]
    figures = answer_metrics(generated, expected)
    assert figures["eval/exact_match"] == pytest.approx(2 / 3)
    assert figures["eval/rouge_l"] == pytest.approx((1 + 1 + 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)) / 3)
    assert answer_metrics([], []) == {}


# Computed once with rouge-score 0.1.2: RougeScorer(["rougeL"], use_stemmer=False).score(expected, generated).fmeasure
ROUGE_L = [
    ("open the app and press reset", "press reset and open the app", 0.5),
    ("no refund", "yes refund now", 0.4),
    ("a b c d e f", "a x b y c z", 0.5),
    ("", "", 0),
    ("", "x", 0),
    ("x", "", 0),
    ("...", "...", 0),
    ("Hello, WORLD!", "hello world", 1.0),
    ("Größe und Maße", "Grösse und Masse", 0.4444444444444445),
    ("日本語", "日本語", 0),
    ("it's 3.14", "its 3 14", 0.5714285714285715),
    ("a a a b", "a b a a", 0.75),
    ("İstanbul", "istanbul", 0.0),
    ("the the the", "the", 0.5),
]


@pytest.mark.parametrize(("expected", "generated", "value"), ROUGE_L)
def test_rouge_l_is_that_of_rouge_score(expected, generated, value):
    assert rouge_l(generated, expected) == value


def test_rouge_l_of_500_random_pairs_is_that_of_rouge_score():
    lots, words = random.Random(7), [*"abcdeFGé12", "it's", "x-y", ",", ".", "Ω"]

    def sentence():
        return lots.choice([" ", "  ", "\n", "-"]).join(lots.choices(words, k=lots.randint(0, 12)))

    pairs = [(sentence(), sentence()) for _ in range(500)]
    values = [rouge_l(generated, expected) for expected, generated in pairs]
    assert math.fsum(values) == pytest.approx(89.49314067096819, abs=1e-12)  # rouge-score 0.1.2, as above


def test_an_answer_with_other_words_is_not_the_same():
    assert same_answer("a b", "a  b ")
    assert not same_answer("a b", "A b")
    assert not same_answer("", "a")
