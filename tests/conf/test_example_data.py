import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

CONF = Path(__file__).parents[2] / "conf"
EXAMPLE = CONF / "data" / "example"
TINY = CONF / "model" / "tiny"

Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text("utf-8").splitlines()]


def user_texts(name: str) -> list[str]:
    return [m["content"] for row in rows(name) for m in row["messages"] if m["role"] == "user"]


def all_texts() -> list[str]:
    pairs = [text for row in rows("train.jsonl") + rows("heldout.jsonl") for text in row.values()]
    chats = rows("chat_train.jsonl") + rows("chat_heldout.jsonl")
    return pairs + [message["content"] for row in chats for message in row["messages"]]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def core(text: str, openings: list[list[str]], closings: list[list[str]]) -> str:
    """The words of a prompt without case, punctuation, opening and closing."""
    found = words(text)
    found = next((found[len(o) :] for o in openings if found[: len(o)] == o and len(found) > len(o)), found)
    found = next((found[: -len(c)] for c in closings if found[-len(c) :] == c and len(found) > len(c)), found)
    return " ".join(found)


def loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{script.parent.name}_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build() -> ModuleType:
    return loaded(EXAMPLE / "build.py")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY, local_files_only=True)


@pytest.mark.parametrize("script", [EXAMPLE / "build.py", TINY / "build_tokenizer.py"], ids=lambda path: path.name)
def test_the_committed_files_are_what_the_script_writes(script: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    assert loaded(script).main() == 0, capsys.readouterr().err


def test_a_stale_file_is_found_and_named(build: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    texts = build.build()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.setattr(build, "build", lambda: texts)
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["build.py", "--check"])
    assert build.main() == 1
    assert capsys.readouterr().err.startswith(f"stale in {tmp_path}: train.jsonl.\n  do: python")
    monkeypatch.setattr(sys, "argv", ["build.py"])
    assert build.main() == 0
    assert (tmp_path / "train.jsonl").read_text("utf-8") == texts["train.jsonl"]


def test_there_is_enough_of_everything(build: ModuleType) -> None:
    intents = build.load_intents()
    assert len({intent.name for intent in intents}) == len(intents) >= 44
    for intent in intents:
        assert len(intent.train) >= 12, intent.name
        assert len(intent.heldout) >= 2, intent.name
        assert 20 <= len(intent.answer.split()) <= 45, intent.name
    enough = {"train.jsonl": 1000, "heldout.jsonl": 100, "chat_train.jsonl": 120, "chat_heldout.jsonl": 20}
    assert {name: len(rows(name)) for name, count in enough.items() if len(rows(name)) < count} == {}
    assert sum(path.stat().st_size for path in EXAMPLE.glob("*.jsonl")) < 700_000


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_prompt_occurs_once_and_every_intent_has_one_answer(build: ModuleType, name: str) -> None:
    intents, found = build.load_intents(), rows(name)
    answers = {intent.answer for intent in intents}
    assert all(row.keys() == {"prompt", "completion"} and row["prompt"].strip() for row in found)
    assert len(answers) == len(intents)
    assert {row["completion"] for row in found} == answers
    assert {(i.answer, wording) for i in intents for wording in (i.train if name == "train.jsonl" else i.heldout)} <= {
        (row["completion"], row["prompt"]) for row in found
    }
    assert max(Counter(row["prompt"] for row in found).values()) == 1
    assert len(set(Counter(row["completion"] for row in found).values())) == 1, "the intents are not equally frequent"


def test_no_wording_belongs_to_two_intents(build: ModuleType) -> None:
    owners = defaultdict(set)
    for intent in build.load_intents():
        for wording in (*intent.train, *intent.heldout):
            owners[" ".join(words(wording))].add(intent.name)
    assert [wording for wording, names in owners.items() if len(names) > 1] == []


def test_nothing_held_out_is_in_training(build: ModuleType) -> None:
    phrases = build.load_phrases()
    starts = sorted((words(o) for o in (*phrases.openings, *phrases.second_turns)), key=len, reverse=True)
    ends = sorted((words(c) for c in phrases.closings), key=len, reverse=True)
    train = [*(row["prompt"] for row in rows("train.jsonl")), *user_texts("chat_train.jsonl")]
    held = [*(row["prompt"] for row in rows("heldout.jsonl")), *user_texts("chat_heldout.jsonl")]
    seen = {form for prompt in train for form in (" ".join(words(prompt)), core(prompt, starts, ends))}
    held_forms = {form for prompt in held for form in (" ".join(words(prompt)), core(prompt, starts, ends))}
    assert held_forms & seen == set()


def test_a_held_out_wording_shares_less_than_60_percent_of_its_words(build: ModuleType) -> None:
    for intent in build.load_intents():
        for wording in intent.heldout:
            for known in intent.train:
                ours, theirs = set(words(wording)), set(words(known))
                assert len(ours & theirs) / len(ours | theirs) < 0.6, f"{intent.name}: {wording!r}, {known!r}"


@pytest.mark.parametrize("name", ["chat_train.jsonl", "chat_heldout.jsonl"])
def test_a_chat_begins_with_the_system_and_answers_every_user(build: ModuleType, name: str) -> None:
    answers = {intent.answer for intent in build.load_intents()}
    lengths = set()
    for row in rows(name):
        messages = row["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"][: len(messages)]
        assert all(m["content"] in answers for m in messages if m["role"] == "assistant")
        lengths.add(len(messages))
    assert lengths == {3, 5}


def test_the_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in {*all_texts(), "naïve 3 °C – 漢字 🌱\n\ttab  two spaces"}:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_distinct_and_agree_with_the_configs(tokenizer: PreTrainedTokenizerFast) -> None:
    config, generation = AutoConfig.from_pretrained(TINY), GenerationConfig.from_pretrained(TINY)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == config.vocab_size
    assert config.vocab_size % 64 == 0
    for owner in (config, generation):
        assert (owner.pad_token_id, owner.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert owner.bos_token_id is None
    assert config.max_position_embeddings == tokenizer.model_max_length == 1024


def test_the_chat_template_is_chatml_and_adds_no_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    question = [{"role": "user", "content": " Hi\n"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\n"
    answered = [{"role": "system", "content": "S"}, *question, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.eos_token_id) == 3, "a turn's end must be one token"


def test_the_folder_holds_no_weights() -> None:
    assert [path.name for path in TINY.iterdir() if path.suffix in {".safetensors", ".bin", ".pt"}] == []
