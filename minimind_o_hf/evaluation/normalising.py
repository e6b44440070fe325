"""Texts as they are compared: without case, punctuation and digits."""

import re
import unicodedata

LANGUAGES = ("en", "zh")

_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DIGITS = "零一二三四五六七八九"
_NUMBER = re.compile(r"(?<![^\W\d_])(\d+)(?:\.(\d+))?(?![^\W\d_])", re.ASCII)
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff"


def _english(number: int) -> str:
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return f"{_TENS[number // 10]} {_UNITS[number % 10] if number % 10 else ''}".strip()
    sizes = ((1_000_000, "million"), (1000, "thousand"), (100, "hundred"))
    size, name = next((size, name) for size, name in sizes if number >= size)
    rest = f" {_english(number % size)}" if number % size else ""
    return f"{_english(number // size)} {name}{rest}"


def _chinese(number: int) -> str:
    if number >= 10_000:
        low = number % 10_000
        rest = ("零" if low < 1000 else "") + _chinese(low) if low else ""
        return f"{_chinese(number // 10_000)}万{rest}"
    if number < 10:
        return _DIGITS[number]
    size, name = next((size, name) for size, name in ((1000, "千"), (100, "百"), (10, "十")) if number >= size)
    first = "" if 10 <= number < 20 else _DIGITS[number // size]
    low = number % size
    if not low:
        return first + name
    inner = _chinese(low)
    if size > 10:
        # 110 is 一百一十, though 10 alone is 十.
        inner = ("零" if low < size // 10 else "") + ("一" if 10 <= low < 20 else "") + inner
    return first + name + inner


def _speak_number(match: re.Match, language: str) -> str:
    whole, decimals = match[1], match[2]
    one_by_one = len(whole) > (9 if language == "en" else 8) or (len(whole) > 1 and whole[0] == "0")
    if language == "en":
        spoken = " ".join(_UNITS[int(digit)] for digit in whole) if one_by_one else _english(int(whole))
        return f" {spoken} " + (f"point {' '.join(_UNITS[int(digit)] for digit in decimals)} " if decimals else "")
    spoken = "".join(_DIGITS[int(digit)] for digit in whole) if one_by_one else _chinese(int(whole))
    return spoken + (f"点{''.join(_DIGITS[int(digit)] for digit in decimals)}" if decimals else "")


def normalise(text: str, language: str = "en") -> str:
    """
    A text as it is compared with what a recogniser heard.

    Compatibility forms are unified (NFKC), letters lowered, numbers written as they are spoken, punctuation dropped.
    English keeps apostrophes inside words. Chinese has no spaces but between two words in Latin letters; years are
    read digit by digit.

    Args:
        text (`str`): Any text.
        language (`str`, defaults to `"en"`): "en" or "zh".

    Returns:
        `str`: Words with one space between them, or ideographs without.

    Raises:
        ValueError: There are no rules for this language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"There are no rules for the language {language!r}: choose one of {', '.join(LANGUAGES)}.")
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if language == "en":
        text = text.replace("%", " percent ").replace("&", " and ")
    else:
        text = re.sub(r"(\d+(?:\.\d+)?)%", r"百分之\1", text)
        text = re.sub(r"\d{4}(?=年)", lambda match: "".join(_DIGITS[int(digit)] for digit in match[0]), text)
    text = _NUMBER.sub(lambda match: _speak_number(match, language), text)
    text = re.sub(r"(?<!\w)'|'(?!\w)|[^\w']|_", " ", text)
    text = " ".join(text.split())
    if language == "zh":
        text = re.sub(rf"(?<=[{_IDEOGRAPHS}]) | (?=[{_IDEOGRAPHS}])", "", text)
    return text


def words_of(text: str, language: str = "en") -> list[str]:
    """The words of a normalised text; in Chinese every ideograph is one."""
    if language == "zh":
        text = re.sub(rf"([{_IDEOGRAPHS}])", r" \1 ", text)
    return text.split()


__all__ = ["LANGUAGES", "normalise", "words_of"]
