"""`ingot.LLM` over fakes."""

import pytest

import ingot
from ingot.errors import ConfigError, EngineError, InputError
from ingot.llm.answers import Ticket
from ingot.llm.request import Guide
from ingot.llm.text import Text
from tests.llm.fakes import VOCABULARY, Writer, byte_tokenizer

SONG = "la la la, and so on."
TEXT = Text.from_files(byte_tokenizer(), VOCABULARY)


def test_texts_in_texts_out() -> None:
    with ingot.LLM(Writer(), text=TEXT) as llm:
        assert llm("Sing\n") == SONG
        answers = llm.generate(["One\n", list(b"Two\n")], max_tokens=5, n=2, logprobs=0)
        assert [answer.text for answer in answers] == [SONG[:5]] * 4
        assert answers[0].finish == "length" and len(answers[0].logprobs) == 5 and answers[0].prompt_tokens == 4
        assert "".join(llm.stream("Sing\n", stop=("so",))) == "la la la, and "
        for piece in llm.stream("Sing\n", ignore_eos=True, max_tokens=400):
            assert piece
            break
        with pytest.raises(InputError, match="no parameter warmth; there are temperature, top_k"):
            llm("Sing\n", warmth=1)
        with pytest.raises(InputError, match="the prompt is empty"):
            llm("")
        with pytest.raises(InputError, match="give a list of prompts"):
            llm.generate("Sing\n")
        for prompt in ([1, 2.5], b"Sing", 5, None, ["Sing"]):
            with pytest.raises(InputError, match="a prompt is a text or whole numbers"):
                llm.generate([prompt])  # type: ignore[list-item]
        with pytest.raises(InputError, match="cannot be guided by 'xml', but by json_schema"):
            llm("Sing\n", guide=Guide("xml"))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Sing"}])


def test_a_single_stop_string_is_one() -> None:
    with ingot.LLM(Writer(), text=TEXT) as llm:
        assert llm("Sing\n", stop="so") == "la la la, and "


def test_log_probabilities_of_prompts() -> None:
    with ingot.LLM(Writer(), text=TEXT) as llm:
        (scored,) = llm.generate(["Sing\n"], max_tokens=0, prompt_logprobs=2)
        assert (scored.text, scored.tokens, scored.finish) == ("", (), "length")
        assert [each.token for each in scored.prompt_logprobs] == list(b"ing\n")
        assert all(len(each.top) == 2 for each in scored.prompt_logprobs)
        assert llm.generate(["Sing\n"])[0].prompt_logprobs == ()


def test_a_stream_tells_one_answer() -> None:
    with ingot.LLM(Writer(), text=TEXT) as llm, pytest.raises(InputError, match="a stream tells one answer, n is 2"):
        list(llm.stream("Sing\n", n=2))


def test_where_one_prompt_is_refused_the_others_do_not_go_on() -> None:
    """Nothing is computed for nobody."""
    with ingot.LLM(Writer(), text=TEXT) as llm:
        submit, tickets = llm.engine.submit, list[Ticket]()
        llm.engine.submit = lambda *asked: tickets.append(submit(*asked)) or tickets[-1]  # type: ignore[method-assign,func-returns-value,assignment]
        with pytest.raises(InputError, match="token 99999"):
            llm.generate(["Sing\n", "Sing\n", [99999]], ignore_eos=True)
        assert len(tickets) == 2
        assert llm("Sing\n") == SONG  # after what was cancelled before it
        assert all(ticket.left == 0 for ticket in tickets)


def test_embeddings_that_cannot_be() -> None:
    with ingot.LLM(Writer(hidden=8), text=TEXT) as llm:
        assert llm.embed([]).shape == (0, 8) and llm.embed([], dimensions=3).shape == (0, 3)
        for dimensions in (0, -1, 9):
            with pytest.raises(InputError, match=f"dimensions must be 1 to 8, it is {dimensions}"):
                llm.embed(["Sing\n"], dimensions=dimensions)
        with pytest.raises(InputError, match="pooling must be 'last' or 'mean', it is 'max'"):
            llm.embed(["Sing\n"], pooling="max")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="give a list of prompts"):
            llm.embed(None)  # type: ignore[arg-type]


def test_what_was_opened_is_closed_where_it_cannot_be_used() -> None:
    """A draft model of other tokens; no tokenizer."""
    runner, draft = Writer(), Writer(vocabulary=7)
    with pytest.raises(ConfigError, match="the draft engine has 7 tokens"):
        ingot.LLM(runner, text=TEXT, draft=draft)
    assert runner.closed and draft.closed
    bare = Writer()
    with pytest.raises(EngineError, match=r"holds no tokenizer\.json"):
        ingot.LLM(bare)
    assert bare.closed


def test_drafts_change_nothing() -> None:
    with ingot.LLM(Writer(), text=TEXT, drafts=3) as llm, ingot.LLM(Writer(), text=TEXT, draft=Writer()) as other:
        assert llm("Sing\n") == other("Sing\n") == SONG
        assert other.engine.counters.accepted
