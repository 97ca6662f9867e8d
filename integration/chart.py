"""A chart as SVG: a few lines over two logarithmic axes. No library is needed for that."""
import html
import math

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 240, 40, 50
COLOURS = ["#0b6e4f", "#1f77b4", "#7b4ab8", "#d9480f", "#a61e4d", "#555555"]


def chart(title, across, up, series):
    """`series`: for each name, points of two numbers. Both axes are logarithmic; their titles are `across` and `up`."""
    points = [p for line in series.values() for p in line]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y = 10 ** math.floor(math.log10(min(y for _, y in points)))
    high_y = 10 ** math.ceil(math.log10(max(y for _, y in points)))

    def share(value, low, high):
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low) or 1)

    def place(x, y):
        return (LEFT + share(x, low_x, high_x) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - share(y, low_y, high_y) * (HEIGHT - TOP - BOTTOM))

    def text(x, y, words, anchor="start", more=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(words)}</text>'

    def line(x1, y1, x2, y2, colour):
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           text(LEFT, 22, title, more=' font-size="15"')]
    tick = low_y
    while tick <= high_y:
        _, y = place(low_x, tick)
        out += [line(LEFT, y, WIDTH - RIGHT, y, "#dddddd"), text(LEFT - 6, y + 4, f"{tick:g}", "end")]
        tick *= 10
    for x in sorted({x for x, _ in points}):
        at, _ = place(x, low_y)
        out += [line(at, TOP, at, HEIGHT - BOTTOM, "#eeeeee"), text(at, HEIGHT - BOTTOM + 18, f"{x:g}", "middle")]
    out += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across, "middle"),
            text(16, (TOP + HEIGHT - BOTTOM) / 2, up, "middle", f' transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})"')]
    # Names stand where their lines end, but not on each other.
    behind = -math.inf
    ends = sorted(zip(series.items(), COLOURS), key=lambda one: place(*one[0][1][-1])[1])
    for (name, dots), colour in ends:
        places = [place(x, y) for x, y in dots]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        behind = max(places[-1][1] + 4, behind + 16)
        out.append(text(places[-1][0] + 10, behind, name, more=f' fill="{colour}"'))
    return "\n".join([*out, "</svg>", ""])
