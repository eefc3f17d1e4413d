"""`ingot.LLM` over fakes."""

import pytest

import ingot
from ingot.errors import InputError
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


def test_drafts_change_nothing() -> None:
    with ingot.LLM(Writer(), text=TEXT, drafts=3) as llm, ingot.LLM(Writer(), text=TEXT, draft=Writer()) as other:
        assert llm("Sing\n") == other("Sing\n") == SONG
        assert other.engine.counters.accepted
