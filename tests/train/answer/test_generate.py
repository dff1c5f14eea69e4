"""Generation: greedy, the same for any batch size, number of ranks and ZeRO stage, and it stops at the stop token."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from tunesmith.train.answer.generate import answers, room_for
from tunesmith.train.data.prepare import Question

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18], [21, 22], [8, 8, 8, 8]]


def questions() -> list[Question]:
    return [
        Question([{"role": "user", "content": ""}], "", ids, f"test:{number}") for number, ids in enumerate(PROMPTS)
    ]


def one_by_one(model, stop_ids: list[int], max_new_tokens: int) -> list[list[int]]:
    """The definition: append the arg max until a stop token."""
    found = []
    for prompt in PROMPTS:
        ids, new = list(prompt), []
        while len(new) < max_new_tokens:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop_ids:
                break
            ids.append(token)
            new.append(token)
        found.append(new)
    return found


def generate_split(rank, overrides: list[str], batch_size: int, stop_ids: list[int]) -> dict[str, object]:
    with rank.ready(overrides) as (loop, _):
        loop.session.engine.module.generation_config.repetition_penalty = (
            5.0  # a model's own wish must not bend greedy answers
        )
        found = answers(
            loop.session.engine.module,
            questions(),
            world=rank.world,
            device=rank.device,
            batch_size=batch_size,
            max_new_tokens=12,
            stop_ids=stop_ids,
            pad_token_id=0,
        )
        with torch.no_grad():
            expected = (
                one_by_one(loop.session.engine.module.eval(), stop_ids, 12) if rank.world.world_size == 1 else None
            )
        return {"found": found, "expected": expected}


@pytest.fixture
def overrides(make_model, make_records, data_cache):
    return [
        "+exp=debug",
        "model=hub",
        f"model.name_or_path={make_model()}",
        f"data.train={make_records(20)}",
        "data.validation=[]",
        "evaluate.every_steps=null",
        f"data.cache_dir={data_cache}",
        "batch.sequence_length=128",
    ]


def test_answers_are_the_arg_max_for_any_split(overrides, ranks):
    fp32 = "engine.precision=fp32"
    free = ranks(1).run(generate_split, overrides=[*overrides, "engine=ddp", fp32], batch_size=1, stop_ids=[2])[0]
    assert free["found"] == free["expected"]
    stop = [free["found"][0][2], free["found"][2][5]]  # tokens that do come: answers end early, at different lengths
    first = ranks(1).run(generate_split, overrides=[*overrides, "engine=ddp", fp32], batch_size=5, stop_ids=stop)[0]
    assert first["found"] == first["expected"]
    assert len({len(answer) for answer in first["found"]}) > 1
    for engine in ("ddp", "zero3"):
        for batch_size in (1, 2, 8):
            arguments = {
                "overrides": [*overrides, f"engine={engine}", fp32],
                "batch_size": batch_size,
                "stop_ids": stop,
            }
            for answer in ranks(2).run(generate_split, **arguments):
                assert answer["found"] == first["found"]


@pytest.mark.parametrize(("prompt", "wanted", "room"), [(10, 20, 20), (90, 20, 10), (99, 20, 1), (100, 20, 1)])
@pytest.mark.parametrize("sees", [False, True])
def test_an_answer_ends_where_the_models_positions_do(sees, prompt, wanted, room):
    positions = {"max_position_embeddings": 100}
    config = (
        AutoConfig.for_model("gemma3", text_config=positions) if sees else AutoConfig.for_model("llama", **positions)
    )
    assert room_for(SimpleNamespace(config=config), prompt, wanted) == room
