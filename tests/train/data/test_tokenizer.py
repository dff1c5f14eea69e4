import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.train.config.config import DataConfig, ModelConfig
from tunesmith.train.data.tokenizer import CHATML_TEMPLATE, RAW_TEMPLATE, load_tokenizer
from tunesmith.train.errors import ConfigError, ModelError
from tunesmith.train.paths import resolve_path

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def save_tokenizer(tmp_path):
    """Saves a tokenizer of single characters and returns its folder."""

    def save(template=None, added=(), adds_bos=False, **names):
        backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abc<>|_:\n")}, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.add_special_tokens([AddedToken(name, special=True) for name in (*added, *names.values())])
        if adds_bos:
            bos = (names["bos_token"], backend.token_to_id(names["bos_token"]))
            backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def load(folder, chat_template="auto", **model):
    return load_tokenizer(ModelConfig(name_or_path=folder, **model), DataConfig(train="x", chat_template=chat_template))


def test_auto_keeps_the_template_of_the_tokenizer(save_tokenizer):
    folder = save_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}", eos_token="</s>")
    assert load(folder).apply_chat_template(CHAT, tokenize=False) == "ab"


def test_auto_without_one_is_chatml_that_ends_turns_with_eos(save_tokenizer):
    tokenizer = load(save_tokenizer(eos_token="</s>"))
    assert tokenizer.chat_template == CHATML_TEMPLATE
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == "<|im_start|>user\na</s>\n<|im_start|>assistant\nb</s>\n"
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_chatml_writes_the_bos_that_the_tokenizer_wants(save_tokenizer):
    tokenizer = load(save_tokenizer(bos_token="<s>", eos_token="</s>", adds_bos=True))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<s><|im_start|>")
    assert load(save_tokenizer(bos_token="<s>", eos_token="</s>")).chat_template == CHATML_TEMPLATE


def test_raw_adds_eos_and_nothing_else(save_tokenizer):
    tokenizer = load(save_tokenizer("{{ messages }}", eos_token="</s>"), "raw")
    assert tokenizer.chat_template == RAW_TEMPLATE
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "ab</s>"
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == "a"


def test_a_file_is_a_template(save_tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}", encoding="utf-8")
    assert load(save_tokenizer(eos_token="</s>"), str(path)).apply_chat_template(CHAT, tokenize=False) == "<a><b>"


def test_saving_ships_the_template(save_tokenizer, tmp_path):
    load(save_tokenizer(eos_token="</s>")).save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML_TEMPLATE


@pytest.mark.parametrize(
    ("added", "names", "pad"),
    [
        ((), {"eos_token": "</s>", "pad_token": "<p>"}, "<p>"),
        (("<|finetune_right_pad_id|>",), {"eos_token": "</s>"}, "<|finetune_right_pad_id|>"),
        (("<|endoftext|>",), {"eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ((), {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        ((), {"eos_token": "</s>"}, "</s>"),
    ],
)
def test_the_padding_token_is_one_that_is_there(added, names, pad, save_tokenizer):
    folder = save_tokenizer(added=added, **names)
    size = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load(folder)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == size  # no embedding grows


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "nowhere"))
    assert caught.value.what == f"the tokenizer of {tmp_path}/nowhere can't be loaded: there is no such folder"
    assert caught.value.at == "model.name_or_path"


def test_a_damaged_tokenizer_is_named(save_tokenizer, tmp_path):
    folder = save_tokenizer(eos_token="</s>")
    (tmp_path / "model/tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"the tokenizer of {folder} can't be loaded: ."):
        load(folder)


def test_a_tokenizer_without_eos_cannot_have_a_template_of_ours(save_tokenizer):
    with pytest.raises(ModelError, match="has no eos token, so no answer could end"):
        load(save_tokenizer())


@pytest.mark.parametrize(
    ("template", "problem"), [("{% for %}", "the chat template can't render"), ("{{ nope() }}", "'nope' is undefined")]
)
def test_a_template_that_does_not_render_is_an_error(template, problem, save_tokenizer, tmp_path):
    (tmp_path / "bad.jinja").write_text(template)
    with pytest.raises(ConfigError, match=problem) as caught:
        load(save_tokenizer(eos_token="</s>"), str(tmp_path / "bad.jinja"))
    assert caught.value.key == "data.chat_template"


def test_a_template_file_that_is_not_there_is_an_error(save_tokenizer):
    with pytest.raises(ConfigError, match=r"data.chat_template=mine.jinja is neither auto, raw nor a file"):
        load(save_tokenizer(eos_token="</s>"), "mine.jinja")


def test_conf_names_lie_in_the_config_folder():
    assert resolve_path("conf://model/tiny").endswith("/conf/model/tiny")
    assert resolve_path("org/name") == "org/name"
