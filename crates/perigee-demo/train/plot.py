"""Draws curve.json as an SVG: bits a byte of the training windows and of the validation chapters, by step."""
import json
import pathlib
import sys

WIDTH, HEIGHT, LEFT, BOTTOM, LOW, HIGH = 640, 320, 48, 36, 1.0, 3.0
SERIES = (("train", "#b06000", "training windows"), ("validation", "#0050a0", "validation chapters"))


def main():
    curve = json.loads(pathlib.Path(sys.argv[1]).read_text())
    last = curve[-1]["step"]

    def place(step, bits):
        x = LEFT + (WIDTH - LEFT - 8) * step / last
        return x, 8 + (HEIGHT - BOTTOM - 8) * (HIGH - min(max(bits, LOW), HIGH)) / (HIGH - LOW)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tenths in range(int(LOW * 10), int(HIGH * 10) + 1, 2):
        _, y = place(0, tenths / 10)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 8}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tenths / 10:.1f}</text>')
    for quarter in range(5):
        x, _ = place(last * quarter / 4, LOW)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{last * quarter // 4}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
                 '<text x="54" y="20">bits a byte</text>')
    for number, (key, colour, label) in enumerate(SERIES):
        points = " ".join("{:.1f},{:.1f}".format(*place(entry["step"], entry[key])) for entry in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{WIDTH - 160}" y="{30 + 16 * number}" fill="{colour}">{label}</text>')
    pathlib.Path(sys.argv[2]).write_text("\n".join([*parts, "</svg>", ""]))


if __name__ == "__main__":
    main()
