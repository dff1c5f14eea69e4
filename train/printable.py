"""Text from outside (records, a model's words, other programs' errors) must not drive the terminal it is shown on.

Escape codes move the cursor, set the title, copy to the clipboard; marks of direction show text in another order.
"""

import re

# Controls but tab and line break, among them ESC and the one-character forms of C1; marks, overrides and isolates of
# direction; breaks of lines and paragraphs; halves of surrogate pairs, which no encoding can write.
DRIVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with such characters spelled, as \u001b; in JSON they mean the same as before."""
    return DRIVING.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
