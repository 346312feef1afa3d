"""Templates as they behave: system messages, changed texts, arguments, dates."""

from __future__ import annotations

import pytest
import tiny_tokenizers
from tiny_models import make_folder, make_lm, make_tokenizer

from cor_prompt import encode_prompt
from loading.templates import DATE, for_server, parse_arguments, set_arguments
from loading.tokenizer import load_tokenizer
from runtime.errors import UserError

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATES = ("{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('Conversation roles must alternate') }}{% endif %}")
REFUSES = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def with_template(turn: str, end: str = END):
    tokenizer = tiny_tokenizers.chatml()
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + end
    return tokenizer


def shown(messages, tokenizer) -> str:
    return tokenizer.decode(encode_prompt(messages, tokenizer))


SYSTEM = {"role": "system", "content": "Prefer the shorter one.\n"}
USER, REPLY = {"role": "user", "content": "which?"}, {"role": "assistant", "content": "the first"}


@pytest.mark.parametrize("turn", ["{% if m.role != 'system' %}" + TURN + "{% endif %}", REFUSES + TURN,
                                  ALTERNATES + TURN], ids=["drops", "refuses", "alternates"])
def test_without_a_system_role_the_instructions_open_the_first_user_turn(turn, capsys):
    tokenizer = with_template(turn)
    wanted = ("<|im_start|>user\nPrefer the shorter one.\n\n\nwhich?<|im_end|><|im_start|>assistant\n")
    assert shown([SYSTEM, USER], tokenizer) == wanted
    assert shown([SYSTEM, USER, REPLY, USER], tokenizer).count("Prefer") == 1
    assert shown([USER], tokenizer).count("<|im_start|>user") == 1
    said = capsys.readouterr()
    assert said.err.count("no system role") == 1 and not said.out, "once, and not among results"


def test_a_template_with_a_system_role_keeps_it(capsys):
    assert shown([SYSTEM, USER], with_template(TURN)).startswith("<|im_start|>system\nPrefer")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [
    "m.content | upper", "m.content | lower", "m.content | e", "m.content | tojson", "m.content.replace('\\n', ' ')",
    "m.content + m.content", "m.content[:5]", "m.content.split() | join(' ')",
    "m.content if m.role == 'user' else ''"])
def test_a_template_that_changes_a_text_is_refused_and_names_the_message(content):
    tokenizer = with_template(TURN.replace("m.content", content))
    with pytest.raises(UserError, match=r"message [12] \((user|assistant)\)"):
        encode_prompt([USER, REPLY, USER], tokenizer)


def test_a_template_may_trim_blanks_and_show_nothing_for_an_empty_text():
    tokenizer = with_template(TURN.replace("m.content", "m.content | trim"))
    for content, wanted in (("\n which? ", "which?"), (" ", "")):
        text = shown([{"role": "user", "content": content}], tokenizer)
        assert text.startswith(f"<|im_start|>user\n{wanted}<|im_end|>")


def test_roles_that_a_template_refuses_are_an_error_of_one_line():
    with pytest.raises(UserError, match="roles must alternate"):
        encode_prompt([USER, USER], with_template(ALTERNATES + TURN))


# ---- arguments and dates -------------------------------------------------------------------------------

THINKING = ("{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
            "{% endif %}")


def test_template_arguments_reach_the_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + TURN + "{% endfor %}" + THINKING.replace("<think>", "w1")
    tokenizer.save_pretrained(make_folder(tmp_path, make_lm()))
    plain, without = (load_tokenizer(str(tmp_path), args) for args in ((), ["enable_thinking=false"]))
    prompt = encode_prompt([{"role": "user", "content": "w2"}], plain)
    assert encode_prompt([{"role": "user", "content": "w2"}], without)[: len(prompt)] == prompt
    assert len(encode_prompt([{"role": "user", "content": "w2"}], without)) > len(prompt)
    with pytest.raises(UserError, match="enable_thinkin: "):
        load_tokenizer(str(tmp_path), ["enable_thinkin=false"])


def test_arguments_are_read_as_json_or_text():
    assert parse_arguments(["a=false", "b=3", "c=low", 'd="x=y"']) == {"a": False, "b": 3, "c": "low", "d": "x=y"}
    for wrong in ("enable_thinking", "=3", "a b=3"):
        with pytest.raises(UserError, match="name=value"):
            parse_arguments([wrong])


@pytest.mark.parametrize("given, wanted", [({}, "26 Jul 2024"), ({"date": "2025-03-01"}, "01 Mar 2025")])
def test_a_template_that_shows_the_date_shows_a_fixed_one(given, wanted):
    tokenizer = with_template(TURN, "{{ strftime_now('%d %b %Y') }}" + END)
    set_arguments(tokenizer, given)
    assert shown([USER], tokenizer).endswith(f"{wanted}<|im_start|>assistant\n")
    assert tokenizer.template_args == {"date": given.get("date", DATE)}


def test_a_date_that_is_none_is_refused():
    tokenizer = with_template(TURN, "{{ strftime_now('%d %b %Y') }}" + END)
    set_arguments(tokenizer, {"date": "tomorrow"})
    with pytest.raises(UserError, match="date"):
        encode_prompt([USER], tokenizer)


def test_a_server_gets_the_arguments_in_the_request():
    assert for_server({}) == {}
    assert for_server({"enable_thinking": False}) == {"chat_template_kwargs": {"enable_thinking": False}}
    assert for_server({"date": DATE})["chat_template_kwargs"]["date_string"] == "26 Jul 2024"
