"""How replies are judged, and how sure an average of judgements is."""

from __future__ import annotations

import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from minference_jax.extras import naming_extra


def all_found(reply: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the reply, whatever their case (RULER's metric of all but QA)."""
    return sum(answer.lower() in reply.lower() for answer in answers) / len(answers)


def any_found(reply: str, answers: Sequence[str]) -> float:
    """Whether any of the answers occurs in the reply, whatever its case (RULER's metric of QA)."""
    return float(any(answer.lower() in reply.lower() for answer in answers))


def starts_with(reply: str, answers: Sequence[str]) -> float:
    """Whether the reply begins with one of the answers, not as part of a longer word or number: for a reply whose
    beginning was given (InfiniteBench too wants the number itself of pass keys and numbers)."""
    return float(any(re.match(re.escape(answer) + r"(?!\w)", reply.strip(), re.IGNORECASE) for answer in answers))


def first_number(reply: str, answers: Sequence[str]) -> float:
    """Whether the first number of the reply is an answer (InfiniteBench: passkey, number, math_find).

    Digits have to be the same, leading zeros too; numbers with a decimal point are compared as numbers.
    """
    found = _NUMBER.search(reply)
    return float(found is not None and any(_same_number(found.group(), answer) for answer in answers))


def first_letter(reply: str, answers: Sequence[str]) -> float:
    """Whether the first option letter, A to D, that stands alone in the reply is an answer (multiple choice)."""
    found = re.search(r"\b([A-D])\b", reply)
    return float(found is not None and found.group(1) in answers)


def only_class(reply: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """1 / (how many of the classes the reply's first line names), if an answer is one of them (LongBench: trec, lsht).

    A class whose name is part of the answer's is not counted.
    """
    line = first_line(reply)
    named = [name for name in classes if name in line]
    return max(
        (1 / sum(name == answer or name not in answer for name in named) for answer in answers if answer in named),
        default=0.0,
    )


def first_line(reply: str) -> str:
    """The reply's first line that is not empty: after it, a reply to examples goes on with examples of its own."""
    return reply.lstrip("\n").split("\n")[0]


def first_line_f1(reply: str, answers: Sequence[str]) -> float:
    """`token_f1` of the reply's first line (LongBench: triviaqa)."""
    return token_f1(first_line(reply), answers)


def first_line_rouge_l(reply: str, answers: Sequence[str]) -> float:
    """`rouge_l` of the reply's first line (LongBench: samsum)."""
    return rouge_l(first_line(reply), answers)


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """Best F1 of the reply's words and an answer's, without case, punctuation and articles (as SQuAD does).

    Chinese, Japanese and Korean characters are words of their own.
    """
    return max(_f1(_words(reply), _words(answer)) for answer in answers)


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """Whether the reply's words are those of an answer, as `token_f1` takes them (SQuAD's exact match)."""
    return float(any(_words(reply) == _words(answer) for answer in answers))


def rouge_l(reply: str, answers: Sequence[str]) -> float:
    """Best F-measure of the longest common subsequence of words (ROUGE-L, without stemming)."""
    return max(_rouge(_tokens(reply), _tokens(answer)) for answer in answers)


def code_similarity(reply: str, answers: Sequence[str]) -> float:
    """Best edit similarity of the reply's first line of code and an answer (LongBench's code tasks).

    Lines with a backtick, # or // are taken for comments.
    """
    lines = (line for line in reply.lstrip("\n").split("\n") if not re.search("`|#|//", line))
    first = next(lines, "")
    return max(difflib.SequenceMatcher(None, first, answer, autojunk=False).ratio() for answer in answers)


def share_of_numbers(reply: str, answers: Sequence[str]) -> float:
    """Share of the reply's numbers that are an answer (LongBench's counting and paragraph retrieval)."""
    numbers = re.findall(r"\d+", reply)
    wanted = {number for answer in answers for number in re.findall(r"\d+", answer)}
    return sum(number in wanted for number in numbers) / len(numbers) if numbers else 0.0


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a mean of `count` scores in [0, 1]; 95 % by default. (0, 1) for no scores.

    Made for scores of 0 and 1. Scores between have less variance, so for them it is wider than need be.
    """
    if count < 1:
        return 0.0, 1.0
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


_NUMBER = re.compile(r"\d+(\.\d+)?")
_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}。，、；：？！「」『』（）《》“”‘’—…]")


def _same_number(ours: str, theirs: str) -> bool:
    if "." in ours + theirs and _NUMBER.fullmatch(theirs):
        return float(ours) == float(theirs)
    return ours == theirs


def _tokens(text: str) -> list[str]:
    return _PUNCTUATION.sub(" ", _CJK.sub(r" \1 ", text.lower())).split()


def _words(text: str) -> list[str]:
    # Not a space: "it's" is one word there.
    text = _PUNCTUATION.sub("", _CJK.sub(r" \1 ", text.lower()))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _f1(ours: list[str], theirs: list[str]) -> float:
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _rouge(ours: list[str], theirs: list[str]) -> float:
    with naming_extra("ROUGE-L"):
        from rapidfuzz.distance import LCSseq

    common = LCSseq.similarity(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
