import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.train.redact import HIDDEN, names_a_secret, redact, redact_text

SECRET_NAMES = """
    api_key apiKey WANDB_API_KEY OPENAI_API_KEY token hf_token HF_TOKEN access_token refreshToken password db_password
    MYSQL_PWD secret client_secret AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN authorization credentials
    private_key passphrase connection_string basic_auth track.wandb.api_key cookie
"""
PLAIN_NAMES = """
    max_new_tokens tokens num_tokens tokenizer tokenizer_name eos_token pad_token bos_token_id token_accuracy token_type
    loss_per_token last_token num_key_value_heads key cache_key author secretary monkey password_file HF_TOKEN_PATH
    SSH_AUTH_SOCK PWD OLDPWD TOKENIZERS_PARALLELISM learning_rate target_modules name_or_path
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets_are_known(name: str) -> None:
    assert names_a_secret(name)
    assert redact({name: "value"}) == {name: HIDDEN}


@pytest.mark.parametrize("name", PLAIN_NAMES.split())
def test_names_of_other_things_are_left_alone(name: str) -> None:
    assert not names_a_secret(name)
    assert redact({name: "value"}) == {name: "value"}


def test_a_config_without_secrets_comes_back_equal() -> None:
    config = {
        "name": "run",
        "optimizer": {"learning_rate": 2e-3, "betas": [0.9, 0.95]},
        "data": {"train": ["a.jsonl", "hub:org/set:train"], "chat_template": None},
        "generation": {"max_new_tokens": 256, "eos_token": "<|im_end|>"},
        "trust_remote_code": False,
        "url": "https://huggingface.co/org/model?revision=main",
    }
    assert redact(config) == config


def test_secrets_are_found_at_any_depth_and_the_original_stays() -> None:
    config = {"a": [{"b": {"password": "hunter2"}}], "c": ({"token": "t"},), "headers": {"credentials": {"user": "me"}}}
    assert redact(config) == {
        "a": [{"b": {"password": HIDDEN}}],
        "c": [{"token": HIDDEN}],
        "headers": {"credentials": HIDDEN},
    }
    assert config["a"] == [{"b": {"password": "hunter2"}}]


@pytest.mark.parametrize("empty", [None, "", True, False])
def test_an_absent_secret_is_shown_as_absent(empty: object) -> None:
    assert redact({"api_key": empty}) == {"api_key": empty}


def test_a_numeric_password_is_hidden_too() -> None:
    assert redact({"password": 12345}) == {"password": HIDDEN}


def test_values_of_the_environment_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "kanarienvogel-1")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:kanarienvogel-2@proxy:3128")
    monkeypatch.setenv("PLAIN_SETTING", "kanarienvogel-3")
    config = {"note": "as kanarienvogel-1 says", "x": "kanarienvogel-2", "y": "kanarienvogel-3"}
    assert redact(config) == {"note": f"as {HIDDEN} says", "x": HIDDEN, "y": "kanarienvogel-3"}
    assert "kanarienvogel-1" not in redact_text("Traceback: KeyError: 'kanarienvogel-1'")


def test_values_of_the_command_line_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["train.py", "+hub.token=kanarienvogel-1", "--api-key", "kanarienvogel-2", "seed=12345678"]
    )
    assert redact_text("kanarienvogel-1 kanarienvogel-2 12345678") == f"{HIDDEN} {HIDDEN} 12345678"


def test_a_short_value_is_left_alone_where_its_key_names_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_AUTH", "none")  # or the config of the run could not be read back
    assert redact({"kind": "none", "password": "none"}) == {"kind": "none", "password": HIDDEN}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pa55word@host/x", f"https://{HIDDEN}@host/x"),
        ("git clone https://ghx_0123456789@github.com/a/b", f"git clone https://{HIDDEN}@github.com/a/b"),
        ("https://host/x?token=abc&page=2", f"https://host/x?token={HIDDEN}&page=2"),
        ("{'api_key': 'abc', 'x': 1}", f"{{'api_key': '{HIDDEN}', 'x': 1}}"),
        ('{"password": "abc"}', f'{{"password": "{HIDDEN}"}}'),
        ("Authorization: Bearer abcdef0123456789", f"Authorization: Bearer {HIDDEN}"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {HIDDEN}"),
        ("key hf_" + "a1B2" * 8 + " is invalid", f"key {HIDDEN} is invalid"),
        ("AKIAIOSFODNN7EXAMPLE", HIDDEN),
    ],
)
def test_secrets_in_free_text_are_hidden(text: str, clean: str) -> None:
    assert redact_text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "Unexpected token: } at line 3",
        "mail me@example.com, git@github.com:org/repo.git",
        "max_new_tokens=256 eos_token='<|im_end|>' learning_rate=1e-3",
        "https://host:8080/path?page=2#part",
        "a basic understanding of tokens",
    ],
)
def test_ordinary_text_is_not_touched(text: str) -> None:
    assert redact_text(text) == text


def test_a_secret_that_a_library_has_shortened_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "kanarienvogel-1-of-a-cage")
    assert redact_text("Value 'kanarienvogel-1-of... is wrong") == f"Value '{HIDDEN}... is wrong"
    assert redact_text("'kanarienvogel…'") == f"'{HIDDEN}…'"
    assert redact_text("kanarienvogel-2 and kanarienvogel-1-of-a-cage") == f"kanarienvogel-2 and {HIDDEN}"


def test_tracebacks_of_any_thread_are_printed_without_secrets(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, threading\nfrom tunesmith.train.redact import redact_uncaught\nredact_uncaught()\n"
        "def fail():\n    raise RuntimeError('it is ' + os.environ['MY_API_KEY'])\n"
        "thread = threading.Thread(target=fail)\nthread.start()\nthread.join()\nfail()\n"
    )
    environment = os.environ | {"MY_API_KEY": "kanarienvogel-1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count(f"RuntimeError: it is {HIDDEN}\n") == 2
    assert "kanarienvogel-1" not in done.stderr
