"""OpenAI's requests: what /v1/chat/completions and /v1/completions ask for, as requests of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from ingot.llm.fields import Fields
from ingot.llm.request import Guide, Pooling, Refused, Request, Sampling
from ingot.llm.text import Text
from ingot.llm.tools import Tools

_COMPLETION_TOKENS = 16  # what OpenAI's completions give where max_tokens is not said
_MOST_TEXTS = 2048  # of one request for embeddings, as OpenAI's
_POOLINGS: Mapping[str, Pooling] = {"last": "last", "mean": "mean"}
_NO_KWARGS = ("messages", "tools", "add_generation_prompt", "self")  # what a template has anyhow
_NOT_HERE = {
    "functions": "use 'tools'", "function_call": "use 'tool_choice'", "suffix": "completions go on at the end only",
    "audio": "this model writes text", "prediction": "drafts are the server's own choice",
    "web_search_options": "this server searches nothing", "use_beam_search": "answers are drawn, not searched for",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One HTTP request: engine requests, one a prompt, and how their answers are told."""

    requests: Sequence[Request]
    chat: bool
    stream: bool = False
    usage: bool = False
    echo: tuple[str, ...] = ()
    tools: Tools | None = None
    top_logprobs: int | None = None
    vectors: Vectors | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Vectors:
    """How embeddings are told: their first `dimensions` (None: all), as numbers or as the bytes of float32."""

    dimensions: int | None = None
    encoded: bool = False


@dataclass(frozen=True)
class Model:
    """What requests are read for: the model's name and tokenizer."""

    name: str
    text: Text

    def chat(self, document: Any, client: str = "") -> Asked:
        """A chat completion. Refused where it cannot be answered as asked."""
        fields = self._checked(document)
        tools, kwargs = Tools.of(fields), fields.object("chat_template_kwargs")
        messages = [_message(message) for message in fields.objects("messages")]
        if not messages:
            raise fields.wrong("messages", "an array with a message")
        more = dict(kwargs.document) if kwargs is not None else {}
        if more.keys() & {*_NO_KWARGS}:
            raise fields.wrong("chat_template_kwargs", f"without {', '.join(_NO_KWARGS)}: they are fields beside it")
        generate = fields.flag("add_generation_prompt", not fields.flag("continue_final_message"))
        tokens = self.text.chat(messages, tools=tools.listed if tools else None, add_generation_prompt=generate, **more)
        top = fields.integer("top_logprobs") or 0
        if top and not fields.flag("logprobs"):
            raise fields.wrong("top_logprobs", "left out where 'logprobs' is not true")
        logprobs = top if fields.flag("logprobs") else None
        most = fields.integer("max_completion_tokens", fields.integer("max_tokens"))
        sampling = replace(_sampling(fields), max_tokens=most, logprobs=logprobs)
        if tools is not None and tools.guide is not None:
            sampling = replace(sampling, guide=tools.guide)
        request = _request(fields, tokens, sampling, client)
        told = _tells_prompt(fields)
        return Asked([request], True, *_streaming(fields), tools=tools, top_logprobs=logprobs, prompt_logprobs=told)

    def completion(self, document: Any, client: str = "") -> Asked:
        """A completion of one prompt or several, texts or token ids."""
        fields = self._checked(document)
        prompts = _prompts(fields)
        tokens = [self.text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        logprobs, most = fields.integer("logprobs"), fields.integer("max_tokens", _COMPLETION_TOKENS)
        echo, sampling = fields.flag("echo"), replace(_sampling(fields), max_tokens=most, logprobs=logprobs)
        if echo and logprobs is not None:
            sampling = replace(sampling, prompt_logprobs=max(logprobs, sampling.prompt_logprobs or 0))
        requests = [_request(fields, prompt, sampling, client) for prompt in tokens]
        echoed = tuple(self.text.decode(prompt, special=True) for prompt in tokens) if echo else ()
        told = _tells_prompt(fields)
        return Asked(requests, False, *_streaming(fields), echoed, top_logprobs=logprobs, prompt_logprobs=told)

    def embedding(self, document: Any, client: str, hidden: int) -> Asked:
        """Vectors of one text or several, of token ids as well; of at most `hidden` numbers."""
        fields = Fields.of(document)
        texts, dimensions = _prompts(fields, "input"), fields.integer("dimensions")
        if len(texts) > _MOST_TEXTS:
            raise fields.wrong("input", f"at most {_MOST_TEXTS} texts")
        if dimensions is not None and not 1 <= dimensions <= hidden:
            raise fields.wrong("dimensions", f"1 to {hidden}")
        form, pooling = fields.text("encoding_format", "float"), _POOLINGS.get(fields.text("pooling", "last"))
        if form not in ("float", "base64"):
            raise fields.wrong("encoding_format", "'float' or 'base64'")
        if pooling is None:
            raise fields.wrong("pooling", "'last' or 'mean'")
        tokens = [self.text.encode(text) if isinstance(text, str) else text for text in texts]
        requests = [replace(_request(fields, each, Sampling(), client), pooling=pooling) for each in tokens]
        return Asked(requests, False, vectors=Vectors(dimensions, form == "base64"))

    def generate(self, document: Any, client: str = "") -> Asked:
        """KServe's generate: text_input, and parameters beside it or below `parameters`."""
        fields = Fields.of(document)
        nested = fields.object("parameters")
        merged = {**(nested.document if nested else {}), **fields.document}
        if not isinstance(merged.get("text_input"), str):
            raise fields.wrong("text_input", "a string")
        asked = self.completion({**merged, "prompt": merged["text_input"]}, client)
        if asked.requests[0].sampling.n > 1:
            raise fields.wrong("n", "1: this route tells one answer; /v1/completions tells several")
        return replace(asked, stream=False)

    def _checked(self, document: Any) -> Fields:
        fields = Fields.of(document)
        for name, remedy in _NOT_HERE.items():
            if fields.any(name):
                raise fields.wrong(name, f"left out: {remedy}")
        if fields.any("modalities") not in (None, ["text"]):
            raise fields.wrong("modalities", '["text"]: this model writes text')
        return fields


def parse(body: bytes) -> Any:
    """A request's JSON; Refused where it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(f"the body is no JSON: {error}") from error


def _message(fields: Fields) -> dict[str, Any]:
    """A message as templates know it: contents are text, tool calls' arguments objects."""
    if not fields.text("role"):
        raise fields.wrong("role", "a string")
    message, content = dict(fields.document), fields.any("content")
    if isinstance(content, list):
        message["content"] = "".join(_part(part) for part in fields.objects("content"))
    elif content is None:
        message["content"] = ""
    elif not isinstance(content, str):
        raise fields.wrong("content", "a string or an array of parts")
    if fields.has("tool_calls"):
        message["tool_calls"] = [_called(call) for call in fields.objects("tool_calls")]
    return message


def _part(fields: Fields) -> str:
    if fields.text("type") not in ("text", "refusal"):
        raise fields.wrong("type", "'text': this model reads nothing else")
    return fields.text("text", fields.text("refusal"))


def _called(fields: Fields) -> dict[str, Any]:
    function = fields.object("function")
    if function is None:
        raise fields.wrong("function", "an object")
    try:
        arguments = orjson.loads(function.text("arguments") or "{}")
    except orjson.JSONDecodeError as error:
        raise function.wrong("arguments", f"JSON: {error}") from error
    return {**fields.document, "function": {**function.document, "arguments": arguments}}


def _prompts(fields: Fields, name: str = "prompt") -> Sequence[str | list[int]]:
    """A text, several, one prompt of tokens, or several."""
    prompt = fields.any(name)
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompt):
            return prompt
    raise fields.wrong(name, "a string, an array of strings, of tokens, or of arrays of tokens")


def _streaming(fields: Fields) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    stream = fields.flag("stream")
    if options is not None and not stream:
        raise fields.wrong("stream_options", "left out where 'stream' is not true")
    return stream, options is not None and options.flag("include_usage")


def _tells_prompt(fields: Fields) -> bool:
    """Whether the answer holds `prompt_logprobs`, as vLLM's does."""
    if fields.has("prompt_logprobs") and fields.flag("stream"):
        raise fields.wrong("prompt_logprobs", "left out where 'stream' is true")
    return fields.has("prompt_logprobs")


def _request(fields: Fields, tokens: Sequence[int], sampling: Sampling, client: str) -> Request:
    salt = fields.text("cache_salt").encode()
    return Request(tokens, sampling, fields.integer("priority", 0) or 0, client, salt)


def _sampling(fields: Fields) -> Sampling:
    bias = fields.object("logit_bias")
    return Sampling(
        temperature=fields.number("temperature", 1.0), top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0), top_k=_top_k(fields),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        logit_bias=_bias(bias) if bias is not None else {}, seed=fields.integer("seed"),
        min_tokens=fields.integer("min_tokens", 0) or 0, stop=fields.texts("stop"),
        stop_tokens=frozenset(fields.integers("stop_token_ids")), ignore_eos=fields.flag("ignore_eos"),
        include_stop=fields.flag("include_stop_str_in_output"), n=fields.integer("n", 1) or 0,
        best_of=fields.integer("best_of"), guide=_guide(fields), prompt_logprobs=fields.integer("prompt_logprobs"),
    )  # fmt: skip


def _top_k(fields: Fields) -> int | None:
    """0 and -1 mean that there is no limit, as vLLM's clients say it."""
    top_k = fields.integer("top_k")
    return None if top_k in (0, -1) else top_k


def _bias(fields: Fields) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 20 for token in fields.document):
        raise fields.wrong("", "an object from tokens to numbers")
    return {int(token): fields.number(token, 0.0) for token in fields.document}


# -- guides -----------------------------------------------------------------------------------------------------------
def _json(value: Any) -> str:
    try:
        return value if isinstance(value, str) else orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        raise Refused(f"the form of the answer cannot be used: {error}") from error


# vLLM's names, alone or within `structured_outputs`
_GUIDES: Mapping[str, Callable[[Fields, str], Guide]] = {
    "json": lambda fields, name: Guide("json_schema", _json(fields.any(name))),
    "regex": lambda fields, name: Guide("regex", fields.text(name)),
    "choice": lambda fields, name: Guide("choice", _json(fields.any(name))),
    "grammar": lambda fields, name: Guide("grammar", fields.text(name)),
}


def _guide(fields: Fields) -> Guide | None:
    """From `response_format`, `structured_outputs` or `guided_…`; at most one."""
    structured = fields.object("structured_outputs")
    found = [make(structured, name) for name, make in _GUIDES.items() if structured and structured.has(name)]
    found += [make(fields, f"guided_{name}") for name, make in _GUIDES.items() if fields.has(f"guided_{name}")]
    form = fields.object("response_format")
    if form is not None and (guide := _formatted(form)) is not None:
        found.append(guide)
    if len(found) > 1:
        raise fields.wrong("response_format", "the only description of the answer's form")
    return found[0] if found else None


def _formatted(form: Fields) -> Guide | None:
    kind = form.text("type")
    if kind == "json_schema":
        described = form.object("json_schema")
        if described is None or described.object("schema") is None:
            raise form.wrong("json_schema", "an object with a schema")
        return Guide("json_schema", _json(described.any("schema")))
    if kind not in ("text", "json_object"):
        raise form.wrong("type", "'text', 'json_object' or 'json_schema'")
    return Guide("json_object") if kind == "json_object" else None
