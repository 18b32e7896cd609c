# /// script
# requires-python = ">=3.10"
# dependencies = ["transformers==5.24.0", "jinja2==3.1.6"]
# ///
"""Remakes cases.json: what Hugging Face transformers renders of conversations.

    uv run tests/golden/chat/make.py

The templates are ours, in the style of the families that they are named after: they write each family's documented format with the
constructs of Jinja that its published template is made of, in other words. `parts` reads lists of parts and documents;
`expressions.jinja` is Python that Jinja lets through, a template a line. What minijinja has otherwise is not among them: the operator % on
texts, floats with exponents that are printed, title() behind an apostrophe, how `e` spells quotes.
"""
import json
from datetime import datetime
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEMPLATES = {path.stem: path.read_text() for path in sorted((HERE / "templates").iterdir())}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Stands in recorded texts for the day on which they are rendered.
TODAY = "{TODAY}"


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id="abc123XYZ"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, description, properties, required):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    tool("get_weather", "Weather of a place — <b>now</b> & \"here\"", {
        "place": {"type": "string", "description": "A town's name, e.g. Köln"},
        "days": {"type": "integer", "default": 1, "minimum": 0.5},
    }, ["place"]),
    tool("noop", "Nothing", {}, []),
]
SYSTEM = say("system", "  Be brief & kind.\nUse <b>no</b> HTML. ")
HELLO = say("user", " Hé, what's \"up\"? 😀\n\n<|im_end|> {{ x }} ")
# Of OpenAI's shape, as its client sends it.
CONVERSATIONS = {
    "one": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [SYSTEM, HELLO, say("assistant", "\n Fine, thanks. \n"), say("user", "And ünïcode\t漢字?"), say("assistant", "Yes"), say("user", "Good")],
    "answered": [say("user", "1 < 2?"), say("assistant", "<think>\nSmaller & so on\n</think>\n\nYes ")],
    "thought": [say("user", "a"), say("assistant", "b", reasoning="because"), say("user", "c"), say("assistant", "d", reasoning_content="so\n", refusal=None)],
    "call": [say("user", "Weather in Köln?"), say("assistant", None, tool_calls=[call("get_weather", '{"place": "Köln <am Rhein>", "days": 2}')])],
    "tools": [
        SYSTEM, say("user", "Weather in Köln?"), say("assistant", None, tool_calls=[call("get_weather", '{"place":"Köln","days":2.0,"more":{"a":[1,null,true]}}')]),
        say("tool", '{"sky": "grey"}', tool_call_id="abc123XYZ", name="get_weather"), say("assistant", "Grey."), say("user", "Thanks & bye"),
    ],
    "two calls": [
        say("user", "Both?"), say("assistant", "Let me see.", tool_calls=[call("get_weather", '{"place": "A"}'), call("noop", "{}", "def456UVW")]),
        say("tool", "12°", tool_call_id="abc123XYZ"), say("tool", "ok", tool_call_id="def456UVW"),
    ],
    "parts": [say("system", [{"type": "text", "text": "Be brief."}]), say("user", [{"type": "text", "text": "What is"}, {"type": "text", "text": " this?"}], name="Tom")],
    "wrong turns": [say("user", "a"), say("user", "b"), say("user", "c")],
    "loop controls": [say("user", "a"), say("skip", "b"), say("assistant", "c"), say("end", "d"), say("user", "e")],
}
DOCUMENTS = [{"title": "Über", "text": "a <b>"}, {"title": "Two", "text": ""}]
DATA = {"list": [3, 1, 2], "none": None, "text": "é <b> 'q' \"d\"\n", "yes": True, "x": 1.5, "Empty": {}, "nothing": []}


def of_openai(messages, parts):
    """As vLLM reads what clients send: arguments as objects, parts as one text where the template reads texts."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for one in message.get("tool_calls") or []:
            one["function"]["arguments"] = json.loads(one["function"]["arguments"])
        if isinstance(message["content"], list) and not parts:
            message["content"] = "\n".join(part["text"] for part in message["content"])
    return messages


def render(template, messages, tools=None, documents=None, variables=None, end="whole"):
    """A case as the test reads it."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **TOKENS)
    tokenizer.chat_template = template if isinstance(template, dict) else TEMPLATES.get(template, template)
    asked = dict(messages=messages, tools=tools, documents=documents, variables=variables, end=end)
    try:
        text = tokenizer.apply_chat_template(
            of_openai(messages, template == "parts"), tools=tools, documents=documents, tokenize=False,
            add_generation_prompt=end == "answer", continue_final_message=end == "continued", **(variables or {}),
        )
        found = {"text": text.replace(datetime.now().strftime("%d %B %Y"), TODAY)}
    except Exception as e:  # noqa: BLE001: whatever it is, it is refused
        found = {"refused": f"{type(e).__name__}: {e}"}
    return {"template": template, **{name: value for name, value in asked.items() if value is not None}, **found}


cases = []
for family in TEMPLATES:
    variables = {"date_string": "26 Nov 2026"} if family == "llama3" else None
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            end = "answer" if messages[-1]["role"] != "assistant" else "whole"
            cases.append(render(family, messages, tools, variables=variables, end=end))
    cases.append(render(family, CONVERSATIONS["turns"], variables=variables))
    cases.append(render(family, CONVERSATIONS["answered"], variables=variables, end="continued"))
    cases.append(render(family, CONVERSATIONS["turns"][:3], variables=variables, end="continued"))
for thinking in (True, False):
    for family in ("qwen3", "smollm3"):
        cases.append(render(family, CONVERSATIONS["turns"], TOOLS, variables={"enable_thinking": thinking}, end="answer"))
cases.append(render("smollm3", [say("system", "Short. /no_think"), HELLO], end="answer"))
cases.append(render("smollm3", [say("system", "Mine only. /system_override"), HELLO], TOOLS, end="answer"))
builtin = {"date_string": "1", "builtin_tools": ["get_weather"], "tools_in_user_message": False}
cases.append(render("llama3", CONVERSATIONS["call"], TOOLS, variables=builtin))
cases.append(render("parts", CONVERSATIONS["parts"], documents=DOCUMENTS, end="answer"))
two = {"default": TEMPLATES["smollm2"], "tool_use": TEMPLATES["qwen2"]}
cases += [render(two, CONVERSATIONS["one"], tools) for tools in (None, [], TOOLS)]
for line in (HERE / "expressions.jinja").read_text().splitlines():
    messages = [say("system", "s"), say("user", "  a <b> 'c'\nd! ")]
    cases.append(render("{%- set m = messages[-1] %}" + line, messages, variables={"data": DATA}))
(HERE / "cases.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
refused = [case for case in cases if "refused" in case]
print(len(cases), "cases;", len(refused), "refused:")
for case in refused:
    print(str(case["template"])[:60], "|", case["refused"][:110])
