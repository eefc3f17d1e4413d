"""A small share of benchmarks/llm_chaos.py, over a runner without weights."""

from benchmarks import llm_chaos
from ingot.llm.chat import ChatTemplate
from ingot.llm.engine import Engine
from ingot.llm.openai import Model
from ingot.llm.options import EngineOptions
from ingot.llm.serve import LlmServer, ServeOptions, serving
from ingot.llm.text import Text
from tests.llm.fakes import END, VOCABULARY, FakeRunner, byte_tokenizer

PLAIN = Text.from_files(byte_tokenizer(), VOCABULARY)
TEXT = Text(PLAIN.tokenizer, PLAIN.source, ChatTemplate("{% for one in messages %}{{ one.content }}{% endfor %}"))


def test_nothing_is_lost_leaked_or_wrong() -> None:
    runner = FakeRunner(
        vocabulary=VOCABULARY, eos=frozenset({END}), block_size=16, blocks=50, token_budget=128, context=700
    )
    engine = Engine(runner, TEXT, EngineOptions(drafts=2))
    with serving(LlmServer(engine, Model("fake", TEXT), ServeOptions(port=0))) as server:
        tally, _ = llm_chaos.chaos(server, requests=150, threads=16, seed=3)
        assert llm_chaos.leaked(server) == 0
    assert dict(tally.counts) == {"cancelled": 30, "refused": 3, "right": 117}, tally.examples
