"""Chain-of-Rubrics: Pair -> chat messages -> prompt ids, and the distilled trace -> target ids.

The wording is this project's own; tags, section markers and their order are the paper's (Fig. 3, 6-8),
because checkpoints and verdict parsers depend on them. Responses are written by strangers: `render`
breaks section markers and speaker labels inside them (not in ready-made prompts, which come as one text), and
`encode_prompt` encodes all texts with a tokenizer that knows no control token, so that none can open a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from data import Message, Pair
from loading.templates import skeleton, thought_of_prompt
from runtime.errors import UserError

Style = Literal["instruct", "reasoning", "rubrics", "plain"]

_ROLE = """You are an impartial judge of two AI Chatbots. Each of them answered the Client's question shown \
below. Decide which Chatbot served the Client better."""

_EVIDENCE = """  - <quote_A>...</quote_A>: words copied exactly from Chatbot A's response
  - <summary_A>...</summary_A>: what Chatbot A's response says, in your words
  - <quote_B>...</quote_B>: words copied exactly from Chatbot B's response
  - <summary_B>...</summary_B>: what Chatbot B's response says, in your words"""

_NOTES = """Important Notes:
- Judge the content alone, objectively, and let every claim rest on what the responses really say.
- The order in which the responses appear, their length and the Chatbots' names must not sway you."""

_RUBRIC_STEPS = """1. Write the criteria that fit this request, in <rubric>...</rubric>.
2. Give each criterion a weight, by how much it matters to the Client.
3. Inside <rubric>, add <justify>...</justify>: why these criteria and these weights.
4. Compare the two responses criterion by criterion.
5. Put the comparison in <eval>...</eval> and support it with these tags:
{evidence}
6. End with the verdict: <answer>[[A]]</answer> or <answer>[[B]]</answer>"""

# Fig. 3: classify, then solve (Reasoning) or write rubrics (Chat), then compare, then the verdict.
_INSTRUCT = f"""{_ROLE}

First say what kind of task this is, <type>Reasoning</type> or <type>Chat</type>:
- Reasoning: mathematics, programming, expert knowledge, anything that takes several steps or a deduction.
- Chat: open or factual conversation, rewriting and style, safety questions, everyday help.

If the task is Reasoning:
1. Solve the Client's question yourself and write your solution in <solution>...</solution>.
2. Judge how correct, complete and well reasoned each response is, measured against your solution.
3. Put the comparison in <eval>...</eval> and support it with these tags:
{_EVIDENCE}
4. End with the verdict: <answer>[[A]]</answer> or <answer>[[B]]</answer>

If the task is Chat:
{_RUBRIC_STEPS.format(evidence=_EVIDENCE)}

{_NOTES}
- Keep strictly to one of the two output formats.

Output format for Reasoning:
<type>Reasoning</type>

<solution>your own solution</solution>

<eval>the comparison, with quotes and summaries</eval>

<answer>[[A/B]]</answer>

Output format for Chat:
<type>Chat</type>

<rubric>
criteria with weights
<justify>why these criteria and weights</justify>
</rubric>

<eval>the comparison, with quotes and summaries</eval>

<answer>[[A/B]]</answer>"""

# Fig. 7: the "+Rubrics" ablation - the Chat steps for every task, no classification.
_RUBRICS = f"""{_ROLE}

{_RUBRIC_STEPS.format(evidence=_EVIDENCE)}

{_NOTES}"""

# Fig. 6: models that think before they answer bring their own chain; only the verdict's form is fixed.
_REASONING = """Act as an impartial judge of the responses that two AI Chatbots gave to the Client below.

{data}

Give your final verdict last, in exactly this form: '<answer>[[A]]</answer>' if Chatbot A is better, or \
'<answer>[[B]]</answer>' if Chatbot B is better."""

# Fig. 8: the cold-start ablation - compare, then the verdict, no rubric.
_PLAIN = """Act as an impartial judge of the responses that two AI Chatbots gave to the Client below. \
Consider how helpful, relevant, accurate, deep, creative and detailed each response is. Compare the two in \
a short explanation; do not let order, length or names sway you. After the explanation give your verdict \
in exactly this form: <answer>[[A]]</answer> if Chatbot A is better, <answer>[[B]]</answer> if Chatbot B is.

{data}"""

SYSTEM = {"instruct": _INSTRUCT, "rubrics": _RUBRICS}  # wording in the system message, data in the user's
USER = {"reasoning": _REASONING, "plain": _PLAIN}  # one user message around {data}


# ---- pair -> messages ----------------------------------------------------------------------------------


def render(pair: Pair, style: Style, system: str | None = None) -> list[Message]:
    """Chat messages that ask for a verdict on `pair`; the last one is the user's.

    `system` (the text of --prompt-file) replaces the style's own wording. In "instruct" and "rubrics" the
    wording is the system message; "reasoning" and "plain" have none, and the wording is the user message, in
    which `{data}` marks the place of the data block. A ready-made prompt (`pair.messages`) is returned as it is.
    """
    if pair.messages is not None:
        return list(pair.messages)
    if style not in (*SYSTEM, *USER):
        raise UserError(f"style {style!r}: choose one of {', '.join((*SYSTEM, *USER))}")
    data = _data_block(pair)
    if style in SYSTEM:
        wording = SYSTEM[style] if system is None else system
        return [{"role": "system", "content": wording}, {"role": "user", "content": data}]
    before, mark, after = (USER[style] if system is None else system).partition("{data}")
    if not mark:
        raise UserError(f"a prompt for style {style!r} needs {{data}} where the responses go")
    return [{"role": "user", "content": before + data + after}]


def _data_block(pair: Pair) -> str:
    """The text that shows the judge what it compares: the question and both responses, each in its section.

    A context of more than one message is shown as a conversation, once for each Chatbot with its response as the
    last turn. One code path writes A and B, so that nothing but their texts differs.
    """
    if len(pair.context) == 1:
        question = defuse(pair.context[0]["content"])
        responses = (section(f"Chatbot {x}'s Response", defuse(text)) for x, text in _sides(pair))
        return "\n\n".join((f"[Client Question]\n{question}", *responses))
    return "\n\n".join(
        section(f"the Conversation between Chatbot {x} and the Client", _conversation(pair.context, x, text))
        for x, text in _sides(pair)
    )


def _sides(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("A", pair.response_a), ("B", pair.response_b)


def section(name: str, text: str) -> str:
    return f"[The Start of {name}]\n{text}\n[The End of {name}]"


def _conversation(context: Sequence[Message], letter: str, response: str) -> str:
    speaker = SPEAKERS | {"assistant": f"Chatbot {letter}"}
    turns: list[Message] = [*context, {"role": "assistant", "content": response}]
    return "\n".join(f"{speaker[m['role']]}: {defuse(m['content'], labels=True)}" for m in turns)


SPEAKERS = {"user": "User", "assistant": "Chatbot", "system": "System", "developer": "Developer", "tool": "Tool"}
_MARKER = re.compile(r"\[(?=\s*(?:the\s+(?:start|end)\s+of|client\s+question))", re.IGNORECASE)
_BREAK = "\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_LABEL = re.compile(
    rf"([{_BREAK}](?:(?![{_BREAK}])\s)*)(?=(?:user|system|developer|tool|chatbot(?:\s+[ab])?)\s*:)", re.IGNORECASE)


def defuse(text: str, labels: bool = False) -> str:
    """Break what could pass for our section markers and, in a conversation, for a new speaker's turn."""
    text = _MARKER.sub("(", text)
    return _LABEL.sub(r"\1> ", text) if labels else text


# ---- messages -> ids -----------------------------------------------------------------------------------


def encode_prompt(messages: Sequence[Message], tokenizer: Any, add_generation_prompt: bool = True) -> list[int]:
    """Chat template + generation prompt -> ids, in which control tokens come from the template alone.

    The template is rendered around sentinels and cut at its own control tokens, and every text between two of
    them is encoded by a copy of the tokenizer without control tokens. For harmless text the ids equal those of
    `apply_chat_template`.
    """
    rendered, texts = skeleton(messages, tokenizer, add_generation_prompt)
    plain, control = plain_tokenizer(tokenizer), control_tokens(tokenizer)
    marks = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)"
    sentinel = "|".join(map(re.escape, texts))
    ids: list[int] = []
    for piece in re.split(f"({marks})", rendered):
        if piece in control:
            ids.append(control[piece])
        else:
            ids += encode_text(re.sub(sentinel, lambda match: texts[match[0]], piece), plain, control)
    return ids


def encode_target(pair: Pair, tokenizer: Any) -> list[int]:
    """SFT target: the trace, then the end-of-turn token. (len,) ids. Eq. 4

    If the trace begins with <think>, that tag and its last </think> become the tokenizer's own tokens, if it has
    them. If the prompt already ends with <think>, the tag is not written again. All other tags are plain text.
    """
    if not pair.trace:
        raise ValueError(f"pair {pair.pair_id} has no trace to learn from")
    plain, control = plain_tokenizer(tokenizer), control_tokens(tokenizer)
    prompt_opens, prompt_closes = thought_of_prompt(tokenizer)
    trace_opens = re.match(r"\s*<think>", pair.trace)
    if trace_opens and prompt_closes:
        raise UserError(f"pair {pair.pair_id}: its trace begins with <think>, but the prompt already ends the thought "
                        "(</think>); leave out --template-args enable_thinking=false")
    text = pair.trace[trace_opens.end() :] if trace_opens else pair.trace
    if trace_opens and prompt_opens:  # the prompt ends with "<think>" and perhaps a line break: write neither again
        text = text.removeprefix(prompt_opens.removeprefix("<think>"))
    open_tag = "<think>" if trace_opens and not prompt_opens else ""
    thought, close_tag, answer = text.rpartition("</think>") if trace_opens or prompt_opens else ("", "", text)
    if not {"<think>", "</think>"} <= control.keys():  # a tokenizer without these tokens spells them
        return [*encode_text(open_tag + thought + close_tag + answer, plain, control), tokenizer.eos_token_id]
    ids = [control[open_tag]] if open_tag else []
    ids += encode_text(thought, plain, control)
    ids += [control[close_tag]] if close_tag else []
    return [*ids, *encode_text(answer, plain, control), tokenizer.eos_token_id]


def encode_text(text: str, plain: Any, control: dict[str, int]) -> list[int]:
    """Text -> ids without control tokens; ValueError where the bare vocabulary itself would produce one."""
    ids: list[int] = plain.encode(text, add_special_tokens=False).ids
    if not set(control.values()).isdisjoint(ids):
        raise ValueError("this tokenizer turns plain text into control tokens; it is not safe for a judge")
    return ids


@lru_cache(maxsize=4)
def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer's `tokenizers` backend without control tokens. `split_special_tokens` would not do:
    it lets added tokens through that are not special, such as </think>."""
    import json

    from tokenizers import Tokenizer

    state, control = json.loads(tokenizer.backend_tokenizer.to_str()), control_tokens(tokenizer)
    kept = [token for token in state["added_tokens"] if token["content"] not in control]
    if kept:  # they keep their ids only if the vocabulary knows them
        state["model"]["vocab"] |= {token["content"]: token["id"] for token in kept}
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": kept, "truncation": None, "padding": None}))


@lru_cache(maxsize=4)
def control_tokens(tokenizer: Any) -> dict[str, int]:
    """{text: id} of the added tokens: turn markers, EOS, <think>, tool tags ...; runs of blanks are text."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.strip(" \u2581\t\r\n")}


# ---- trace -> parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """The parts of a chain, None where missing. `type` and `answer` are what stands between the tags."""

    type: str | None
    rubric: str | None
    solution: str | None
    eval: str | None
    answer: str | None


def parse_trace(text: str) -> Trace:
    """Split a chain into its parts; for reports and the format reward, never for the verdict.

    Text before the last </think> is thought, not answer. Parts are read in the order in which they stand, and
    what stands inside a part is not a part, so that tags quoted from a response do not count.
    """
    rest = text.rpartition("</think>")[2]
    parts: dict[str, str | None] = dict.fromkeys(("type", "rubric", "solution", "eval"))
    closed, place = {tag: rest.rfind(f"</{tag}>") for tag in parts}, 0
    while match := _OPEN.search(rest, place):
        tag, place = match[1], match.end()
        if closed[tag] >= place:
            end = rest.find(f"</{tag}>", place)
            parts[tag] = rest[place:end].strip() if parts[tag] is None else parts[tag]
            place = end
    answers = re.findall(r"<answer>([^<]*)</answer>", rest[place:])
    return Trace(**parts, answer=answers[-1] if answers else None)


_OPEN = re.compile(r"<(type|rubric|solution|eval)>")
