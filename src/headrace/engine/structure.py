"""Structured output: what a constraint allows next, by llguidance. Knows nothing of batches or sampling."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from headrace.checkpoint import Tokenizer
from headrace.core import Constraint, RowError
from headrace.engine.trial import try_grammar

# Compiled grammars stay for those who ask again. They are some hundred times as large as their texts.
CACHED_GRAMMARS, CACHED_CHARACTERS = 64, 2**20
# Of which llguidance makes an automaton at first: 30 MB, a tenth of a second in the engine. Its own limit is a million.
MOST_EXPRESSIONS = 200_000
MOST_CHARACTERS = 2**18
# No grammar so short overflows a stack or takes more than seconds.
HARMLESS_CHARACTERS = 2**11


class ConstraintCompiler:
    """Makes a matcher for each constrained sequence; a grammar is compiled once and copied after that.

    Any thread may call it: a server compiles what a request brings before the request reaches the engine.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        # What is copied for each sequence, or why the constraint cannot be used.
        self._compiled: OrderedDict[Constraint, Grammar | str] = OrderedDict()
        # What some matcher still has need not be compiled again: a batch brings more grammars than are kept for others.
        self._held: WeakValueDictionary[Constraint, Grammar] = WeakValueDictionary()
        self._lock = Lock()

    @property
    def vocabulary(self) -> LLTokenizer:
        """Built at the first constrained request: it costs about a second for a large vocabulary."""
        if self._vocabulary is None:
            text = self.tokenizer.backend.to_str()
            self._vocabulary = LLTokenizer(
                text, n_vocab=self.vocab_size, eos_token=sorted(self.tokenizer.eos_token_ids)
            )
        return self._vocabulary

    def is_slow(self, constraint: Constraint) -> bool:
        """Whether it may take seconds to compile."""
        known = constraint in self._compiled or constraint in self._held
        return len(constraint.value) > HARMLESS_CHARACTERS and not known

    def open_matcher(self, constraint: Constraint) -> Matcher:
        """A fresh matcher at the start of its grammar. Raises RowError("constraint") for an impossible constraint."""
        check_size(constraint)
        with self._lock:
            found = self._compiled.get(constraint) or self._held.get(constraint)
        # Compiled outside of the lock: a slow grammar must not hold up the requests of others.
        found = found or self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = found
            self._compiled.move_to_end(constraint)
            self._forget()
            if isinstance(found, Grammar):
                self._held[constraint] = found
        if isinstance(found, str):
            raise RowError("constraint", found)
        return Matcher(found, self.vocab_size)

    def _forget(self) -> None:
        """Drop the constraints that were asked for the longest ago until the others keep to the limits."""
        characters = sum(len(each.value) for each in self._compiled)
        while len(self._compiled) > CACHED_GRAMMARS or characters > CACHED_CHARACTERS:
            constraint, _ = self._compiled.popitem(last=False)
            characters -= len(constraint.value)

    def _compile(self, constraint: Constraint) -> Grammar | str:
        try:
            return Grammar(compile_constraint(constraint, self.vocabulary))
        except RowError as error:
            return str(error)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Grammar:
    """A compiled constraint; llguidance's own class cannot be referred to weakly."""

    prototype: LLMatcher


class Matcher:
    """Where one sequence stands in its grammar; a parser of its own from its first token on, for thousands may wait."""

    def __init__(self, grammar: Grammar, vocab_size: int) -> None:
        self._grammar = grammar
        self._vocab_size = vocab_size

    @cached_property
    def _matcher(self) -> LLMatcher:
        return self._grammar.prototype.deep_copy()

    @cached_property
    def _mask(self) -> NDArray[np.int32]:
        return np.zeros((self._vocab_size + 31) // 32, dtype=np.int32)

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: bool [vocabulary]. Raises RowError when the grammar exceeds its limits."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._raise_error()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(np.bool_)

    def consume(self, token: int) -> bool:
        """Step over the token that was chosen; True when the output is complete and nothing may follow."""
        self._matcher.consume_token(token)
        self._raise_error()
        return bool(self._matcher.is_stopped())

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise RowError(
                "constraint", f"the constraint failed while running: {self._matcher.get_error().splitlines()[0]}"
            )


def check_constraint(constraint: Constraint) -> None:
    """Raise RowError("constraint") for an impossible constraint. Spelled in bytes it is so with every vocabulary, and a
    model's own takes a second to prepare."""
    check_size(constraint)
    compile_constraint(constraint, LLTokenizer("byte"))


def check_size(constraint: Constraint) -> None:
    """Raise RowError for a text too long to be looked at."""
    if len(constraint.value) > MOST_CHARACTERS:
        size = f"{len(constraint.value):,} characters; {MOST_CHARACTERS:,} are allowed"
        raise RowError("constraint", f"the {constraint.kind} constraint has {size}")


def compile_constraint(constraint: Constraint, vocabulary: LLTokenizer) -> LLMatcher:
    """A matcher at the start of the constraint's grammar. Raises RowError for one that cannot be used."""
    matcher = None
    try:
        grammar = grammar_text(constraint)
        error = try_grammar(grammar) if len(constraint.value) > HARMLESS_CHARACTERS else None
        if error is None:
            limits = LLParserLimits(initial_lexer_fuel=MOST_EXPRESSIONS)
            error = LLMatcher.validate_grammar(grammar, vocabulary, limits=limits)
            matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
            error = error or matcher.get_error()
    except ValueError as cause:
        error = str(cause)
    if error or matcher is None or matcher.is_error():
        raise RowError("constraint", f"the {constraint.kind} constraint cannot be used: {shorten(error or '')}")
    return matcher


def shorten(error: str) -> str:
    """Of llguidance's lines the first, and of a regex parser's in them the one that says what is wrong."""
    lines = error.strip().splitlines() or ["unknown error"]
    return " ".join([lines[0], *(line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: "))])


def grammar_text(constraint: Constraint) -> str:
    """The constraint as an llguidance grammar. Raises ValueError for text that is no schema, regex or list."""
    if constraint.kind == "json":
        return str(LLMatcher.grammar_from_json_schema(constraint.value, defaults={"whitespace_flexible": False}))
    if constraint.kind == "regex":
        return str(LLMatcher.grammar_from_regex(constraint.value))
    if constraint.kind == "choice":
        choices = json.loads(constraint.value)
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices)))
    return str(LLMatcher.grammar_from_lark(constraint.value))
