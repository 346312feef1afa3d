"""Pass 2 of distillation: the prompt that tells the right verdict, and a check that no chain speaks of it.

A chain of pass 2 is learnt below the prompt of pass 1, which tells no verdict. A chain that says it was told one would
teach a judge to invent instructions. `leaks` finds such chains by phrases, and by five of the hint's words in a row.
It is strict: losing a good chain costs less than learning a bad one. A paraphrase without any listed phrase passes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from cor_prompt import defuse, section
from data import Message

HINT = """

{failed}

That judgement is wrong: {verdict} is what it should have come to. Judge the two responses afresh and completely, in \
the format asked for above, by reasons that lead there and can be checked against the responses. Whoever reads your \
text has seen neither the failed judgement nor these last lines; write nothing that refers to either of them."""
RUN = 5  # this many of the hint's words in a row are no accident


def hinted(messages: Sequence[Message], winner: str, failed: str) -> tuple[Message, ...]:
    """Pass 1's prompt, then the failed judgement, then the right verdict.

    No text of a response or of the judgement can close a section, and the last verdict in the prompt is the right one.
    """
    shown = section("the Failed Judgement", defuse(failed))
    note = HINT.format(failed=shown, verdict=f"<answer>[[{winner}]]</answer>")
    return (*messages[:-1], {"role": "user", "content": messages[-1]["content"] + note})


def leaks(trace: str) -> bool:
    """Does a chain say that its writer knew the verdict, or had seen another judgement?

    >>> leaks("<eval>B is *the  correct\\nverdict*.</eval>"), leaks("<eval>As I was told, B.</eval>")
    (True, True)
    >>> leaks("<eval>B's sum is right, as the solution shows: 83.</eval>")
    False
    """
    plain = unicodedata.normalize("NFKC", trace).casefold().replace("’", "'")
    plain = "".join(c for c in plain if c not in '*_`~"“”' and unicodedata.category(c) != "Cf")  # marks, invisible ones
    return bool(_LEAK.search(" ".join(plain.split()))) or not _runs(plain).isdisjoint(_HINT_RUNS)


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


_HINT_RUNS = _runs(HINT.format(failed=section("the Failed Judgement", ""), verdict=""))

_VERDICT = r"(?:verdict|judge?ment|ruling|label|preference)s?"
_TOLD = r"(?:told|given|known|provided|supplied|stated|indicated|specified|predetermined|decided|fixed|required)"
_LEAK = re.compile(
    rf"""\b(?:correct|right|true|actual|official|gold(?:en)?|intended|expected|reference|target|desired|{_TOLD})
           \ (?:\w+\ )?{_VERDICT}\b                                       # the correct verdict, the given final label
    | \b{_VERDICT}\ (?:[\w\[\]]+\ ){{0,4}}{_TOLD}\b                       # the verdict that I was given
    | \bverdict\ (?:[\w\[\]]+\ ){{0,3}}(?:correct|right)\b                # the verdict [[B]] is right
    | \b{_VERDICT}\ (?:\w+\ )?(?:above|before(?:hand)?|fails|failed|erred|(?:was|is)\ wrong)\b
    | \b(?:previous|earlier|prior|failed|first|initial|original|wrong|mistaken|flawed|incorrect|faulty|other)
           \ (?:\w+\ )?(?:{_VERDICT}|judge)\b                             # the failed judgement, the other judge
    | \b(?:previous|earlier|prior|failed)\ (?:\w+\ )?(?:assessment|evaluation|evaluator|reviewer)\b
    | \bas\ (?:(?:i|we)\ (?:\w+\ ){{1,2}})?(?:given|told)\b               # as given, as I was told
    | \bgiven\ (?:that\ )?(?:the|this|a)\ (?:\w+\ )?{_VERDICT}\b
    | \bi(?:\ am|\ was|'m|\ have\ been|'ve\ been)\ (?:\w+\ )?(?:told|informed|instructed|given|asked\ to)\b
    | \btold\ (?:me\b|us\b|(?:that\ )?(?:chatbot|response|the\ answer|\[\[)) | \b(?:we|were)\ told\ (?:that\ )?[ab]\b
    | \b(?:the|this|your)\ hint\b | \bground[- ]truth\b | \banswer\ key\b
    | \baccording\ to\ the\ (?:{_VERDICT}|note|reference|key)\b
    | \b(?:must|should|has\ to|have\ to|needs?\ to|required\ to|supposed\ to|ought\ to)\ (?:\w+\ ){{1,5}}
           (?:{_VERDICT}\b|\[\[[ab]\]\])                                  # I have to end with [[B]]
    | \bto\ (?:reach|justify|match|support|arrive\ at|lead\ to)\ (?:\w+\ ){{0,2}}(?:{_VERDICT}\b|\[\[[ab]\]\])""",
    re.VERBOSE,
)
