"""Scores of a predicted text against its references, each from 0.0 to 1.0.

RULER's rules are those of arXiv 2404.06654 and its published scorer. InfiniteBench's are those of arXiv 2402.13718 and
its published scorer. Predictions come as the model wrote them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mtraining.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f]")
_ENGLISH_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕"
)
_MORE_PUNCTUATION = "〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def tidy(prediction: str) -> str:
    """A prediction as RULER reads it: control characters become line breaks, ends are stripped."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def all_contained(prediction: str, references: Sequence[str]) -> float:
    """RULER's string_match_all: the share of references that stand in the prediction, in any case of letters."""
    found = tidy(prediction).lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def any_contained(prediction: str, references: Sequence[str]) -> float:
    """RULER's string_match_part: 1 if any reference stands in the prediction, in any case of letters."""
    found = tidy(prediction).lower()
    return float(any(reference.lower() in found for reference in references))


def first_number(prediction: str, references: Sequence[str]) -> float:
    """1 if the first run of digits is the reference, digit by digit (passkey, number_string)."""
    digits = re.search(r"[0-9]+", prediction)
    return float(digits is not None and digits[0] == references[0])


def first_value(prediction: str, references: Sequence[str]) -> float:
    """1 if the first number, whole or decimal, has the reference's value (math_find)."""
    number = re.search(r"\d+\.\d+|\d+", prediction)
    return float(number is not None and float(number[0]) == float(references[0]))


def word_present(prediction: str, references: Sequence[str]) -> float:
    """1 if the reference is one of the words, once punctuation is taken for spaces (kv_retrieval)."""
    return float(references[0] in _words(prediction, "\n:\"'.,?!{}"))


def name_present(prediction: str, references: Sequence[str]) -> float:
    """As :func:`word_present`, in any case of letters (longdialogue_qa_eng)."""
    return float(references[0].upper() in [word.upper() for word in _words(prediction, "\n:\"'.,?!{}")])


def last_integer(prediction: str, references: Sequence[str]) -> float:
    """1 if the last word is the reference as an integer (code_run)."""
    words = _words(prediction.strip(), "\n.`'\":")
    try:
        return float(bool(words) and int(words[-1]) == int(references[0]))
    except ValueError:
        return 0.0


def running_values(prediction: str, references: Sequence[str]) -> float:
    """The share of the values that are right before the first wrong one (math_calc)."""
    found = re.findall(r"[0-9]+", prediction)
    right = 0
    for value, reference in zip(found, references, strict=False):
        if int(value) != int(reference):
            break
        right += 1
    return right / len(references)


def option_chosen(prediction: str, references: Sequence[str]) -> float:
    """1 if the option that the prediction names first is right (longbook_choice_eng).

    Args:
        references: (letter, text of the option).
    """
    text = prediction.strip()
    if text[:1] in tuple("ABCD"):
        return float(text[0] == references[0])
    if text in references:
        return 1.0
    text = " ".join(_words(text, "\n\"'.,?!{}"))
    told = _after(text, ("answer is:", "answer:", "answer is", "option is"), references)
    if told is not None:
        return told
    letters = [word for word in text.split() if word in tuple("ABCD")]
    return float(letters[:1] == [references[0]])


def bug_named(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction names the right option, by letter or by function (code_debug).

    The published scorer counts a letter at the beginning only before '.' or ':', and no function there. Prompts here
    end where the option begins, so both count as they stand.

    Args:
        references: (letter, name of the function).
    """
    text = " ".join(_words(prediction.replace("Option", " ").replace("option", " "), "\n`'\"-*"))
    if re.match(rf"(?:{'|'.join(map(re.escape, references))})(?!\w)", text):
        return 1.0
    return _after(text, ("answer is:", "is:", "answer:", "correct option is:"), references) or 0.0


def _after(text: str, phrases: Sequence[str], references: Sequence[str]) -> float | None:
    """Whether a reference follows the first phrase that is there; None where there is none."""
    for phrase in phrases:
        _, found, rest = text.partition(phrase)
        if found:
            return float(rest.lstrip().startswith(tuple(references)))
    return None


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of words over the references, without case, punctuation and articles (longbook_qa_eng)."""
    found = _plain_words(prediction)
    return max(_f1(found, _plain_words(reference)) for reference in references)


def character_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 of characters over the references, without spaces and punctuation (longbook_qa_chn)."""
    found = _plain_characters(prediction)
    return max(_f1(found, _plain_characters(reference)) for reference in references)


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """The best ROUGE-Lsum F1 over the references (longbook_sum_eng).

    Raises:
        UserError: the package rouge-score is missing.
    """
    scorer = rouge_scorer()
    return float(max(scorer.score(reference, prediction)["rougeLsum"].fmeasure for reference in references))


def rouge_scorer() -> Any:
    """What computes ROUGE-Lsum.

    Raises:
        UserError: the package rouge-score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "task longbook_sum_eng: ROUGE needs the package rouge-score; install mtraining[evaluate]."
        ) from None
    return RougeScorer(["rougeLsum"], use_stemmer=False)


def _words(text: str, punctuation: str) -> list[str]:
    return text.translate({ord(mark): " " for mark in punctuation}).split()


def _plain_words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ENGLISH_ARTICLES.sub(" ", kept).split()


def _plain_characters(text: str) -> list[str]:
    dropped = set(string.punctuation + _CHINESE_PUNCTUATION + _MORE_PUNCTUATION)
    return [letter for letter in text.lower() if not letter.isspace() and letter not in dropped]


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((Counter(found) & Counter(wanted)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)
