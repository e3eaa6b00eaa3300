"""ChatTemplate: transformers' own rendering is the reference; templates are hostile until shown otherwise."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Any

import pytest

from tests.text.test_tokenizer import real_gguf
from tramontane.errors import CorruptCheckpoint, InvalidRequest, TemplateError
from tramontane.text import sandbox
from tramontane.text.template import ChatTemplate, named_templates, select_template

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}</{{ m.role }}>\n{% endfor %}"
PARTS = """{%- for m in messages -%}
{%- if m.content is string -%}{{ m.content }}{%- else -%}
{%- for part in m.content -%}{%- if part.type == 'text' -%}[{{ part.text }}]{%- else -%}<media>{%- endif -%}
{%- endfor -%}{%- endif -%}{%- endfor -%}"""
FEATURES = """{{ bos_token }}{%- set ns = namespace(n=0, seen='') %}
{%- macro tag(name, body='') -%}<{{ name }}>{{ body }}{%- endmacro %}
    {% if tools %}
    {{ tools | tojson }}
    {{ tools[0] | tojson(indent=2) }}
    {% endif %}
{% for m in messages if m.role != 'skip' %}
    {% if loop.index > 4 %}{% break %}{% endif %}
    {% if m.content == 'pass' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + loop.length %}{%- set ns.seen = ns.seen ~ m.role[0] ~ loop.index0 %}
    {{ tag(m.role | upper, m.content | trim) }} {{ loop.first }} {{ loop.last }} {{ loop.previtem is defined }}
    {% generation %}{{ '%-10s|%03d' % (m.role, ns.n) }}{% endgeneration %}
{% endfor %}
{{ ns.seen }} {{ messages | map(attribute='role') | join(', ') }} {{ messages | length }} {{ range(3) | list }}
{{ messages[0].content.split(' ')[-1] }} {{ messages | selectattr('role', 'equalto', 'user') | list | count }}
{% set block %}{{ extra | default('none') }}{% endset %}{{ block | replace('n', 'N') | indent(2) }}
{% for key, value in documents[0].items() if documents %}{{ key }}={{ value }};{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}{{ eos_token }}"""
MESSAGES = [
    {"role": "system", "content": "  Be <b>kind</b> & brief. "},
    {"role": "skip", "content": "never"},
    {"role": "user", "content": "pass"},
    {"role": "user", "content": "Grüß dich 👋 'quoted' \"twice\""},
    {"role": "assistant", "content": "hello\n\n"},
    {"role": "user", "content": "too late"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "b": 1, "a": "<&>"}}}]


def theirs(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is the reference")
    rendered, _ = utils.render_jinja_template([messages], chat_template=source, **kwargs)
    return str(rendered[0])


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("source", [PLAIN, PARTS, FEATURES])
def test_renders_as_transformers(source: str, tools: list[dict[str, Any]] | None, prompt: bool) -> None:
    documents = [{"title": "t", "text": "x"}]
    ours = ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(
        MESSAGES, add_generation_prompt=prompt, tools=tools, documents=documents, extra="nine"
    )
    assert ours == theirs(
        source,
        MESSAGES,
        add_generation_prompt=prompt,
        tools=tools,
        documents=documents,
        extra="nine",
        bos_token="<s>",
        eos_token="</s>",
    )


SHOUTED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ '!' if loop.last }}</{{ m.role }}>{% endfor %}"


@pytest.mark.parametrize(
    "content", ["so far", "spaces behind   ", " both  ", "", [{"type": "text", "text": "in parts "}]]
)
@pytest.mark.parametrize("source", [PLAIN, SHOUTED])
def test_goes_on_with_the_final_message_as_transformers(source: str, content: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    joined = [{**message, "content": content if isinstance(content, str) else "in parts "} for message in messages[1:]]
    expected = theirs(source, [messages[0], *joined], continue_final_message=True)
    assert ChatTemplate(source).render(messages, continue_final_message=True) == expected
    assert expected.startswith("<user>Hi</user>")


def test_what_cannot_be_gone_on_with_is_refused() -> None:
    message = {"role": "user", "content": "Hi"}
    with pytest.raises(InvalidRequest, match="begins another"):
        ChatTemplate(PLAIN).render([message], continue_final_message=True, add_generation_prompt=True)
    for messages in ([], [{"role": "user"}]):
        with pytest.raises(InvalidRequest, match="does not end with a text"):
            ChatTemplate(PLAIN).render(messages, continue_final_message=True)
    with pytest.raises(TemplateError, match="cannot go on"):
        ChatTemplate("{{ messages[0].role }}").render([message], continue_final_message=True)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_reaches_templates_under_either_name(name: str) -> None:
    source = "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "assistant", "content": "x", name: "hm"}]
    assert ChatTemplate(source).render(messages) == theirs(source, messages) == "[hm|hm]x"


def test_reasoning_switches_are_passed_on() -> None:
    source = "{{ 'on' if enable_thinking else 'off' }} {{ reasoning_effort | default('medium') }}"
    assert ChatTemplate(source).render([], enable_thinking=True, reasoning_effort="high") == "on high"
    assert ChatTemplate(source).render([]) == "off medium"


def test_tools_have_a_template_of_their_own() -> None:
    template = ChatTemplate("plain {{ bos_token }}", bos_token="B", tool_use="{{ bos_token }} {{ tools | length }}")
    assert template.render([]) == template.render([], tools=[]) == "plain B"
    assert template.render([], tools=TOOLS) == "B 1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ dict(a=1, b=2) }}{{ dict.fromkeys([1, 2], 'x') }}{{ dict([('k', 'v')]) | tojson }}",
        "{% set n = namespace(self=3, d=dict(z=1)) %}{% set n.q = n.self + 1 %}{{ n.q }}{{ n.d.z }}",
        "{{ {'b': 1, 'a': 'ü'} | tojson(indent=1, sort_keys=true, ensure_ascii=true, separators=(';', '=')) }}",
    ],
)
def test_helpers_are_those_of_transformers(source: str) -> None:
    assert ChatTemplate(source).render([]) == theirs(source, [])


def test_smollm2_template(smollm2: Path) -> None:
    source = select_template(gguf=real_gguf(smollm2))
    assert source
    template = ChatTemplate(source, bos_token="<|im_start|>", eos_token="<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages) == theirs(source, messages, add_generation_prompt=True)
    assert template.render(messages).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert template.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == template.render(messages)


def test_parts_reach_a_template_that_reads_them_and_are_joined_for_others() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert ChatTemplate(PARTS).render([message]) == "[a][b]"
    assert ChatTemplate(PLAIN).render([message]) == "<user>ab</user>\n"
    assert ChatTemplate("{{ messages[0].content + '!' }}").render([message]) == "ab!"
    picture = {"role": "user", "content": [{"type": "image", "image": "x"}]}
    assert ChatTemplate(PARTS).render([picture]) == "<media>"
    with pytest.raises(InvalidRequest, match="image"):
        ChatTemplate(PLAIN).render([picture])


def test_special_tokens_and_dates() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ unk_token }}{{ pad_token }}", bos_token="B", special_tokens={"unk_token": "U"}
    )
    assert template.render([]) == "BU"
    assert re.fullmatch(r"\d{4}", ChatTemplate("{{ strftime_now('%Y') }}").render([]))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'other' %}", "loader"),
        ("{{ (1).__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__ }}{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "namespace"),
        ("{{ namespace(_x=1) }}", "namespace"),
        ("{{ dict.mro() }}", "no attribute"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_errors_carry_the_templates_words(source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(said)):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}", "{{ " + "(" * 5000, "x" * (2 << 20)])
def test_unreadable_templates(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(1000000) %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}",
        "{% set t %}{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}{% endset %}",
        "{% set x %}" + "x" * 999 + "{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        "{% set x = 'xx' %}" + "{% set x = x ~ x %}" * 40,
        "{% set x = 'xx' %}" + "{% set x = x + x %}" * 40,
        "{% set x = 'xx' %}" + "{% set x = x.replace('x', x) %}" * 9,
        "{% set x = 'xx' %}" + "{% set x = x | replace('x', x) %}" * 9,
        "{% set x = 'xx' %}" + "{% set x = x.join([x, x, x, x]) %}" * 40,
        "{% set x = [1, 2] %}" + "{% set x = x + x %}" * 40,
        "{{ 'x' * 1000000000000 }}",
        "{{ 1000000000000 * 'x' }}",
        "{{ [0] * 1000000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ [1] | batch(10000000000, 'x') | list }}",
        "{{ 'a\n' | indent(10000000000) }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ lipsum(100000) }}",
        "{% set x = ['x'] %}" + "{% set x = [x, x] %}" * 60 + "{{ raise_exception(x) }}",
        "{% set x = ['x'] %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x == 1 }}",
        "{% set x = {'a': 1} %}" + "{% set x = {'a': x.items(), 'b': x.items()} %}" * 60 + "{{ x | string }}",
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% if 'y' in x %}{% endif %}{% endfor %}",
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% set y = x.upper() %}{% endfor %}",
        "{% set x = 'x' * 9999999 %}{% for i in range(99999) %}{% set y = x ~ i %}{% endfor %}",
        "{{ ('x' * 9999999).encode('punycode') }}",
        "{{ ('x' * 999999).rfind('xy' ~ 'x' * 99999) }}",
        "{{ 7 ** 99999 // 3 ** 99999 }}",
        "{{ [] | tojson(indent='x' * 9999999) }}",
        "{{ ('<' * 999999) | striptags }}",
        "{{ strftime_now('%999999999d' * 99999) }}",
        "{% for i in range(99999) %}" + "{% set x, y = i, i %}" * 900 + "{% endfor %}",
        "{% macro m() %}" + "{% set x = -1 %}" * 900 + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
        "{{ ('ab c' * 999999) | title }}",
    ],
)
def test_what_never_ends_or_never_fits_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([])


def test_a_source_that_takes_long_to_compile_is_refused() -> None:
    ChatTemplate("{{ x }}" * 10_000)
    with pytest.raises(TemplateError, match="140000 characters"):
        ChatTemplate("{{ x }}" * 20_000)


def test_budgets_are_per_rendering_and_allow_long_conversations() -> None:
    template = ChatTemplate(PLAIN)
    messages = [{"role": "user", "content": "word " * 1000}] * 1000
    for _ in range(4):
        assert len(template.render(messages)) > 5_000_000
    assert sandbox.MAX_CHARS > 5_000_000


def test_only_plain_data_enters() -> None:
    class Role(str, enum.Enum):
        USER = "user"

    assert ChatTemplate(PLAIN).render([{"role": Role.USER, "content": 1}]) == "<user>1</user>\n"
    with pytest.raises(InvalidRequest, match="plain data"):
        ChatTemplate(PLAIN).render([{"role": "user", "content": object()}])
    with pytest.raises(InvalidRequest, match="messages"):
        ChatTemplate(PLAIN).render(["hello"])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="tools"):
        ChatTemplate(PLAIN).render([], tools=[print])  # type: ignore[list-item]
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(InvalidRequest, match="nested"):
        ChatTemplate(PLAIN).render([], extra=nested)


def test_which_template_is_chosen() -> None:
    config = {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}
    gguf = {"tokenizer.chat_template": "G", "tokenizer.chat_template.rag": "R", "tokenizer.ggml.model": "gpt2"}
    assert select_template(override="O", jinja_file="J", config=config, gguf=gguf) == "O"
    assert select_template(jinja_file="J", config=config, gguf=gguf) == "J"
    assert select_template(jinja_file="J", additional={"rag": "R"}, name="rag", config=config) == "R"
    assert select_template(jinja_file="J", additional={"rag": "R"}) == "J"
    assert named_templates(config=config, gguf=gguf) == {"default": "D", "tool_use": "T"}
    assert select_template(config=config, gguf=gguf) == "D"
    assert select_template(config=config, name="tool_use") == "T"
    assert select_template(config={"chat_template": "C"}, gguf=gguf) == "C"
    assert select_template(config={"chat_template": None}, gguf=gguf) == "G"
    assert select_template(gguf=gguf, name="rag") == "R"
    assert select_template(gguf={"tokenizer.chat_template.rag": "R"}) == "R"
    assert select_template() is None
    with pytest.raises(InvalidRequest, match="tool_use"):
        select_template(gguf=gguf, name="tool_use")
    for broken in (3, [3], [{"name": "x"}], {"default": 1}):
        with pytest.raises(CorruptCheckpoint):
            select_template(config={"chat_template": broken})
    with pytest.raises(CorruptCheckpoint):
        select_template(gguf={"tokenizer.chat_template": b"x"})
