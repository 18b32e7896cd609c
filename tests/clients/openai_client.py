"""OpenAI's own client against `zebroid serve` with the embedded teacher: everything that it can ask of the server, asserted.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=.. LIMITED_API_KEY=.. python tests/clients/openai_client.py
    .. --record tests/clients/exchanges.json      # also keeps what went over the wire, for tests without Python

LIMITED_API_KEY may ask twice a minute. `cargo test clients` starts the server, and runs this where Python has the package; how the server
is started stands in mod.rs.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["openai==3.57.0"]
# ///
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Literal

import httpx2
import openai
from pydantic import BaseModel, Field

MODEL = "teacher"
VOCAB = json.loads((Path(__file__).parents[2] / "assets/teacher/tokenizer.json").read_text())["model"]["vocab"]
NO_END, NO_LINES = {str(VOCAB["</s>"]): -100}, {str(VOCAB["Ċ"]): -100}
MESSAGES = [{"role": "system", "content": "One day"}, {"role": "user", "content": "Tom had a red"}]
GREEDY = dict(model=MODEL, temperature=0)
VOWELS = list("aeiou")


class Toy(BaseModel):
    """So little that an answer is whole on every processor."""
    name: Literal["ball", "kite", "boat"]
    big: bool
    seen: list[Literal["park", "lake"]] = Field(min_length=1, max_length=2)


class Look(BaseModel):
    """Looks at a place."""
    place: Literal["park", "lake"]


class Recorder(httpx2.HTTPTransport):
    """Keeps every request and its answer."""

    def __init__(self):
        super().__init__()
        self.exchanges = []

    def handle_request(self, request):
        response = super().handle_request(request)
        body = response.read()
        key = {os.environ["OPENAI_API_KEY"]: "own", os.environ["LIMITED_API_KEY"]: "limited"}
        asked = {"method": request.method, "path": request.url.raw_path.decode(),
                 "key": key.get(request.headers["authorization"].removeprefix("Bearer "), "wrong")}
        if request.content:
            asked["body"] = json.loads(request.content)
        told = {"status": response.status_code, "type": response.headers["content-type"], "retry": "retry-after" in response.headers}
        if told["type"] == "text/event-stream":
            told["events"] = [event(block) for block in body.decode().strip().split("\n\n")]
        else:
            told["body"] = json.loads(body)
        self.exchanges.append({"asked": asked, "told": told})
        return httpx2.Response(response.status_code, headers=response.headers, content=body, request=request)

    def write(self, path):
        lines = ",\n".join(json.dumps(exchange) for exchange in self.exchanges)
        Path(path).write_text(f"[\n{lines}\n]\n")


def event(block):
    """Name and data of a server-sent event."""
    fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
    data = fields["data"]
    return [fields.get("event"), data if data == "[DONE]" else json.loads(data)]


def refused(kind, param, call, **fields):
    """Expects an error of OpenAI's class `kind`, which names `param`."""
    try:
        call(**fields)
    except kind as error:
        assert type(error) is kind and error.param == param and error.body["message"], error
        return error
    raise AssertionError(f"{fields} was not refused")


def joined(chunks, choice=0):
    """A streamed text."""
    pieces = (c for chunk in chunks for c in chunk.choices if c.index == choice)
    return "".join(c.text if hasattr(c, "text") else c.delta.content or "" for c in pieces)


def models(client):
    names = [model.id for model in client.models.list()]
    assert names == [MODEL, "other"], names
    assert client.models.retrieve(MODEL).owned_by == "zebroid"


def chat(client):
    create = client.chat.completions.create
    plain = create(messages=MESSAGES, max_completion_tokens=12, **GREEDY)
    choice, usage = plain.choices[0], plain.usage
    text = choice.message.content
    assert plain.object == "chat.completion" and plain.model == MODEL and plain._request_id
    assert choice.message.role == "assistant" and choice.finish_reason == "length" and text
    assert usage.completion_tokens == 12 and usage.total_tokens == usage.prompt_tokens + 12

    # Content in parts, roles and fields of other models and of OpenAI's own service.
    parts = [{"role": "developer", "content": [{"type": "text", "text": "One day"}]}, MESSAGES[1]]
    parts = create(messages=parts, max_tokens=12, user="me", store=False, metadata={"a": "b"}, service_tier="auto",
                   reasoning_effort="low", parallel_tool_calls=False, **GREEDY)
    assert parts.choices[0].message.content == text

    chunks = list(create(messages=MESSAGES, max_completion_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert joined(chunks) == text and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12 and all(c.usage is None for c in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({c.id for c in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    bare = list(create(messages=MESSAGES, max_completion_tokens=12, stream=True, **GREEDY))
    assert joined(bare) == text and all(c.choices and c.usage is None for c in bare)
    with client.chat.completions.stream(messages=MESSAGES, max_completion_tokens=12, **GREEDY) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        assert deltas == text == stream.current_completion_snapshot.choices[0].message.content


def choices(client):
    """Several answers, drawn: each its own, by the seed."""
    ask = dict(model=MODEL, messages=MESSAGES, n=3, temperature=1.2, seed=7, max_completion_tokens=10, logit_bias=NO_END)
    texts = [choice.message.content for choice in client.chat.completions.create(**ask).choices]
    assert len(set(texts)) > 1, texts
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert [joined(chunks, i) for i in range(3)] == texts
    other = client.chat.completions.create(**ask | dict(seed=8))
    assert [choice.message.content for choice in other.choices] != texts


def settings(client):
    create = client.chat.completions.create
    # Vowels cannot be avoided for long.
    stopped = create(messages=MESSAGES, max_completion_tokens=60, stop=VOWELS, **GREEDY)
    text = stopped.choices[0].message.content
    assert stopped.choices[0].finish_reason == "stop" and not set(text) & set(VOWELS), text
    chunks = list(create(messages=MESSAGES, max_completion_tokens=60, stop=VOWELS, stream=True, **GREEDY))
    assert joined(chunks) == text and chunks[-1].choices[0].finish_reason == "stop"
    biased = create(messages=MESSAGES, max_completion_tokens=5, logit_bias={str(VOCAB["x"]): 100}, **GREEDY)
    assert biased.choices[0].message.content == "xxxxx"
    # Of two tokens that are far likelier than all others, one is not said for ever.
    bias = {str(VOCAB["x"]): 80, str(VOCAB["y"]): 80}
    for penalty in ("frequency_penalty", "presence_penalty"):
        varied = create(messages=MESSAGES, max_completion_tokens=40, logit_bias=bias, temperature=2, seed=1, model=MODEL, **{penalty: 2})
        assert set(varied.choices[0].message.content) == {"x", "y"}
    nucleus = create(messages=MESSAGES, max_completion_tokens=8, model=MODEL, temperature=2, top_p=1e-6)
    greedy = create(messages=MESSAGES, max_completion_tokens=8, extra_body={"top_k": 1}, model=MODEL)
    assert nucleus.choices[0].message.content == greedy.choices[0].message.content


def logprobs(client):
    ask = dict(messages=MESSAGES, max_completion_tokens=6, logprobs=True, top_logprobs=3, **GREEDY)
    choice = client.chat.completions.create(**ask).choices[0]
    known = choice.logprobs.content
    assert len(known) == 6 and bytes(b for one in known for b in one.bytes).decode() == choice.message.content
    for one in known:
        top = [t.logprob for t in one.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and one.logprob == top[0] <= 0 and one.token == one.top_logprobs[0].token
    chunks = list(client.chat.completions.create(stream=True, **ask))
    assert [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content] == known


def structured(client):
    create = client.chat.completions.create
    brace = {str(VOCAB["}"]): 100}
    empty = create(messages=MESSAGES, response_format={"type": "json_object"}, logit_bias=brace, max_completion_tokens=60, **GREEDY)
    assert json.loads(empty.choices[0].message.content) == {} and empty.choices[0].finish_reason == "stop"
    # A model that knows no JSON likes to begin new lines in it.
    ask = dict(messages=MESSAGES, response_format=Toy, max_completion_tokens=120, logit_bias=NO_LINES, **GREEDY)
    for chats in (client.chat, client.beta.chat):
        parsed = chats.completions.parse(**ask).choices[0]
        assert parsed.finish_reason == "stop" and isinstance(parsed.message.parsed, Toy)
    with client.chat.completions.stream(**ask) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed.message.parsed
    try:
        client.chat.completions.parse(**ask | dict(max_completion_tokens=2))
        raise AssertionError("an answer that is cut short was parsed")
    except openai.LengthFinishReasonError:
        pass


def tools(client):
    """Calls of tools, which the embedded teacher makes where it has to."""
    create = client.chat.completions.create
    both = [openai.pydantic_function_tool(Look), openai.pydantic_function_tool(Toy)]
    ask = dict(messages=MESSAGES, tools=both, max_completion_tokens=150, **GREEDY)
    named = dict(tool_choice={"type": "function", "function": {"name": "Look"}})
    choice = create(**ask | named).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and call.type == "function" and call.id
    assert call.function.name == "Look" and Look.model_validate_json(call.function.arguments)

    chunks = list(create(stream=True, stream_options={"include_usage": True}, **ask | named))[:-1]
    deltas = [delta for c in chunks for delta in c.choices[0].delta.tool_calls or []]
    assert joined(chunks) == "" and chunks[-1].choices[0].finish_reason == "tool_calls" and {delta.index for delta in deltas} == {0}
    assert deltas[0].id and deltas[0].function.name == "Look"
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    with client.chat.completions.stream(**ask | named) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert [event.name for event in done] == ["Look"] and isinstance(done[0].parsed_arguments, Look)
    parsed = client.chat.completions.parse(tool_choice="required", parallel_tool_calls=False, **ask).choices[0].message.tool_calls
    assert isinstance(parsed[0].function.parsed_arguments, (Look, Toy)) and len(parsed) == 1

    # The result is told, and the conversation goes on.
    told = MESSAGES + [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "a lake"}]
    assert create(**ask | dict(messages=told, tool_choice="none")).choices[0].message.tool_calls is None
    free = create(**ask | dict(tool_choice="auto", max_completion_tokens=5)).choices[0]
    assert free.finish_reason == "length" and free.message.content
    refused(openai.BadRequestError, "tool_choice", create, **ask | dict(tool_choice={"type": "function", "function": {"name": "absent"}}))


def completions(client):
    create = client.completions.create
    ids = [VOCAB["<s>"], VOCAB["Tom"], VOCAB["Ġhad"]]
    plain = create(prompt="Tom had", max_tokens=10, **GREEDY)
    text = plain.choices[0].text
    assert plain.object == "text_completion" and plain.choices[0].finish_reason == "length" and plain.usage.prompt_tokens == 3
    assert create(prompt=ids, max_tokens=10, **GREEDY).choices[0].text == text
    assert create(prompt="Tom had", **GREEDY).usage.completion_tokens == 16
    both = create(prompt=["Tom had", "Mia saw"], max_tokens=10, n=2, **GREEDY)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and [c.text for c in both.choices[:2]] == [text] * 2
    assert create(prompt=[ids, ids[:2]], max_tokens=10, **GREEDY).choices[0].text == text
    chunks = list(create(prompt="Tom had", max_tokens=10, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert joined(chunks) == text and chunks[-1].usage.total_tokens == 13
    chunks = list(create(prompt="Tom had", max_tokens=10, echo=True, stream=True, **GREEDY))
    assert joined(chunks) == create(prompt="Tom had", max_tokens=10, echo=True, **GREEDY).choices[0].text == "Tom had" + text

    told = create(prompt=ids, max_tokens=2, echo=True, logprobs=2, **GREEDY).choices[0].logprobs
    assert told.tokens[:3] == ["<s>", "Tom", " had"] and len(told.tokens) == 5 and told.text_offset[:3] == [0, 0, 3]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None and all(p <= 0 for p in told.token_logprobs[1:])
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs))[1:]:
        assert top[token] == logprob and 2 <= len(top) <= 3
    # A text is only scored.
    scored = create(prompt=ids, max_tokens=0, echo=True, logprobs=0, **GREEDY).choices[0]
    assert scored.text == "Tom had" and scored.logprobs.token_logprobs == told.token_logprobs[:3]
    # What was said, scored, is as likely as it was when it was said.
    said = create(prompt=ids, max_tokens=4, logprobs=0, **GREEDY).choices[0]
    again = [VOCAB[token.replace(" ", "Ġ")] for token in said.logprobs.tokens]
    again = create(prompt=ids + again, max_tokens=0, echo=True, logprobs=0, **GREEDY).choices[0].logprobs.token_logprobs[3:]
    assert all(abs(a - b) < 1e-4 for a, b in zip(said.logprobs.token_logprobs, again, strict=True))


def responses(client):
    ask = dict(instructions="One day", input="Tom had a red", max_output_tokens=12, **GREEDY)
    whole = client.responses.create(**ask)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 12
    chat = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=12, **GREEDY)
    assert whole.output_text == chat.choices[0].message.content
    parts = [{"role": "developer", "content": [{"type": "input_text", "text": "One day"}]}, MESSAGES[1]]
    assert client.responses.create(**GREEDY, input=parts, max_output_tokens=12).output_text == whole.output_text
    events = list(client.responses.create(stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == whole.output_text
    with client.responses.stream(**ask) as stream:
        for _ in stream:
            pass
    parsed = client.responses.parse(**ask | dict(max_output_tokens=120), text_format=Toy, extra_body={"logit_bias": NO_LINES})
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Toy)


def errors(client):
    chat, text = client.chat.completions.create, client.completions.create
    missing = refused(openai.NotFoundError, "model", chat, model="absent", messages=MESSAGES)
    assert missing.code == "model_not_found" and missing.request_id
    refused(openai.NotFoundError, "model", chat, model="absent", messages=MESSAGES, stream=True)
    refused(openai.NotFoundError, "model", client.models.retrieve, model="absent")
    refused(openai.NotFoundError, None, client.embeddings.create, model=MODEL, input="Tom")
    refused(openai.BadRequestError, "temperature", chat, model=MODEL, messages=MESSAGES, temperature=-1)
    refused(openai.BadRequestError, "n", chat, model=MODEL, messages=MESSAGES, n=1000)
    refused(openai.BadRequestError, "messages", chat, model=MODEL, messages=[])
    refused(openai.BadRequestError, "messages", chat, model=MODEL, messages=[{"role": "user", "content": "Tom " * 300}])
    refused(openai.BadRequestError, "logit_bias", chat, model=MODEL, messages=MESSAGES, logit_bias={"100000": 1})
    refused(openai.BadRequestError, "response_format.type", chat, model=MODEL, messages=MESSAGES, response_format={"type": "xml"})
    refused(openai.BadRequestError, "prompt", text, model=MODEL, prompt=[100000])
    refused(openai.BadRequestError, "suffix", text, model=MODEL, prompt="Tom", suffix="end")
    refused(openai.BadRequestError, "previous_response_id", client.responses.create, model=MODEL, input="Tom", previous_response_id="resp_1")
    wrong = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, None, wrong.models.list).code == "invalid_api_key"
    limited = client.with_options(api_key=os.environ["LIMITED_API_KEY"])
    for _ in range(2):
        limited.completions.create(prompt="Tom had", max_tokens=1, **GREEDY)
    many = refused(openai.RateLimitError, None, limited.completions.create, model=MODEL, prompt="Tom had")
    assert 0 <= int(many.response.headers["retry-after"]) <= 60


async def several(client):
    """At once, each as alone."""
    create = client.chat.completions.create
    ask = dict(messages=MESSAGES, max_completion_tokens=12, **GREEDY)
    text = (await create(**ask)).choices[0].message.content

    async def streamed():
        return joined([chunk async for chunk in await create(stream=True, **ask)])

    async def whole():
        return (await create(**ask)).choices[0].message.content

    assert set(await asyncio.gather(*[streamed() for _ in range(8)], *[whole() for _ in range(8)])) == {text}
    async with client.chat.completions.stream(**ask) as stream:
        assert "".join([event.delta async for event in stream if event.type == "content.delta"]) == text
    try:
        await create(model="absent", messages=MESSAGES)
        raise AssertionError("a model that is not there answered")
    except openai.NotFoundError:
        pass


async def cancelled(client):
    """Who leaves frees the place: streams and others, of answers under way and of such as wait (128 are more than are continued together)."""
    async def status():
        return (await client.get("/../api/models", cast_to=object))["models"][MODEL]

    ask = dict(messages=MESSAGES, max_completion_tokens=200, n=128, logit_bias=NO_END, **GREEDY)

    async def leave_stream():
        stream = await client.chat.completions.create(stream=True, **ask)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        busy = await status()
        assert busy["running"] + busy["waiting"] > 64, busy
        await stream.close()

    async def leave_answer():
        try:
            await client.with_options(timeout=0.2).chat.completions.create(**ask)
            raise AssertionError("200 tokens of 128 answers in 0.2 s")
        except openai.APITimeoutError:
            pass

    for leave in (leave_stream, leave_answer):
        before = await status()
        await leave()
        for _ in range(500):
            after = await status()
            if after["running"] + after["waiting"] == 0:
                break
            await asyncio.sleep(0.01)
        passes = after["passes"] - before["passes"]
        assert after["running"] + after["waiting"] == 0 and passes < 300, (passes, after)


async def asynchronous():
    async with openai.AsyncOpenAI(max_retries=0) as client:
        await several(client)
        await cancelled(client)


def main():
    recorder = Recorder() if sys.argv[1:2] == ["--record"] else None
    with openai.OpenAI(max_retries=0, http_client=recorder and httpx2.Client(transport=recorder)) as client:
        for case in (models, chat, choices, settings, logprobs, structured, tools, completions, responses, errors):
            case(client)
            print(case.__name__)
    if recorder:
        recorder.write(sys.argv[2])
    asyncio.run(asynchronous())
    print("asynchronous")


if __name__ == "__main__":
    main()
