"""The symbols of the small worlds of reasoning: chains of sums and pushed boxes share one table.

The id of a symbol is its place in `SYMBOLS`; `kd.text.table.table(SYMBOLS)` is their tokenizer.
Digits are `DIGIT + d`, cells of the 5 x 5 grid `CELL + 5 row + column`, styles `STYLE + s`.
"""

from __future__ import annotations

_CELLS = tuple(f'c{row}{column}' for row in range(5) for column in range(5))
# Seven spare ids, which say in what style an answer is written.
_STYLES = tuple(f's{style}' for style in range(7))

SYMBOLS = (
    *('PAD', 'BOS', 'EOS', '=', '#', '|', '+', '-', '@', ';'),
    *map(str, range(10)),
    *('SOL', 'HINT', 'GOOD', 'BAD', 'CHAIN', 'EXEC', 'PUSH', 'OBS'),
    *('U', 'R', 'D', 'L'),
    *('pU', 'pR', 'pD', 'pL'),
    *('SKILL', 'OK', 'FAIL', 'NONE'),
    *_CELLS,
    *_STYLES,
)

PAD, BOS, EOS, EQUALS, HASH, BAR, PLUS, MINUS, AT, SEMICOLON = range(10)
DIGIT = 10
SOL, HINT, GOOD, BAD, CHAIN, EXEC, PUSH, OBS = range(20, 28)
UP, RIGHT, DOWN, LEFT = range(28, 32)
PUSHED_UP, PUSHED_RIGHT, PUSHED_DOWN, PUSHED_LEFT = range(32, 36)
SKILL, OK, FAIL, NONE = range(36, 40)
CELL = 40
STYLE = CELL + len(_CELLS)
STYLES = len(_STYLES)
TOKENS = len(SYMBOLS)
