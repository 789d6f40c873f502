"""Infer from a criterion's wording whether satisfying it is good.

Pitfalls are written both ways. The published rubrics of Rubrics as Rewards (arXiv 2507.17746) give all of them negative
weights. But those of RaR-Science mostly read "Avoids ...", which is good to satisfy, while most of RaR-Medicine read
"Recommends ..." or "Does not mention ...", which is not. The rule looks at the first words of the description:

- good: "Avoids ...", "Refrains from ...", "Must ...", "Should not ...", "Correctly ...", and a denied error: "Does not
  confuse ...", "Does not include irrelevant ...";
- bad: "Fails to ...", "Omits ...", "Misstates ...", "Lacks ...", "Incorrectly ...";
- act: "Recommends ...", "Claims ...": neither good nor bad by itself, but a pitfall that reads so is bad to satisfy;
- unsaid: everything else, above all "Does not mention x", which depends on whether x belongs in the answer.

English only; in other languages everything is unsaid.
"""

from __future__ import annotations

import re
from typing import Literal

Wording = Literal["good", "bad", "act", "unsaid"]

_CHARS = 300  # of a description that are read
_SUBJECT = re.compile(r"^(?:(?:the|this|an|a) )?(?:response|answer|reply|text|explanation|solution|model|student) ")
_GOOD = re.compile(
    r"^(?:(?:avoid|refrain|abstain)(?:s|ing)?|(?:is|stays|remains) free (?:of|from)|should|must|needs to|has to"
    r"|correctly|accurately|properly|appropriately)\b"
)
_NOT = re.compile(r"^(?:(?:do|does|did|is|are|can)(?: not|n't)|cannot|never) ")
_ADVERB = re.compile(r"^(?:explicitly|simply|merely|also|only|ever|directly) ")
_FAILURE = re.compile(
    r"^(?:fail|omit|overlook|miss|lack|forget|misstate|misapplie|misapply|misuse|misinterpret|misread"
    r"|misrepresent|misidentifie|misidentify|misattribute|misclassifie|misclassify|miscalculate|mislead|mistake"
    r"|misunderstand|confuse|conflate|fabricate|hallucinate|overstate|understate|oversimplifie|oversimplify"
    r"|overcomplicate|overgeneralize|overgeneralise|mixes up|mix up|leaves out|leave out|ramble|violate)(?:s|es)?\b"
)
# Mostly errors, but "Neglects air resistance" or "Invents a rhyme" may be what was asked for.
_OFTEN_FAILURE = re.compile(
    r"^(?:neglect|ignore|dismiss|invent|exaggerate|contradict|downplay|digresse|digress|disregard)(?:s|es)?\b"
)
_WRONGLY = re.compile(
    r"^(?:\w+ )?(?:incorrectly|wrongly|falsely|mistakenly|erroneously|improperly|inaccurately|inappropriately"
    r"|needlessly|unnecessarily|misleadingly)\b"
)
# Including or claiming an error makes it, while addressing one corrects it, so only these verbs count when denied.
_OFFER = re.compile(
    r"^(?:include|contain|add|introduce|recommend|suggest|advise|use|give|provide|make|present|offer|claim|state|assert"
    r"|conclude|draw|assume|propose|list)s?\b"
)
_WRONG = re.compile(
    r"\b(?:incorrect|wrong|irrelevant|unrelated|unnecessary|misleading|inaccurate|unsafe|harmful|excessive|unsupported"
    r"|inappropriate|outdated|false|invented|fabricated|extraneous|off-topic|superfluous|unproven|erroneous|invalid)\b"
)
_ACT = re.compile(
    r"^(?:recommend|suggest|advise|claim|assert|state|mention|include|use|assume|implie|conclude|treat|relie|present"
    r"|provide|applie|attribute|identifie|describe|give|offer|promote|prescribe|order|add|introduce|propose|contain"
    r"|make|insert|list|label|repeat|copie|stop|end|begin|start|open|blame|insult|promise|apologise|apologize|complain"
    r"|demand|accuse|threaten|refuse|ask|spend|write|switche|cite|quote)s\b"
)
_DOUBLE = re.compile(
    r"(?:\bnot|\bnever|n't|\bavoids?|\bavoiding|\brefrains? from) (?:\w+ )?"
    r"(?:fail|fails|failing|omit|omits|omitting|neglect|neglects|neglecting|avoid|avoids|avoiding|lack|lacks|lacking"
    r"|not)\b"
)
_SILENT = re.compile(
    r"^(?:(?:avoid|refrain|abstain|fail|omit|neglect|lack|misse|overlook|ignore|leave)s? |(?:should|must) (?:not|avoid)"
    r"|no |(?:is|stays|remains) free )"
)


def wording(description: str) -> Wording:
    """Classify a description by the rule above.

    Example:
        >>> wording("Avoids jargon."), wording("Fails to name the unit."), wording("Does not mention surgery.")
        ('good', 'bad', 'unsaid')
    """
    text = _SUBJECT.sub("", _plain(description))
    if _GOOD.match(text):
        return "good"
    if denied := _NOT.match(text):
        rest = _ADVERB.sub("", text[denied.end() :])
        is_error = any(words.match(rest) for words in (_FAILURE, _OFTEN_FAILURE, _WRONGLY))
        return "good" if is_error or (_OFFER.match(rest) and _WRONG.search(rest)) else "unsaid"
    text = _ADVERB.sub("", text)
    if _FAILURE.match(text) or _WRONGLY.match(text):
        return "bad"
    return "act" if _ACT.match(text) or _OFTEN_FAILURE.match(text) else "unsaid"


def pitfall_direction(description: str) -> bool | None:
    """Whether satisfying a pitfall is good, by its wording; None if that does not say.

    Example:
        >>> pitfall_direction("Recommends antibiotics for a cold."), pitfall_direction("Avoids jargon.")
        (False, True)
    """
    return {"good": True, "bad": False, "act": False, "unsaid": None}[wording(description)]


def is_doubly_negated(description: str) -> bool:
    """Whether it negates twice ("does not fail to name"), which judges and readers misread."""
    return _DOUBLE.search(_plain(description)) is not None


def holds_for_silence(description: str) -> bool:
    """Whether a response that says nothing satisfies it: "Avoids jargon", "Omits the unit", "Does not mention x"."""
    text = _SUBJECT.sub("", _plain(description))
    return bool(_SILENT.match(text) or _NOT.match(text))


def _plain(description: str) -> str:
    return " ".join(description.casefold().replace("\u2019", "'").split())[:_CHARS]
