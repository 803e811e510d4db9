"""Chat templates: the text is what transformers makes of them, and no template reaches anything but the messages."""

from __future__ import annotations

import pytest

from cairn.data.text.conversations import ChatTemplate, special_variables
from cairn.errors import CairnError, InputError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <this> & that?"},
    {"role": "assistant", "content": "A stone."},
    {"role": "user", "content": "Où ça?"},
]
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{%- if messages[0].role == 'system' %}\n  {{- bos_token + messages[0].content }}\n{% endif %}\n{% for m in messages[1:] %}\n"
    "  {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n  {% else %}\n{{ m.content }}{{ eos_token }}\n  {%- endif %}\n{% endfor %}\n",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}\n{% endif %}{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m | tojson }} {% endfor %}"
    "{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_own(name: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for answer in (True, False):
        (theirs,), _ = render_jinja_template([TALK], chat_template=TEMPLATES[name], add_generation_prompt=answer, **tokens)
        assert ChatTemplate(TEMPLATES[name]).render(TALK, tokens, answer=answer) == theirs


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m }}", "syntax error in line 1"),
        ("\n\n{{ messages | nonsense }}", "syntax error in line 3: No filter named 'nonsense'."),
        ("{% include 'other' %}", "cannot be rendered"),
        ("{{ messages[0].nothing.more }}", "cannot be rendered: 'dict object' has no attribute 'nothing'."),
        ("{{ raise_exception('Roles must alternate.') }}", "refuses this conversation: Roles must alternate."),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
        ("{{ messages.append(1) }}", "cannot be rendered"),
        ("{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}", "cannot be rendered"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered"),
        ("{% for i in range(10000000) %}x{% endfor %}", "cannot be rendered"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
        ("x" * 2**21, "at most"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence_and_runs_nothing(template: str, said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CairnError) as error:
        ChatTemplate(template, "The template").render(TALK)
    assert said in str(error.value) and str(error.value).startswith("The template") and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


def test_conversations_that_are_none() -> None:
    made = ChatTemplate(TEMPLATES["chatml"])
    for messages, said in (
        ([], "at least one"),
        (["hello"], "Message 1"),
        ([TALK[0], {"role": "user"}], "Message 2"),
        ([{"role": "robot", "content": "x"}], "'robot'"),
        ([{"role": "user", "content": 3}], "both of them text"),
    ):
        with pytest.raises(InputError, match=said):
            made.render(messages)


def test_special_tokens_as_strings_and_as_objects() -> None:
    assert special_variables({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "model_max_length": 3}) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
