"""LaTeX as text and MathML that a browser can break into lines."""

import html
import re
from itertools import groupby
from xml.etree.ElementTree import Element, fromstring, tostring

from latex2mathml.converter import convert

_TILDE = {"~": "∼"}
"""LaTeX's relation is no keyboard tilde."""
_LONE_AMPERSAND = re.compile(r"&(?!#?\w+;)")
_ENDS = set(",;=<>≤≥≈∼≃∝→⟹")
_NESTING = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def mathematics(latex: str) -> str:
    """The formula as HTML: its words are text, and a `<math>` ends where a line may.

    Browsers do not break a line inside `<math>`. As in TeX a line may end behind a relation, and behind a comma or a
    wide space, but not within brackets. Raises what the converter raises for LaTeX that is not well formed.
    """
    markup = convert(latex).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    root = fromstring(_LONE_AMPERSAND.sub("&amp;", markup))
    for element in root.iter("mi"):
        _as_operator(element)
    numbered, number, depth = [], 0, 0
    for child in root[0]:
        numbered.append((number, child))
        depth += _NESTING.get(child.text or "", 0) if child.tag == "mo" else 0
        number += depth == 0 and _may_end_a_line(child)
    groups = groupby(numbered, key=lambda pair: pair[0])
    pieces = " ".join(_words_and_formulas([child for _, child in group]) for _, group in groups)
    return re.sub(" +", " ", pieces)


def with_formulas(text: str) -> str:
    """Text in which formulas stand between dollars, as HTML."""
    parts = text.split("$")
    return "".join(mathematics(part) if place % 2 else html.escape(part) for place, part in enumerate(parts))


def _as_operator(element: Element) -> None:
    """Signs and names such as sin are identifiers to the converter: only an operator has space around it."""
    text = element.text or ""
    if len(text) == 1 and not text.isalpha():
        element.tag, element.text = "mo", _TILDE.get(text, text)
    elif len(text) > 1 and text.isalpha():
        element.tag = "mo"
        element.attrib |= {"form": "prefix", "lspace": "0.17em", "rspace": "0.1em"}


def _may_end_a_line(element: Element) -> bool:
    if element.tag == "mo" and element.text in _ENDS:
        element.set("form", "infix")
        element.set("rspace", "0")  # the space between two pieces takes its place
        return True
    return element.tag == "mspace"


def _words_and_formulas(children: list[Element]) -> str:
    parts = []
    for is_text, run in groupby(children, key=lambda child: child.tag == "mtext"):
        if is_text:
            parts += [html.escape((child.text or "").replace("\xa0", " ")) for child in run]
        else:
            inside = "".join(tostring(child, encoding="unicode") for child in run)
            parts.append(f"<math><mrow>{inside}</mrow></math>")
    return "".join(parts)
