import gzip
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tunesmith.train.config.config import Packing, Targets, Truncate
from tunesmith.train.data import prepare as prepare_module
from tunesmith.train.data.prepare import prepare, split_records
from tunesmith.train.data.records import read_records
from tunesmith.train.data.render import encode_prompt
from tunesmith.train.data.sources import find_sources
from tunesmith.train.errors import DataError
from tunesmith.train.objective.objective import make_objective

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "conf/data/example/train.jsonl"
SHARED = ROOT.parent / "shared/data"


def rows(count, text="the refund takes five days"):
    return [{"prompt": f"how are you {index}", "completion": text} for index in range(count)]


def key(config, tokenizer):
    return quiet(config, tokenizer).fingerprint


def quiet(config, tokenizer):
    return prepare(config, tokenizer, make_objective(config, tokenizer), show_progress=False)


def test_what_goes_in_comes_out(make_tokenizer, make_config, write_jsonl):
    tokenizer = make_tokenizer()
    data = quiet(make_config(write_jsonl(rows(10)), validation=[write_jsonl(rows(2), "valid.jsonl")]), tokenizer)
    texts = {tokenizer.decode(data.train.record(index)[0]) for index in range(10)}
    turn = "<|im_start|>user\nhow are you {}<|im_end|>\n<|im_start|>assistant\nthe refund takes five days<|im_end|>"
    assert texts == {turn.format(index) for index in range(10)}
    assert data.report.train.num_rows == data.report.train.num_records == data.train.num_records == 10
    assert data.report.validation.num_records == data.validation.num_records == 2
    assert data.report.train.num_target_tokens == data.train.num_target_tokens
    assert data.report.num_leaked == 2
    question = data.questions[1]
    assert (question.answer, question.messages) == (
        "the refund takes five days",
        [{"role": "user", "content": "how are you 1"}],
    )
    assert question.place.endswith("valid.jsonl:2")
    assert question.prompt_ids == encode_prompt(tokenizer, question.messages)
    assert [question.place[-2:] for question in data.train_questions()] == [f":{i}" for i in range(1, 10)] + ["10"]


def test_the_second_time_nothing_is_tokenised(make_tokenizer, make_config, write_jsonl, monkeypatch):
    config, tokenizer = make_config(write_jsonl(rows(10))), make_tokenizer()
    first = quiet(config, tokenizer)
    monkeypatch.setattr(prepare_module, "_build", None)
    second = quiet(config, tokenizer)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert np.array_equal(second.train.tokens, first.train.tokens)


def changed_tokenizer(tokenizer):
    tokenizer.add_tokens(["refund"])


def changed_template(tokenizer):
    tokenizer.chat_template += " "


CHANGES = {
    "sequence_length": {"sequence_length": 65},
    "packing": {"packing": Packing.none},
    "truncate": {"truncate": Truncate.drop},
    "targets": {"targets": Targets.last_turn},
    "validation_fraction": {"validation_fraction": 0.3},
    "validation file": {"validation": ["valid.jsonl"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_setting_is_another_key(change, make_tokenizer, make_config, write_jsonl):
    path, valid = write_jsonl(rows(10)), write_jsonl(rows(2), "valid.jsonl")
    change = {name: [valid] if name == "validation" else value for name, value in change.items()}
    tokenizer = make_tokenizer()
    assert key(make_config(path, **change), tokenizer) != key(make_config(path), tokenizer)


@pytest.mark.parametrize("change", [changed_tokenizer, changed_template])
def test_another_tokenizer_or_template_is_another_key(change, make_tokenizer, make_config, write_jsonl):
    config, tokenizer = make_config(write_jsonl(rows(3))), make_tokenizer()
    before = key(config, tokenizer)
    change(tokenizer)
    assert key(config, tokenizer) != before


def test_other_content_under_the_same_name_is_another_key(make_tokenizer, make_config, write_jsonl):
    config, tokenizer = make_config(write_jsonl(rows(3))), make_tokenizer()
    before = quiet(config, tokenizer)
    stat = os.stat(config.data.train)
    write_jsonl(rows(3, "the refund takes nine days"))  # as long as before
    os.utime(config.data.train, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither time nor size tell
    after = quiet(config, tokenizer)
    assert after.fingerprint != before.fingerprint
    assert "nine" in make_tokenizer().decode(after.train.record(0)[0])


def compared(rank, fingerprints):
    try:
        prepare_module.check_same_data(fingerprints[rank.world.rank], rank.device)
    except DataError as error:
        return error.what
    return ""


def test_ranks_with_other_data_are_told_so_together(ranks):
    assert ranks(2).run(compared, fingerprints=["one", "one"]) == ["", ""]
    problem = "ranks have prepared other data: rank 1: two, rank 0 has another."
    assert ranks(2).run(compared, fingerprints=["one", "two"]) == [problem] * 2


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_what_is_read_is_what_was_digested(name, make_tokenizer, make_config, write_jsonl, tmp_path, monkeypatch):
    """The file is rewritten after its digest was taken: the old key must not get the new words."""

    def write(words):
        Path(write_jsonl(rows(3, words), "plain")).rename(tmp_path / "data.jsonl")
        if name.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))

    def rewritten(*arguments):
        write("the refund takes nine days")
        return build(*arguments)

    write("the refund takes five days")
    config, tokenizer, build = make_config(str(tmp_path / name)), make_tokenizer(), prepare_module._build
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_build", rewritten)
        with pytest.raises(DataError, match=f"{name} was written to while it was read"):
            quiet(config, tokenizer)
    write("the refund takes five days")
    assert "five" in tokenizer.decode(quiet(config, tokenizer).train.record(0)[0])


def test_the_seed_is_in_the_key_only_when_it_splits(make_tokenizer, make_config, write_jsonl):
    path, tokenizer = write_jsonl(rows(30)), make_tokenizer()
    keys = [key(make_config(path, seed=seed), tokenizer) for seed in (0, 1)]
    assert keys[0] == keys[1]
    splits = [(0, 0.5), (1, 0.5), (0, 0.4)]
    keys = [key(make_config(path, seed=seed, validation_fraction=part), tokenizer) for seed, part in splits]
    assert len(set(keys)) == 3


def test_padding_a_batch_does_not_change_the_key(make_tokenizer, make_config, write_jsonl):
    config, tokenizer = make_config(write_jsonl(rows(3))), make_tokenizer(pad="<|pad|>")
    before = key(config, tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert key(config, tokenizer) == before
    assert quiet(config, tokenizer).train.max_length > 2  # nor is anything truncated


def test_a_seeded_fraction_is_held_out(make_tokenizer, make_config, write_jsonl):
    tokenizer = make_tokenizer()
    path = write_jsonl(rows(100))
    data = quiet(make_config(path, validation_fraction=0.2), tokenizer)
    places = [set(store.places()) for store in (data.train, data.validation)]
    assert places[0].isdisjoint(places[1])
    assert len(places[0] | places[1]) == 100
    assert 10 <= len(places[1]) <= 30
    assert data.report.num_leaked == 0
    other = quiet(make_config(path, validation_fraction=0.2, seed=1), tokenizer)
    assert set(other.validation.places()) != places[1]


def test_rows_added_at_the_end_move_no_earlier_row(write_jsonl):
    few, many = (read_records(find_sources([write_jsonl(rows(count))])) for count in (50, 80))
    held_out = {record.place for record in split_records(few, 0.3, seed=0)[1]}
    assert held_out == {
        record.place for record in split_records(many, 0.3, seed=0)[1] if int(record.place.split(":")[-1]) <= 50
    }


def test_a_fraction_that_leaves_one_side_empty_is_an_error(make_tokenizer, make_config, write_jsonl):
    with pytest.raises(
        DataError, match=r"validation_fraction=0.01 of 2 records leaves 2 for training and 0 for validation"
    ):
        quiet(make_config(write_jsonl(rows(2)), validation_fraction=0.01), make_tokenizer())


LONG = {"prompt": "hello world " * 20, "completion": "fine"}


def test_a_record_that_is_too_long_stops_the_run(make_tokenizer, make_config, write_jsonl, tmp_path):
    path = write_jsonl([*rows(2), LONG, LONG])
    with pytest.raises(DataError) as caught:
        quiet(make_config(path), make_tokenizer())
    lines = str(caught.value).splitlines()
    assert lines[0] == "DataError: 2 records are longer than sequence_length=64:"
    length = int(lines[1].split()[1])
    assert lines[1:] == [
        f"  {path}:3: {length} tokens",
        f"  {path}:4: {length} tokens",
        "  at: batch.sequence_length",
        f"  do: set batch.sequence_length={length}, or data.truncate=drop or left_of_prompt.",
    ]
    assert {entry.suffix for entry in (tmp_path / "cache").iterdir()} == {".lock", ".start"}  # nothing half-made
    assert quiet(make_config(path, sequence_length=length), make_tokenizer()).train.max_length == length


def test_drop_counts_what_it_drops(make_tokenizer, make_config, write_jsonl):
    data = quiet(make_config(write_jsonl([*rows(2), LONG]), truncate=Truncate.drop), make_tokenizer())
    assert (data.report.train.num_rows, data.report.train.num_records, data.report.train.num_dropped) == (3, 2, 1)
    assert "1 dropped as too long" in data.report.lines()[0]
    assert len(data.train_questions()) == 2
    with pytest.raises(DataError, match="all 1 records were dropped"):
        quiet(make_config(write_jsonl([LONG]), truncate=Truncate.drop), make_tokenizer())


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_left_of_prompt_keeps_bos_and_every_target(bos, make_tokenizer, make_config, write_jsonl):
    tokenizer = make_tokenizer(bos=bos)
    data = quiet(make_config(write_jsonl([LONG]), truncate=Truncate.left_of_prompt), tokenizer)
    ids, weights = data.train.record(0)
    assert len(ids) == 64
    assert tokenizer.decode(ids[weights > 0]) == "fine<|im_end|>"
    assert tokenizer.decode(ids).endswith("world <|im_end|>\n<|im_start|>assistant\nfine<|im_end|>")
    assert (ids == tokenizer.bos_token_id).sum() == (1 if bos else 0)
    assert data.report.train.num_truncated == 1
    assert data.train_questions()[0].prompt_ids == ids[weights == 0].tolist()  # asked as it was trained
    if bos:
        assert ids[0] == tokenizer.bos_token_id


def test_targets_that_do_not_fit_are_an_error(make_tokenizer, make_config, write_jsonl):
    path = write_jsonl([*rows(1), {"prompt": "hello", "completion": "fine thanks " * 40}])
    with pytest.raises(DataError) as caught:
        quiet(make_config(path, truncate=Truncate.left_of_prompt), make_tokenizer())
    assert caught.value.what.startswith(f"{path}:2: the ")
    assert "don't fit into sequence_length=64" in caught.value.what


def test_rows_of_a_rewriting_template_are_counted_as_expanded(make_tokenizer, make_config, write_jsonl):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (' last' if loop.last else '') }}"
        "{{ '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant last\\n' }}{% endif %}"
    )
    turns = [("user", "hello"), ("assistant", "fine"), ("user", "how are you"), ("assistant", "fine thanks")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    data = quiet(make_config(write_jsonl([chat, chat]), sequence_length=128), make_tokenizer(template))
    report = data.report.train
    assert (report.num_rows, report.num_expanded, report.num_records) == (2, 2, 4)
    assert len(data.train_questions()) == 2


def test_a_damaged_cache_is_built_anew(make_tokenizer, make_config, write_jsonl):
    config, tokenizer = make_config(write_jsonl(rows(10))), make_tokenizer()
    first = quiet(config, tokenizer)
    expected = first.train.tokens.tolist()
    folder = first.train.folder.parent
    for damage in ("truncate", "flip", "delete", "manifest"):
        path = folder / ("manifest.json" if damage == "manifest" else "train/tokens.npy")
        content = path.read_bytes()
        flipped = content[:-4] + bytes(byte ^ 1 for byte in content[-4:])
        path.unlink()
        if damage != "delete":
            path.write_bytes({"truncate": content[:-7], "flip": flipped, "manifest": b"{"}[damage])
        assert quiet(config, tokenizer).train.tokens.tolist() == expected, damage


def test_a_cache_folder_that_cannot_be_written_is_named(make_tokenizer, make_config, write_jsonl, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError) as caught:
        quiet(make_config(write_jsonl(rows(2)), cache_dir=blocked / "cache"), make_tokenizer())
    assert caught.value.at == "data.cache_dir"
    assert "can't be written" in caught.value.what


def test_the_progress_bar_is_for_people(make_tokenizer, make_config, write_jsonl, capsys):
    config = make_config(write_jsonl(rows(3)))
    tokenizer = make_tokenizer()
    objective = make_objective(config, tokenizer)
    prepare(config, tokenizer, objective, show_progress=False)
    assert capsys.readouterr().err == ""
    config.data = replace(config.data, cache_dir=config.data.cache_dir + "2")
    prepare(config, tokenizer, objective, show_progress=True)
    assert capsys.readouterr().out == ""  # it goes to stderr


@pytest.mark.parametrize("tokenizer_folder", [ROOT / "conf/model/tiny", SHARED / "tokenizer"])
def test_the_example_fills_98_percent(tokenizer_folder, make_config):
    from tunesmith.train.config.config import DataConfig, ModelConfig
    from tunesmith.train.data.tokenizer import load_tokenizer

    if not (tokenizer_folder / "tokenizer.json").is_file():
        pytest.skip(f"{tokenizer_folder} is not here")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tokenizer_folder)), DataConfig(train="unused"))
    data = quiet(make_config(str(EXAMPLE), sequence_length=512), tokenizer)
    assert data.train.fill >= 0.98


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_real_conversations_fill_98_percent(make_config):
    from tunesmith.train.config.config import DataConfig, ModelConfig
    from tunesmith.train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(SHARED / "tokenizer")), DataConfig(train="unused"))
    chats = [str(SHARED / "support/chat_train.jsonl")]
    data = quiet(
        make_config(chats, sequence_length=2048, validation=[str(SHARED / "support/chat_valid.jsonl")]), tokenizer
    )
    assert data.train.fill >= 0.98
    assert (data.report.train.num_rows, data.report.train.num_straddling, data.report.num_leaked) == (500, 0, 0)
