# ruff: noqa: E501, RUF001
from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.rewards.answer import grade
from rolltune.rewards.answers.numbers import plain_number, read_number

SPELLINGS = {
    "73": "**Answer:** 73|✅ Final Answer: **73**|__73__|<b>73</b>|{73}|= 73|$= 73$|\\fbox{73}|So the answer is 73.|Thus, 73|"
    "the total is 73|#### 73|Therefore, the answer is $73$.|The final answer is \\boxed{73}.|So it's 73|<code>73</code>|"
    "```73```|\\textbf{73}|\\mathrm{73}|Hence 73|**The answer is: 73**|\\left(\\frac{146}{2}\\right) = 73|073|73.|73。|７３|73\u200b|"
    "\ufeff73|7\u200d3|\\text{73}|73\\!|Answer = 73|\\underline{73}|{\\bf 73}|\\textcolor{blue}{73}|\\Large 73|\\begin{aligned}73\\end{aligned}|"
    "```text\n73\n```|\\therefore 73|⇒ 73|=> 73|Ans: 73|Consequently, 73|The answer to this question is 73.|The answer's 73|equals 73|73 ✅",
    "29": "US$29|USD29|USD 29|Rs. 29|₩29|29¢|CHF 29|R$ 29|29 Kč|29.-|29,-|$29|29$|29 USD|€29|29€|₹29|$29 per month|\\$29|29 Fr.|"
    "THB 29|Rp. 29|R29|TL 29|US $29|USD $29|Rs. 29/-|SFr. 29",
    "18": "18 red balls|18 pairs of shoes|18 quarters|18 mm|18 losses|18℃|18 m²|18 m^2|18'|18th|18 °F|18^\\circ|18^{\\circ}|18\\degree|18 degrees|18\\text{ cm}^2|18~\\text{cm}|**18** dollars|18ᵗʰ|18^{\\text{th}}|18 V|18 Ω|18 \u2126|18 N·m|18 µm|18 sq. ft|18^{o}|18 per cent|"
    "\\boxed{18} dollars|The answer is $18$ dollars.|$18$ %|18 percent|18 pct|18 km/h|18 kg m^2|1.8e1|1.8 \\times 10^1|x = 18|"
    "\\angle ABC = 18",
    "-5": "–5|－5|- 5|{-5}|minus 5|negative 5|−5|-5.0|$-5|-$5|-5 °C|Minus 5|-{5}|{-}5",
    "1/2": "½|1⁄2|.5|0,5|\\frac12|\\cfrac{1}{2}|1∕2|\\left(\\frac{1}{2}\\right)|¹⁄₂|^1/_{2}|{1 \\over 2}|\\nicefrac{1}{2}|1/{2}",
    "-3/4": "−¾|-\\sfrac{3}{4}",
    "5/2": "2½|2 ½|2\u00a0½|2 ¹⁄₂",
    "40/9": "4 4/9|4\\frac{4}{9}|+4 4/9",
    "1234567": "1\u00a0234\u00a0567|1\u202f234\u202f567|1\u2009234\u2009567|1'234'567|1’234’567|1,234,567|1{,}234{,}567|1\\,234\\,567|"
    "1,\\!234,\\!567|1 {, }234{, }567|1,234,567.00|1234567.|1.234.567|1ʼ234ʼ567|1٬234٬567|1.234567 × 10⁶",
    "10000": "10,\\,000|10\\!,\\!000|10,\\;000|10\\,000|10^4|1e4",
    "0.000001": "10^{-6}|1e-6|0.000001|1/1000000|10⁻⁶",
}  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), [(g, a) for g, answers in SPELLINGS.items() for a in answers.split("|")])
def test_people_write_numbers_in_many_ways(gold: str, answer: str) -> None:
    if answer.startswith("\\left(\\frac{146}"):
        assert not grade(gold, f"<answer>{answer}</answer>").correct  # shown work
    else:
        assert grade(gold, f"<answer>{answer}</answer>").correct


@pytest.mark.parametrize(
    "answer",
    "18 million|18 dozen|half of 18|0x12|0b10010|18k|18 K|18 quintillion|18 Milliarden|18 gross|18 score|18 lakh|18 below zero|"
    "18 in debt|18 in the hole|18 dollars in the red|18 down|18 doz.|18 Mrd.|18 万元|18 тысяч|18 basis points|18 degrees below|18 BC|18 am|18 overdrawn|18 trn|18 mln|18 Mill.|18 billones|18 miljoen|18 milyon|18 grands|18 tau|18 overdraft|❌ 18|18 ❌|✗ 18|🚫 18|❓ 18|3 or 18|17 & 18|17→18|17 to 18|between 17 and 19|18 ± 1|18 (or 19)|"
    "(18)|18!|18²|18 squared|18_{16}|18₁₆|18 base 16|18 hex|18x|18i|18\\pi|18\\sqrt{2}|\\boxed{17}\\boxed{18}|17<br>18|17\n18|"
    "maybe 18|so maybe 18|the answer could be 18|The answer isn't 18|not 17 but 18|36/2|12 + 6|12 + 6 = 18|17 = 18|1 8|"
    "18/0|18 0/0|17 7/7".split("|"),
)
def test_what_does_not_state_18(answer: str) -> None:
    assert not grade("18", f"<answer>{answer}</answer>").correct


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("5 inches", "5|5 inches|5 in|5\\text{ inches}", "6|5 feet|5 inches^2|5 cm"),
        ("5 \\text{ m}^2", "5|5 m^2|5 m²|5 square meters", "5 m|5 m^3"),
        ("60 miles per hour", "60|60 miles/hour|60 miles per hour", "60 km per hour|60 miles"),
        ("27 N", "27|27 newtons|27 N", "27 J|27 joules|27 m"),
        ("28\\%", "28|28%|28 percent|$28$ %|\\boxed{28}\\%", "0.28|28 cm|7/25"),
        ("0.28", "7/25|.28", "28%"),
        ("40/9", "4 4/9", "4 4/9 %|4 4/9 percent"),
        ("016", "16|16.0|016", "160|0.16"),
        ("1e-07", "0.0000001|10^{-7}", "1e-08|0"),
    ],
)
def test_units_percentages_and_odd_golds(gold: str, right: str, wrong: str) -> None:
    assert [a for a in right.split("|") if not grade(gold, f"<answer>{a}</answer>").correct] == []
    assert [a for a in wrong.split("|") if grade(gold, f"<answer>{a}</answer>").correct] == []


@given(st.fractions(max_denominator=10**6))
def test_a_number_reads_what_it_writes(value: Fraction) -> None:
    number = read_number(plain_number(value))
    assert number is not None and number.value == value
