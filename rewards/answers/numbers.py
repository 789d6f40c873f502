"""Read a text that states one number, with currency or unit, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """One number.

    Attributes:
        value: its exact value. A percent sign is a unit: ``18%`` has the value 18.
        unit: the words or the sign behind it, such as ``"inches"``; empty if it has none.
        is_fraction: whether it is written as a fraction or a mixed number.
        is_certain: False for what could also be a list (``1,5``) or a product (``2xy``).
    """

    value: Fraction
    unit: str = ""
    is_fraction: bool = False
    is_certain: bool = True

    @property
    def is_undone(self) -> bool:
        """Whether it is a division that leaves an integer, such as ``36/2``."""
        return self.is_fraction and self.value.denominator == 1

    @property
    def is_percentage(self) -> bool:
        """Whether the unit is the percent sign, or its name."""
        return self.unit.startswith(("%", "percent", "per cent", "pct"))

    def contradicts(self, other: Number) -> bool:
        """Return whether both have units, and different ones: ``5 feet`` and ``5 inches``, ``5 m`` and ``5 m^2``."""
        mine, theirs = canonical_unit(self.unit), canonical_unit(other.unit)
        return bool(mine and theirs) and mine != theirs


HEDGES = frozenset(
    """
    about almost and approx approximately are aren around be been bet believe but can certain circa correct could
    else error est estimate estimated estimation exactly except false give given guess guessed guessing hardly hmm hope
    hopefully idk if incorrect invalid is ish isn it likely may maybe might mistake must nearly never no none nope nor
    not only or ought perhaps possibly presumably probably reckon right roughly say should so something suppose supposed
    supposedly sure suspect than then think to true uncertain unknown unless unlikely unsure versus vs was were will
    would wrong you
    """.split()
)
# One of these words after a number changes its value or its sign.
_QUANTITIES = frozenset(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety tens hundred hundreds thousand thousands zero dozen
    dozens doz score scores gross myriad myriads googol grand grands lakh lakhs lac lacs crore crores mil mill mn mln
    mio mrd mld mlrd mia bn bln tn trn trln kk tusen duizend ribu juta tys
    half halves third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth
    tenths twelfth twelfths sixteenth sixteenths hundredth hundredths thousandth thousandths st nd rd
    th squared cubed factorial pi sqrt root mod plus minus log ln exp sin cos tan tau nan inf infinity infinite twice
    thrice double doubled triple tripled fold permille ppm ppb basis bps milli micro nano kilo mega
    giga tera tausend mille mila base hex hexadecimal oct octal binary recurring repeating bc bce am pm
    below beneath under underneath underwater underground debt deficit negative owed owing overdraft overdrawn loss
    arrears short shortfall behind down downward downwards backward backwards decrease decreased
    """.split()
)
_NEGATIVE_PHRASES = ("in the red", "in the hole")
_LATIN = re.compile(r"[a-z\u00b5\u00df-\u024f\u03c9]+")  # quantity words of other scripts are not known here
# million, Milliarde, quintillion, billones, miljoen
_LARGE = re.compile(r"[a-z]+illi(?:on|ard)(?:s|en|e|i|es)?|[a-z]+ill[o\u00f3]n(?:es)?|mil[ijy](?:oe?n|ard?)\w{0,3}")
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres", "in inch inches",
        "km kilometer kilometers kilometre kilometres",
        "ft foot feet", "yd yard yards", "mi mile miles", "mg milligram milligrams", "g gram grams",
        "kg kilogram kilograms", "oz ounce ounces", "lb lbs pound pounds", "ml milliliter milliliters",
        "l liter liters litre litres", "s sec second seconds", "min minute minutes", "h hr hour hours hrs",
        "\u00b0 degree degrees deg", "day days",
        "week weeks", "month months", "year years yr yrs", "cent cents", "dollar dollars",
        "n newton newtons", "j joule joules", "w watt watts", "v volt volts", "a ampere amperes amp amps",
        "\u03c9 ohm ohms",
    )
    for name in names.split()
}  # fmt: skip


def canonical_unit(unit: str) -> str:
    """Write a unit in one spelling: ``miles per hour`` and ``mile/h`` as ``mi/h``."""
    unit = re.sub(r"^(?:percent|percentage|per cent|pct)$", "%", unit)
    unit = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\b(?:cubic|cu\.?) (\w+)", r"\1^3", unit.lower()))
    unit = re.sub(r"\s*[/*]\s*|\s+per\s+|\s+(?=\w)", "/", re.sub(r"[{}]", "", unit)).replace(" ", "")
    return re.sub(r"[^\W\d_]+", lambda word: _UNITS.get(word[0], word[0].removesuffix("s")), unit)


_WORD = (
    r"(?:(?:sq|cu)\.|[^\W\d_]{2,}+|[ghlmsLACFJNVW\u03a9\u00c5])(?:\ ?\^\ ?(?:\{\ ?-?[1-4]\ ?\}|-?[1-4])|[23](?!\w))?"
)
_FRACTION = r"\\frac\ ?(?:\{\ ?(?P<%s>-?[0-9]+)\ ?\}|(?P<%s>[0-9]))\ ?(?:\{\ ?(?P<%s>[0-9]+)\ ?\}|(?P<%s>[0-9]))"
_POWER = r"(?:\{\ ?[-+]?[0-9]{1,3}\ ?\}|\([-+]?[0-9]{1,3}\)|[-+]?[0-9]{1,3}(?![0-9]))"
_CODES = "USD EUR GBP CHF CAD AUD NZD JPY CNY RMB INR KRW BRL MXN SEK NOK DKK PLN CZK HUF RUB TRY ZAR SGD HKD"
_CODES += " THB PHP IDR MYR AED SAR ILS NGN KES TWD VND COP ARS CLP PEN UAH RON BDT PKR LKR NPR EGP GHS"
_CODES += r" Rs\.? S?Fr\.? [kK]r\.? Rp\.? RM K[sS]h R TL Dh Tk Kč zł Ft"
# Possessive quantifiers where a run could be split in many ways, to prevent backtracking.
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]\ ?|[mM]inus\ |[nN]egative\ )?
    (?:(?:[A-Z]{{0,3}}\ ?[$\u00a4]|(?:{_CODES.replace(" ", "|")})(?=[\ 0-9.-]))\ ?(?P<inner>[-+])?\ ?)?
    (?:10\ ?\^\ ?(?P<ten>{_POWER})
      |{_FRACTION % ("top", "top1", "bottom", "bottom1")}
      |(?P<mixed>[0-9]{{1,9}})
       (?:\ ?{_FRACTION % ("mtop", "mtop1", "mbottom", "mbottom1")}|\ (?P<mn>[0-9]++)/(?P<md>[0-9]++))
      |(?P<numerator>[0-9]++)\ ?/\ ?(?P<denominator>[0-9]++)
      |(?P<comma>[0-9]++,[0-9]{{1,2}}|[1-9][0-9]{{0,2}}(?:\.[0-9]{{3}})++,[0-9]{{1,2}}
       |[1-9][0-9]{{0,2}}(?:\.[0-9]{{3}}){{2,}})(?![0-9,])
      |(?P<whole>[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})++|(?:\ [0-9]{{3}})++(?![0-9]))|[0-9]++)?(?P<decimals>\.[0-9]++)?
       (?P<exponent>[eE][-+]?[0-9]{{1,3}}(?![0-9])
        |\ ?[*xX]\ ?10\ ?\^\ ?{_POWER})?
    )
    (?P<unit>(?:st|nd|rd|th)(?!\w)|[.,/]-{{1,2}}|\ ?\u00b0\ ?[CFK]?|'{{1,2}}|"
      |\ ?(?:%|[$\u00a4])?(?:\ ?/?\ ?{_WORD}(?:\ ?[\ /*]\ ?{_WORD}){{0,3}}+)?)
    \.?""",
    re.VERBOSE,
)


@lru_cache(maxsize=8192)
def read_number(text: str) -> Number | None:
    """Read a normalised text; None if it does not state exactly one number.

    Example:
        >>> read_number("1,800.50 dollars")
        Number(value=Fraction(3601, 2), unit='dollars', is_fraction=False, is_certain=True)
    """
    while text.startswith("(") and text.endswith(")") and "\\frac" in text and text.count("(") == 1:
        text = text[1:-1].strip()  # but not "(18)", which accountants read as -18
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    unit = (match["unit"] or "").strip()
    words = re.findall(r"[^\W\d_]+", unit.lower())
    is_ordinal = unit in ("st", "nd", "rd", "th") and not match["decimals"] and match["whole"]
    if not is_ordinal and not is_unit(words):
        return None
    try:
        value = _magnitude(match)
    except (ValueError, ZeroDivisionError):
        return None
    is_glued = text[: match.start("unit") + 1].endswith(unit[:1]) and not is_ordinal
    is_fraction = any(match[name] for name in ("mixed", "top", "top1", "numerator"))
    has_minus = (match["sign"] or match["inner"] or "+").strip().lower() in ("-", "minus", "negative")
    return Number(
        value=-value if has_minus else value,
        unit=unit,
        is_fraction=is_fraction,
        is_certain=not match["comma"] and not (unit.isalpha() and len(unit) < 5 and unit not in _UNITS and is_glued),
    )


def _magnitude(match: re.Match[str]) -> Fraction:
    """Return the value without its sign."""

    def integer(*names: str) -> int:
        return int(next(match[name] for name in names if match[name]))

    if match["mixed"]:
        part = Fraction(integer("mtop", "mtop1", "mn"), integer("mbottom", "mbottom1", "md"))
        if not 0 <= part < 1:
            raise ValueError("a mixed number needs a proper fraction")
        return int(match["mixed"]) + part
    if match["top"] or match["top1"] or match["numerator"]:
        return Fraction(integer("top", "top1", "numerator"), integer("bottom", "bottom1", "denominator"))
    if match["comma"]:
        return Fraction(match["comma"].replace(".", "").replace(",", "."))
    digits = "1" if match["ten"] else re.sub("[, ]", "", match["whole"] or "") + (match["decimals"] or "")
    exponent = re.search(r"[-+]?[0-9]+(?=[^0-9]*$)", match["ten"] or match["exponent"] or "")
    return Fraction(digits) * Fraction(10) ** (int(exponent[0]) if exponent else 0)


def is_unit(words: Iterable[str], *, known: bool = False) -> bool:
    """Return whether words can name what a number counts: none of them hedges, denies or changes it.

    Args:
        words: in lower case.
        known: words of up to three letters, which could be a product of symbols, must be well-known units.
    """
    words = list(words)
    return not " ".join(words).endswith(_NEGATIVE_PHRASES) and not any(
        not _LATIN.fullmatch(word)
        or word in HEDGES
        or word in _QUANTITIES
        or _LARGE.fullmatch(word)
        or (known and len(word) < 4 and word not in _UNITS)
        for word in words
    )


def plain_number(value: Fraction) -> str:
    """Write a number in its plainest form: ``1800.5``, or ``1/3`` if it has no finite decimal form."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(value)
    sign, digits = "-" if value < 0 else "", 0
    scaled = abs(value)
    while scaled.denominator != 1:
        scaled, digits = scaled * 10, digits + 1
    text = str(scaled.numerator).rjust(digits + 1, "0")
    return sign + (f"{text[:-digits]}.{text[-digits:]}" if digits else text)
